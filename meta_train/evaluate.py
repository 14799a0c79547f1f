"""Inner-loss curves of trained optimizers against optax baselines with swept learning rates."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from learned_opt.base import LearnedOptimizer
from meta_train.inner import inner_training
from meta_train.unroll import unroll
from tasks.base import Task

# A baseline is a learned optimizer whose theta is the learning rate.
BASELINES: dict[str, Callable[[Any], optax.GradientTransformation]] = {
    "adam": optax.adam,
    "sgdm": lambda rate: optax.sgd(rate, momentum=0.9),
}
# Four a decade from 1e-4 to 10: 21 rates.
LEARNING_RATES = tuple(10.0 ** (e / 4) for e in range(-16, 5))


class Curves(NamedTuple):
    """Training-loss curves of one optimizer.

    Attributes:
      name: label.
      losses: float32 ``[seeds, steps]``, the loss of each training batch before its update.
      learning_rate: the best of the sweep, None if nothing was swept.
    """

    name: str
    losses: np.ndarray
    learning_rate: float | None = None

    @property
    def final(self) -> float:
        """Mean loss over seeds and the last tenth of the steps."""
        return float(np.mean(self.losses[:, -max(1, self.losses.shape[1] // 10) :]))

    @property
    def mean(self) -> float:
        """Mean loss over seeds and steps."""
        return float(np.mean(self.losses))


def inner_curves(
    task: Task, optimizer: LearnedOptimizer, theta: Any, num_steps: int, num_seeds: int, seed: int
) -> jax.Array:
    """Training losses of fresh inner runs, ``[num_seeds, num_steps]``.

    Run ``i`` of every optimizer gets the same task instance, initialization and batches.
    """
    system = inner_training(task, optimizer, num_steps=num_steps)

    def run(key):
        key_init, key_data = jax.random.split(key)
        state = system.init(theta, key_init)
        return unroll(system, theta, state, key_data, num_steps)[1]

    return jax.vmap(run)(jax.random.split(jax.random.key(seed), num_seeds))


def evaluate_learned(
    name: str,
    task: Task,
    optimizer: LearnedOptimizer,
    theta: Any,
    *,
    num_steps: int,
    num_seeds: int,
    seed: int,
) -> Curves:
    """Curves of a learned optimizer as it is."""
    run = partial(inner_curves, task, optimizer, num_steps=num_steps, num_seeds=num_seeds)
    return Curves(name, np.asarray(jax.jit(partial(run, seed=seed))(theta)))


def evaluate_baseline(
    name: str, task: Task, *, num_steps: int, num_seeds: int, seed: int, rates=LEARNING_RATES
) -> Curves:
    """Curves of an optax optimizer at its best learning rate.

    Every rate runs on the same seeds; the best has the lowest final loss (``Curves.final``)
    at this very horizon, on the very seeds reported, which favours the baseline.
    """
    optimizer = LearnedOptimizer(
        init=lambda key: jnp.zeros([]),
        bind=lambda rate, n: optax.with_extra_args_support(BASELINES[name](rate)),
    )
    run = partial(
        inner_curves, task, optimizer, num_steps=num_steps, num_seeds=num_seeds, seed=seed
    )
    # One rate at a time inside one program: memory of one run, one compilation.
    losses = np.asarray(jax.jit(partial(jax.lax.map, run))(jnp.asarray(rates, jnp.float32)))
    finals = [Curves(name, curves).final for curves in losses]
    best = int(np.nanargmin(np.where(np.isfinite(finals), finals, np.inf)))
    return Curves(name, losses[best], float(rates[best]))
