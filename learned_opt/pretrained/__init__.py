"""Trained optimizers that come with the package, by name."""

import difflib
import os
from pathlib import Path
from typing import Any

import optax

from learned_opt.paths import user_path

_FOLDER = Path(__file__).parent
_SUMMARIES = {
    "controller": "An Adam-like direction with a learned rate for each tensor (391 numbers), "
    "for runs of 100 to 2,000 steps; no rate to give; reads the loss.",
    "per_parameter": "Celo2: a direction for each parameter from a network (347 numbers), "
    "orthogonal for matrices, under a cosine; no rate to give; does not read the loss.",
}


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
    return learned.bind(theta, num_steps)
