"""The learned optimizer: a function of meta-parameters theta that acts as an optax optimizer."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax

Theta = Any


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
    """

    init: Callable[[jax.Array], Theta]
    bind: Callable[[Theta, Any], optax.GradientTransformationExtraArgs]
