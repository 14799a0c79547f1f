"""Which settings of a baseline are tried on the tasks of a suite, and with how many seeds.

Every setting that is tried is tried with one seed first. The best by that get the other seeds too,
and so do the neighbours of what is then best, of each task and for the suite. What is chosen is
chosen among those that have all seeds: seeds differ in how hard they are, so means over other seeds
say nothing.

At the shortest horizon every setting is tried. At the next ones, each of which is several times as
long, those that did best before, the next smaller rate, as the best rate falls with the horizon,
and the default; then the neighbours of the best, until none is better, or, where all that were
tried diverge, every setting.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from launch.evaluation.aggregates import interquartile_mean, log_loss
from launch.evaluation.baselines import LISTED, Baseline, Setting
from meta_train.inner import FLOOR


class Effort(NamedTuple):
    """What a sweep spends.

    Attributes:
      seeds: runs of what is chosen.
      best: how many of the best by the first seed get all of them.
      kept: how many of the best are tried again at the next horizon, before their neighbours.
    """

    seeds: int
    best: int
    kept: int


# At the first horizon, the second, and later ones. The longer the run, the less seeds differ, and
# the more they cost.
EFFORTS = (Effort(3, 5, 2), Effort(3, 2, 1), Effort(2, 1, 1))
MOST_SEEDS = max(effort.seeds for effort in EFFORTS)
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


def ranked(found: Sequence[Losses], seeds: int) -> list[Setting]:
    """Settings that have these seeds on every task, the best first.

    By the mean over the seeds, and of that the interquartile mean over the tasks.
    """
    first, *others = found
    full = [s for s in first if all(len(losses.get(s, ())) >= seeds for losses in (first, *others))]
    means = {s: np.array([np.mean(losses[s][:seeds]) for losses in found]) for s in full}
    return sorted(full, key=lambda s: interquartile_mean(means[s]))


def first_runs(
    baseline: Baseline, before: Sequence[Setting], before_for_suite: Sequence[Setting], kept: int
) -> list[Run]:
    """What a horizon begins with on a task.

    Args:
      before: the settings ranked at the horizon before on the task; none at the first.
      before_for_suite: those ranked there for all tasks.
      kept: how many of the best are tried again.
    """
    if not before:
        return [(s, 0) for s in baseline.settings]
    both = (*survivors(before, kept), *survivors(before_for_suite, kept))
    return [(s, 0) for s in dict.fromkeys([*both, baseline.untuned])]


def promising(baseline: Baseline, found: Sequence[Losses], effort: Effort) -> list[Setting]:
    """What is to have all seeds: the best by the first one, and the best and its neighbours."""
    ahead = ranked(found, effort.seeds)[:1]
    beside = [s for best in ahead for s in baseline.beside(best)]
    return list(dict.fromkeys([*ahead, *ranked(found, 1)[: effort.best], *beside]))


def next_runs(
    baseline: Baseline, found: Losses, for_suite: Sequence[Setting], effort: Effort
) -> list[Run]:
    """What is to be tried next on a task, the most urgent first; nothing if that was all.

    Args:
      found: what was tried on it.
      for_suite: what is ``promising`` for all tasks.
    """
    settings = list(dict.fromkeys([*promising(baseline, [found], effort), *for_suite]))
    runs = [(s, i) for s in settings for i in range(len(found.get(s, ())), effort.seeds)]
    if min(losses[0] for losses in found.values()) >= WORST:
        # Beside what diverges all may: there is no slope to follow.
        runs += [(s, 0) for s in baseline.settings if s not in (found.keys() | set(settings))]
    return runs


def spare_runs(baseline: Baseline, found: Losses, effort: Effort) -> list[Run]:
    """What fills up populations, which cost the same when they are not full: what may be next.

    Of the settings tried on a task, the best by the first seed ahead: their neighbours, then their
    other seeds.
    """
    runs: list[Run] = []
    for s in ranked([found], 1):
        runs += [(other, 0) for other in baseline.beside(s) if other not in found]
        runs += [(s, i) for i in range(len(found[s]), effort.seeds)]
    return runs


def survivors(ordered: Sequence[Setting], keep: int) -> tuple[Setting, ...]:
    """What of settings, the best first, is tried at a longer horizon.

    The ``keep`` best, and beside the best the next smaller value under its schedule; a list has
    none.
    """
    best = ordered[0]
    smaller = [s for s in ordered if s.schedule == best.schedule != LISTED and s.value < best.value]
    beside = [max(smaller)] if smaller else []
    return tuple(dict.fromkeys([*ordered[:keep], *beside]))
