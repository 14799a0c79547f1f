"""The learned optimizer: a function of meta-parameters theta that acts as an optax optimizer."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import optax

Theta = Any


class ReversibleUpdate(NamedTuple):
    """An update on flat parameters ``[P]``, in the parts that let it be undone.

    ``a <- decays * a + absorb(g);  w <- w + move(theta, a, count, sizes)``

    Attributes:
      decays: ``K`` floats, one for each accumulator.
      absorb: ``gradient [P] -> [K, P]``.
      move: ``(theta, accumulators [K, P], count, sizes) -> [P]``, with ``sizes`` the number
        of parameters in each tensor.
    """

    decays: tuple[float, ...]
    absorb: Callable[[jax.Array], jax.Array]
    move: Callable[[Theta, jax.Array, jax.Array, tuple[int, ...]], jax.Array]


class LearnedOptimizer(NamedTuple):
    """An optimizer with meta-parameters ``theta``, as two pure functions.

    Attributes:
      init: ``key -> theta``. Fresh meta-parameters, a pytree of float arrays (for a
        Flax module: its variables).
      bind: ``(theta, num_steps) -> optax.GradientTransformationExtraArgs``. The
        optimizer that ``theta`` encodes, told that it will run for ``num_steps``
        inner steps (an int or a traced scalar; only schedules read it). What is
        meta-trained is exactly what ``bind`` returns, so a trained optimizer runs in
        any optax loop: in ``optax.chain``, and under ``jit``, ``vmap`` and ``scan``.
      reversible: the same update in parts that can be undone, from the few optimizers
        that have them.
    """

    init: Callable[[jax.Array], Theta]
    bind: Callable[[Theta, Any], optax.GradientTransformationExtraArgs]
    reversible: ReversibleUpdate | None = None


@dataclass(frozen=True)
class OptimizerConfig:
    """The kind of all learned optimizers: an optimizer's architecture as values.

    An optimizer is a frozen dataclass derived from this one, or a plain function that returns a
    ``LearnedOptimizer``; its arguments, each with a default, are then the fields.
    """

    def make(self) -> LearnedOptimizer:
        """The learned optimizer."""
        raise NotImplementedError(f"{type(self).__name__} must define `make`.")
