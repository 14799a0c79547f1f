"""Celo-Adam: Adam under Celo's learned scheduler."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from learned_opt.arguments import check_between, check_count, check_given
from learned_opt.base import LearnedOptimizer, learned_optimizer
from learned_opt.controller import Controller, Scheduler, SchedulerState, state_dtype
from learned_opt.thirty_inputs import GRADIENT_LIMIT

_B1, _B2 = 0.9, 0.999


class CeloAdamState(NamedTuple):
    """State of Celo-Adam: that of the scheduler, and Adam's two averages, trees of parameters."""

    scheduler: SchedulerState
    mean: Any
    square: Any


def celo_adam_optimizer(
    hidden_size: int = 64, learning_rate: float = 1e-3, eps: float = 1e-8
) -> LearnedOptimizer:
    """Celo-Adam: Adam whose rate an LSTM multiplies; 36,865 meta-parameters.

    The update is ``-s learning_rate m / (sqrt(v + 1e-10) + eps)`` of bias-corrected averages with
    decays 0.9 and 0.999, where ``s`` is a scheduler's, an LSTM that reads the loss (``value``) and
    the step over ``num_steps``. Gradients count as at most 1000. 1,216 meta-parameters do nothing:
    a layer that the authors' code overwrites.

    Args:
      hidden_size: of the scheduler.
      learning_rate: the rate that it multiplies.
      eps: added to the root.

    Raises:
      ValueError: on a size or number out of range.

    Source: Moudgil et al. 2025 (arXiv 2501.12670); `celo_adam.py` in amoudgl/celo.
    """
    check_count(hidden_size=hidden_size)
    check_between(0, math.inf, learning_rate=learning_rate, eps=eps)
    scheduler = Scheduler(Controller(hidden_size, num_controls=0))

    def bind(theta, num_steps):
        def init_fn(params):
            mean, square = (jax.tree.map(jnp.zeros_like, params) for _ in range(2))
            return CeloAdamState(scheduler.start(theta, state_dtype(params)), mean, square)

        def update_fn(updates, state, params=None, *, value=None, **extra):
            del extra
            check_given("Celo-Adam", params, value)
            multiplier, schedule = scheduler.advance(theta, state.scheduler, value, num_steps)
            grads = jax.tree.map(lambda g: jnp.clip(g, -GRADIENT_LIMIT, GRADIENT_LIMIT), updates)
            mean = optax.tree.update_moment(grads, state.mean, _B1, 1)
            square = optax.tree.update_moment(grads, state.square, _B2, 2)
            rate = multiplier * learning_rate
            steps = jax.tree.map(
                lambda m, v: -rate * m / (jnp.sqrt(v + 1e-10) + eps),
                optax.tree.bias_correction(mean, _B1, schedule.steps),
                optax.tree.bias_correction(square, _B2, schedule.steps),
            )
            return steps, CeloAdamState(schedule, mean, square)

        return optax.GradientTransformationExtraArgs(init_fn, update_fn)

    return learned_optimizer(scheduler.init, bind)
