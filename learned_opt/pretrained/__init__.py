"""Trained optimizers that come with the package, by name."""

import difflib
import os
import warnings
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

from learned_opt.paths import user_path
from learned_opt.width import WideNetworkWarning

_FOLDER = Path(__file__).parent
_SUMMARIES = {
    "controller": "An Adam-like direction with a learned rate for each tensor (391 numbers), "
    "for runs of 100 to 2,000 steps; no rate to give; reads the loss.",
    "per_parameter": "Celo2: a direction for each parameter from a network (347 numbers), "
    "orthogonal for matrices, under a cosine; no rate to give; does not read the loss.",
}
# Units of the widest layers that each was trained on.
_WIDTHS = {"controller": 64, "per_parameter": 64}


def available() -> dict[str, str]:
    """The trained optimizers that come with the package: ``name -> what it is``, a line each.

    The card of each, with its evaluation and its limits, is ``README.md`` in its folder.
    """
    return dict(_SUMMARIES)


def trained_folder(path: str | os.PathLike) -> Path:
    """The folder of a trained optimizer: ``path``, or that of the name of one in the package.

    A folder of that name in the current one comes first.

    Raises:
      ValueError: if it is no path.
    """
    folder = user_path("path", path)
    if str(path) in _SUMMARIES and not folder.exists():
        return _FOLDER / str(path)
    return folder


def optimizer(
    name: str | os.PathLike, num_steps: Any = None
) -> optax.GradientTransformationExtraArgs:
    """A trained optimizer as an optax transformation.

        tx = learned_opt.optimizer("controller", num_steps=1000)
        updates, state = tx.update(grads, state, params, value=loss)

    Of one in the package, ``init`` warns (``WideNetworkWarning``) of parameters with a matrix wider
    than all of its training, for which its steps are too large, unless it is in
    ``learned_opt.scale_by_width``.

    Args:
      name: one of ``available()``, or the folder of another.
      num_steps: updates in the run, a whole number of at least 1.

    Raises:
      ValueError: if there is none of that name, or on a ``num_steps`` below 1 or not whole; from
        ``update``, if the parameters or the loss, where it reads them, are not given.
    """
    from learned_opt.weights import load

    is_path = isinstance(name, str | os.PathLike) and bool(str(name).strip())
    if not is_path or not trained_folder(name).is_dir():
        close = difflib.get_close_matches(str(name), _SUMMARIES, 1)
        meant = f" Did you mean {close[0]!r}?" if close else ""
        raise ValueError(
            f"`name` must be one of {', '.join(_SUMMARIES)}, or the folder of a trained optimizer, "
            f"got {name!r}.{meant}"
        )
    learned, theta = load(name)
    tx, folder = learned.bind(theta, num_steps), trained_folder(name)
    if folder.parent != _FOLDER:
        return tx

    def init(params):
        _warn_of_width(folder.name, params)
        return tx.init(params)

    return optax.GradientTransformationExtraArgs(init, tx.update)


def _warn_of_width(name: str, params: Any) -> None:
    """Warns once of the widest of the leaves whose two longest axes are longer than in training."""
    shapes = [np.shape(leaf) for leaf in jax.tree.leaves(params)]
    wide = [shape for shape in shapes if sorted(shape)[-2:-1] > [_WIDTHS[name]]]
    if wide:
        widest = max(wide, key=lambda shape: sorted(shape)[-2])
        warnings.warn(
            f"`params` has a tensor of shape {widest}, and {name} was trained on layers of up to "
            f"{_WIDTHS[name]} units: its steps are probably too large. Wrap it in "
            "`learned_opt.scale_by_width`, with the shapes of your network at a width of 16 to "
            f"{_WIDTHS[name]}, or compare it with Adam at its best rate.",
            WideNetworkWarning,
            stacklevel=3,
        )
