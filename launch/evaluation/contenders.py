"""The optimizers that are evaluated, trained or not."""

from typing import Any, NamedTuple

import jax

import learned_opt
from launch.choices import to_dict
from launch.evaluation.kept import digest_of_optimizer
from learned_opt.base import LearnedOptimizer
from learned_opt.pretrained import trained_folder


class Contender(NamedTuple):
    """An optimizer that is evaluated as it is.

    Attributes:
      optimizer: the optimizer.
      theta: its meta-parameters.
      decides: of what its steps follow from, as JSON.
      untrained: whether theta is a fresh one.
      outside: whether its code is from outside this package.
    """

    optimizer: LearnedOptimizer
    theta: Any
    decides: dict[str, Any]
    untrained: bool = False
    outside: bool = False


def contender(name_or_path: str) -> Contender:
    """A trained optimizer from its folder or by its name in the package, or an untrained one by the
    name of its architecture or ``MODULE:NAME``.

    Raises:
      ValueError: if it is neither.
    """
    path = trained_folder(name_or_path)
    outside = ":" in name_or_path
    if (outside or name_or_path in learned_opt.OPTIMIZERS) and not path.exists():
        from launch import config as cfg

        try:
            config = cfg.optimizer(name_or_path)
            optimizer = config.make()
        except ValueError as error:
            raise ValueError(f"--optimizer={name_or_path}: {error}") from error
        decides = {"untrained": to_dict(config), "version": learned_opt.__version__}
        return Contender(optimizer, optimizer.init(jax.random.key(0)), decides, True, outside)
    if not path.is_dir():
        raise ValueError(
            f"--optimizer must be a folder of a trained optimizer, or one of "
            f"{', '.join(learned_opt.OPTIMIZERS)} for an untrained one, got {name_or_path!r}."
        )
    outside = ":" in learned_opt.load_config(path)["name"]
    return Contender(
        *learned_opt.load(path), {"weights": digest_of_optimizer(path)}, False, outside
    )
