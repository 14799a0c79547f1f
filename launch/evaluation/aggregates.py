"""From runs on many tasks to a few numbers with intervals."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

from meta_train.inner import CEILING, FLOOR

# Of the bootstrap.
RESAMPLES = 5000
CONFIDENCE = 0.95
# Fewer tasks agree in sign by chance too often: five do one time in sixteen.
LEAST_TASKS = 6
# Ratios of steps up to which AlgoPerf's score looks.
MAX_RATIO = 4.0


class Interval(NamedTuple):
    """An estimate and its 95% interval; infinite where it has none.

    Attributes:
      estimate, low, high: numbers.
      tasks: from how many; where it is one, from how many runs of it.
    """

    estimate: float
    low: float
    high: float
    tasks: int = LEAST_TASKS

    def __str__(self) -> str:
        return f"{self.estimate:+.3f} [{self.low:+.3f}, {self.high:+.3f}]"

    @property
    def of_few(self) -> bool:
        """Whether it is of too few tasks for a claim."""
        return self.tasks < LEAST_TASKS

    @property
    def sign(self) -> int:
        """-1 or 1 if all of the interval is on that side of 0, else 0; of few tasks always 0."""
        if self.of_few:
            return 0
        return int(self.high < 0) * -1 + int(self.low > 0)


def log_loss(loss: np.ndarray, constant: np.ndarray) -> np.ndarray:
    """``log(min(L, 3 L0) / L0 + .01)``: 0 at the constant predictor's loss ``L0``, -4.6 at 0.

    It needs no cache and no tuned optimizer; diverged runs count as ``3 L0``.

    Args:
      loss, constant: of equal shapes; a negative loss (of a variational bound) counts as 0.
    """
    loss, constant = np.asarray(loss, np.float64), np.asarray(constant, np.float64)
    capped = np.where(np.isfinite(loss), loss, np.inf)
    return np.log(np.clip(capped / constant, 0.0, CEILING) + FLOOR)


def interquartile_mean(values: np.ndarray) -> float:
    """The mean without the lowest and the highest quarter of all values."""
    return float(stats.trim_mean(np.asarray(values, np.float64).ravel(), 0.25))


def bootstrap(
    values: np.ndarray, statistic: Callable[..., np.ndarray] | None = None, seed: int = 0
) -> Interval:
    """A statistic of ``values [tasks, seeds]`` with its 95% expanded percentile interval.

    Each resample draws tasks with replacement and, of each drawn, seeds: an interval for other
    tasks of the kind, not only for other seeds of these. (The stratified bootstrap of Agarwal et
    al. 2021, "Deep Reinforcement Learning at the Edge of the Statistical Precipice", draws seeds
    alone.) With one task only seeds are drawn. Of few tasks the plain quantiles lie too close
    together, so those of Student's t are taken (Hesterberg 2015, "What Teachers Should Know About
    the Bootstrap", section 4.3); below ``LEAST_TASKS`` not even all resamples are enough.

    Args:
      statistic: ``[resamples, values] -> [resamples]``; by default the interquartile mean.
    """
    values = np.asarray(values, np.float64)
    if statistic is None:

        def statistic(x):
            return stats.trim_mean(x, 0.25, axis=1)

    tasks, seeds = values.shape
    random = np.random.default_rng(seed)
    drawn_tasks = random.integers(tasks, size=(RESAMPLES, tasks, 1))
    drawn_seeds = random.integers(seeds, size=(RESAMPLES, tasks, seeds))
    resampled = statistic(values[drawn_tasks, drawn_seeds].reshape(RESAMPLES, -1))
    units = tasks if tasks > 1 else seeds
    tail = (1 - CONFIDENCE) / 2
    if units > 1:
        wider = stats.t.ppf(tail, units - 1) * np.sqrt(units / (units - 1))
        tail = float(stats.norm.cdf(wider))
    low, high = np.quantile(resampled, [tail, 1 - tail]) if units > 1 else (-np.inf, np.inf)
    return Interval(float(statistic(values.reshape(1, -1))[0]), float(low), float(high), units)


def paired(ours: np.ndarray, other: np.ndarray) -> Interval:
    """The interquartile mean of the differences of runs, ``[tasks, seeds]`` each, by bootstrap."""
    return bootstrap(np.asarray(ours) - np.asarray(other))


def envelope(curves: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """The lowest loss reached by any of several curves up to each step.

    Args:
      curves: (steps ``[points]`` increasing, losses ``[points]``), as many as you like.

    Returns:
      Steps and losses of the running minimum over all.
    """
    steps = np.concatenate([curve[0] for curve in curves])
    losses = np.concatenate([curve[1] for curve in curves])
    losses = np.where(np.isfinite(losses), losses, np.inf)
    order = np.argsort(steps, kind="stable")
    return steps[order], np.minimum.accumulate(losses[order])


def steps_to(loss: float, steps: np.ndarray, losses: np.ndarray) -> float:
    """The steps after which a falling curve reaches ``loss``, by linear interpolation.

    Args:
      steps, losses: ``[points]``, the losses never rising (a running minimum).

    Returns:
      The steps; infinite if it never gets there, or ``loss`` is not a number.
    """
    reached = np.flatnonzero(losses <= loss)
    if not len(reached):
        return float("inf")
    i = int(reached[0])
    if i == 0 or not np.isfinite(losses[i - 1]) or losses[i] == losses[i - 1]:
        return float(steps[i])
    share = (losses[i - 1] - loss) / (losses[i - 1] - losses[i])
    return float(steps[i - 1] + share * (steps[i] - steps[i - 1]))


def speed_up(loss: float, horizon: int, steps: np.ndarray, losses: np.ndarray) -> float:
    """How many times the steps of ``horizon`` Adam needs for ``loss``, 0 if it is not finite.

    Where Adam never gets there (``is_bound``), the longest it ran: a bound from below.

    Args:
      steps, losses: Adam's ``envelope``.
    """
    if not np.isfinite(loss):
        return 0.0
    return min(steps_to(loss, steps, losses), float(steps[-1])) / horizon


def is_bound(loss: float, losses: np.ndarray) -> bool:
    """Whether a speed-up is only a bound, as Adam's ``losses`` end above a finite ``loss``."""
    return bool(np.isfinite(loss) and losses[-1] > loss)


def smoothed(curve: np.ndarray) -> np.ndarray:
    """Means of a tenth of the curve up to each point: single batches are low by luck."""
    width = max(1, len(curve) // 10)
    with np.errstate(invalid="ignore", over="ignore"):
        return np.array([curve[max(0, i - width) : i].mean() for i in range(1, len(curve) + 1)])


def reached_by(step: float, steps: np.ndarray, losses: np.ndarray) -> float:
    """The lowest loss of an ``envelope`` up to a step; the first one where that is before it."""
    return float(losses[max(0, int(np.searchsorted(steps, step, side="right")) - 1)])


def profile(times: np.ndarray, ratios: np.ndarray) -> np.ndarray:
    """The share of tasks on which each optimizer is within a ratio of the fastest one.

    Args:
      times: ``[optimizers, tasks]``, to the target; infinite if it was missed.
      ratios: ``[points]``, from 1.

    Returns:
      ``[optimizers, points]``. A task that none solved counts for none.
    """
    times = np.asarray(times, np.float64)
    best = times.min(axis=0)
    relative = np.divide(
        times, best, out=np.full_like(times, np.inf), where=np.isfinite(times) & (best > 0)
    )
    return (relative[:, :, None] <= ratios).mean(axis=1)


def profile_score(times: np.ndarray) -> np.ndarray:
    """AlgoPerf's score of each optimizer, ``[optimizers]``, between 0 and 1.

    ``1 / (r_max - 1) * integral over r from 1 to r_max of profile(r)``, ``r_max = 4``: each task
    counts ``(r_max - r) / (r_max - 1)`` if it was within ``r_max`` of the fastest.

    Source: Dahl et al. 2023, "Benchmarking Neural Network Training Algorithms", section 4.
    """
    times = np.asarray(times, np.float64)
    best = times.min(axis=0)
    relative = np.divide(
        times, best, out=np.full_like(times, np.inf), where=np.isfinite(times) & (best > 0)
    )
    return (np.clip(MAX_RATIO - relative, 0.0, None) / (MAX_RATIO - 1)).mean(axis=1)
