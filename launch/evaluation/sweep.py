"""Which settings of a baseline are tried on the tasks of a suite, and with how many seeds.

Every setting that is tried is tried with one seed first; the best so far of a task, and the best
for all tasks, get the other seeds too, until what is best has them all. So what is chosen rests on
several runs (on each task), at little more than the cost of one.

At the shortest horizon every setting is tried. At the next ones, each of which is several times as
long, those that did best before, the next smaller rate, as the best rate falls with the horizon,
and the default; then the neighbours of the best, until none is better, or, where all that were
tried diverge, every setting.
"""

from collections.abc import Sequence

import numpy as np

from launch.evaluation.aggregates import interquartile_mean, log_loss
from launch.evaluation.baselines import LISTED, Baseline, Setting
from meta_train.inner import FLOOR

# Runs of what is chosen at the first horizon, the second, and later ones: seeds tell less apart the
# longer the run.
SWEEP_SEEDS = (3, 3, 2)
# A little below the log-loss of a run that diverged.
WORST = float(log_loss(np.array(np.inf), np.array(1.0))) - 1e-6

# A setting and the number of a seed.
Run = tuple[Setting, int]
# What the runs of each setting on a task came to, as ``judged``, in the order of seeds.
Losses = dict[Setting, list[float]]


def judged(loss: np.ndarray, constant: np.ndarray) -> np.ndarray:
    """``log_loss``, which counts a loss below 0 as 0, continued there as a straight line.

    So what is tuned goes on to differ where what is reported cannot.
    """
    loss = np.asarray(loss, np.float64)
    below = np.minimum(np.where(np.isfinite(loss), loss, 0.0) / constant, 0.0)
    return log_loss(loss, constant) + below / FLOOR


def ranked(found: Losses) -> list[Setting]:
    """The best first, by the mean over the runs that there are."""
    return sorted(found, key=lambda s: float(np.mean(found[s])))


def ranked_for_suite(found: Sequence[Losses]) -> list[Setting]:
    """Settings that all tasks tried, the best first by the interquartile mean over the tasks."""
    first, *others = found
    common = [s for s in first if all(s in losses for losses in others)]
    means = {s: np.array([np.mean(losses[s]) for losses in found]) for s in common}
    return sorted(common, key=lambda s: interquartile_mean(means[s]))


def first_runs(
    baseline: Baseline, before: Losses | None, before_for_suite: Sequence[Setting], keep: int
) -> list[Run]:
    """What a horizon begins with on a task.

    Args:
      before: of the horizon before, None at the first.
      before_for_suite: all that was tried there on every task, the best first.
      keep: how many of the best are tried again.
    """
    if before is None:
        return [(s, 0) for s in baseline.settings]
    both = (*survivors(ranked(before), keep), *survivors(before_for_suite, keep))
    return [(s, 0) for s in dict.fromkeys([*both, baseline.untuned])]


def next_runs(baseline: Baseline, found: Losses, leader: Setting, seeds: int) -> list[Run]:
    """What is to be tried next on a task, the most urgent first; nothing if that was all.

    Args:
      found: what was tried on it, ``leader`` among it.
      leader: the best for all tasks so far.
      seeds: runs that what is chosen must have.
    """
    best = ranked(found)[0]
    runs: list[Run] = []
    for setting in (best, leader):
        runs += [(s, 0) for s in baseline.beside(setting) if s not in found]
        runs += [(setting, i) for i in range(len(found[setting]), seeds)]
    if np.mean(found[best]) >= WORST:  # Beside what diverges all may: there is no slope to follow.
        runs += [(s, 0) for s in baseline.settings if s not in found]
    return list(dict.fromkeys(runs))


def survivors(ordered: Sequence[Setting], keep: int) -> tuple[Setting, ...]:
    """What of settings, the best first, is tried at a longer horizon.

    The ``keep`` best, and beside the best the next smaller value under its schedule; a list has
    none.
    """
    best = ordered[0]
    smaller = [s for s in ordered if s.schedule == best.schedule != LISTED and s.value < best.value]
    beside = [max(smaller)] if smaller else []
    return tuple(dict.fromkeys([*ordered[:keep], *beside]))
