"""Inner runs of trained optimizers against optax baselines with swept learning rates.

Every optimizer trains the same runs (instance, initialization, batches), so that differences
between two of them are taken run by run.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from learned_opt.base import LearnedOptimizer, learned_optimizer
from meta_train.inner import inner_training
from meta_train.unroll import unroll
from tasks.base import Split, Task

# A baseline is a learned optimizer whose theta is the learning rate.
BASELINES: dict[str, Callable[[Any], optax.GradientTransformation]] = {
    "adam": optax.adam,
    "sgdm": lambda rate: optax.sgd(rate, momentum=0.9),
}
# Four a decade from 1e-4 to 10: 21 rates.
LEARNING_RATES = tuple(10.0 ** (e / 4) for e in range(-16, 5))


# Chosen rates never see the runs reported: those of the sweep are drawn from the next seed.
SELECTION_OFFSET = 1
TIE = 2.0  # Standard errors.


class Estimate(NamedTuple):
    """A mean over inner runs and its standard error; NaN where there is none (one run)."""

    mean: float
    error: float


class Curves(NamedTuple):
    """Inner runs of one optimizer.

    Attributes:
      name: label.
      losses: float32 ``[seeds, steps]``, the loss of each training batch before its update.
      learning_rate: the best of the sweep, None if nothing was swept.
      test: what ``Task.score`` finds on the test split after the last step, ``[seeds]`` each;
        empty if the task has no score.
    """

    name: str
    losses: np.ndarray
    learning_rate: float | None = None
    test: dict[str, np.ndarray] = {}  # noqa: RUF012

    @property
    def runs(self) -> dict[str, np.ndarray]:
        """What is compared, by run: ``[seeds]`` each.

        The final training loss is the mean of the last tenth of the steps.
        """
        losses = np.asarray(self.losses, np.float64)
        tail = losses[:, -max(1, losses.shape[1] // 10) :]
        training = {"mean training loss": losses.mean(1), FINAL: tail.mean(1)}
        scores = sorted(self.test, key=lambda name: (name != "loss", name))
        return training | {f"test {name}": np.asarray(self.test[name]) for name in scores}

    @property
    def final(self) -> float:
        """Mean loss over seeds and the last tenth of the steps."""
        return float(self.runs[FINAL].mean())


FINAL = "final training loss"


def estimate(runs: np.ndarray) -> Estimate:
    """The mean of independent runs, ``[seeds]``, and its standard error."""
    with np.errstate(invalid="ignore", over="ignore"):
        mean = float(np.mean(runs))
        if len(runs) < 2 or not np.isfinite(mean):
            return Estimate(mean, float("nan"))
        return Estimate(mean, float(np.std(runs, ddof=1) / len(runs) ** 0.5))


def difference(ours: Curves, other: Curves) -> dict[str, Estimate]:
    """Ours minus the other's, paired by run, of everything that both have."""
    with np.errstate(invalid="ignore", over="ignore"):
        return {
            name: estimate(np.asarray(runs, np.float64) - other.runs[name])
            for name, runs in ours.runs.items()
            if name in other.runs
        }


def is_tie(difference: Estimate) -> bool:
    """Whether a paired difference is within two standard errors of zero, or unknown."""
    return not abs(difference.mean) > TIE * difference.error


def inner_runs(
    task: Task,
    optimizer: LearnedOptimizer,
    theta: Any,
    num_steps: int,
    num_seeds: int,
    seed: int | jax.Array,
    split: Split = "test",
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Fresh inner runs: training losses ``[num_seeds, num_steps]``, scores ``[num_seeds]``.

    Scores are those of ``split`` after the last step; none if the task has no score.

    Run ``i`` of every optimizer gets the same task instance, initialization and batches.
    """
    system = inner_training(task, optimizer)

    def run(key):
        key_init, key_data = jax.random.split(key)
        state = system.init(theta, key_init, num_steps)
        state, losses = unroll(system, theta, state, key_data, num_steps)
        scores = task.score(state.params, state.instance, split) if task.score else {}
        return losses, scores

    return jax.vmap(run)(jax.random.split(jax.random.key(seed), num_seeds))


def inner_curves(
    task: Task,
    optimizer: LearnedOptimizer,
    theta: Any,
    num_steps: int,
    num_seeds: int,
    seed: int | jax.Array,
) -> jax.Array:
    """The training losses of ``inner_runs``."""
    return inner_runs(task, optimizer, theta, num_steps, num_seeds, seed)[0]


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
    """Runs of a learned optimizer as it is."""
    run = partial(inner_runs, task, optimizer, num_steps=num_steps, num_seeds=num_seeds, seed=seed)
    losses, scores = jax.device_get(jax.jit(run)(theta))
    return Curves(name, losses, test=scores)


def evaluate_baseline(
    name: str, task: Task, *, num_steps: int, num_seeds: int, seed: int, rates=LEARNING_RATES
) -> Curves:
    """Runs of an optax optimizer at its best learning rate.

    The best has the lowest final training loss (``Curves.final``) at this very horizon, over as
    many runs of the next seed (``SELECTION_OFFSET``): none of those reported.
    """
    optimizer = learned_optimizer(lambda key: jnp.zeros([]), lambda rate, n: BASELINES[name](rate))

    @jax.jit  # Compiled once for all rates and seeds.
    def runs(rate, seed):
        return inner_runs(task, optimizer, rate, num_steps, num_seeds, seed)

    def at(rate, seed):
        losses, scores = jax.device_get(runs(jnp.float32(rate), jnp.uint32(seed)))
        return Curves(name, losses, float(rate), scores)

    finals = np.array([at(rate, seed + SELECTION_OFFSET).final for rate in rates])
    best = int(np.argmin(np.where(np.isfinite(finals), finals, np.inf)))
    return at(rates[best], seed)
