"""Which settings of a baseline are tried on the tasks of a suite, and with how many seeds.

Every setting that is tried is tried with one seed first. The best by that get the other seeds too,
and so do the neighbours of what is then best, of each task and for the suite. What is chosen is
chosen among those that have all seeds: seeds differ in how hard they are, so means over other seeds
say nothing.

At the shortest horizon every setting is tried. At the next ones, each of which is several times as
long, those that did best before, the best under each schedule, the next smaller rate, as the best
rate falls with the horizon, and the default; then the neighbours of the best under each schedule
(the best rate under a cosine is several steps above the best constant one), until none is better,
and what did better for some tasks on the others; or, where all that were tried diverge, every
setting. A list has no neighbours, so of a list all are tried.
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


# At the first horizon, the second, and later ones: the longer the run, the more a seed costs.
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


def leaders(found: Sequence[Losses]) -> list[Setting]:
    """The best under each schedule by the first seed on all of these tasks, the best first."""
    best: dict[str, Setting] = {}
    for setting in ranked(found, 1):
        best.setdefault(setting.schedule, setting)
    return list(best.values())


def first_runs(
    baseline: Baseline, before: Sequence[Losses], task: Losses, effort: Effort
) -> list[Run]:
    """What a horizon begins with on a task.

    Args:
      before: what was found at the horizon before on all tasks; nothing at the first.
      task: what was found there on this one.
      effort: of the horizon before.
    """
    if not before or LISTED in baseline.schedules:
        return [(s, 0) for s in baseline.settings]
    both = (*survivors([task], effort), *survivors(before, effort))
    return [(s, 0) for s in dict.fromkeys([*both, baseline.untuned])]


def promising(baseline: Baseline, found: Sequence[Losses], effort: Effort) -> list[Setting]:
    """What is to have all seeds: the best by the first one, and the best and its neighbours."""
    ahead = ranked(found, effort.seeds)[:1]
    beside = [s for best in ahead for s in baseline.beside(best)]
    return list(dict.fromkeys([*ahead, *ranked(found, 1)[: effort.best], *beside]))


def unexplored(baseline: Baseline, found: Sequence[Losses]) -> list[Setting]:
    """What is to be tried with one seed, on these tasks.

    What is beside the best under each schedule; and what was tried on half of the tasks, and by the
    first seed did better there than what is best of all that was tried on all of them.
    """
    settings = [other for best in leaders(found) for other in baseline.beside(best)]
    everywhere = ranked(found, 1)  # Of all tasks it may be nothing yet.
    for setting in dict.fromkeys(s for losses in found for s in losses if s not in everywhere):
        gaps = [of[setting][0] - of[s][0] for s in everywhere[:1] for of in found if setting in of]
        if 2 * len(gaps) >= len(found) and interquartile_mean(np.array(gaps)) < 0:
            settings.append(setting)
    return settings


def next_runs(
    baseline: Baseline,
    found: Losses,
    for_suite: Sequence[Setting],
    once_for_suite: Sequence[Setting],
    effort: Effort,
) -> list[Run]:
    """What is to be tried next on a task, the most urgent first; nothing if that was all.

    Args:
      found: what was tried on it.
      for_suite: what is ``promising`` for all tasks.
      once_for_suite: what is ``unexplored`` on all tasks.
    """
    settings = list(dict.fromkeys([*promising(baseline, [found], effort), *for_suite]))
    runs = [(s, i) for s in settings for i in range(len(found.get(s, ())), effort.seeds)]
    once = list(dict.fromkeys([*unexplored(baseline, [found]), *once_for_suite]))
    if min(losses[0] for losses in found.values()) >= WORST:
        # Beside what diverges all may: there is no slope to follow.
        once = list(baseline.settings)
    return runs + [(s, 0) for s in once if s not in found and s not in settings]


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


def survivors(found: Sequence[Losses], effort: Effort) -> list[Setting]:
    """What is tried at a longer horizon of what was found at one with this effort.

    The best that have all seeds, the next smaller value beside the very best, and the best under
    each schedule.
    """
    kept = ranked(found, effort.seeds)[: effort.kept]
    best, tried = kept[0], ranked(found, 1)
    smaller = [s for s in tried if s.schedule == best.schedule and s.value < best.value]
    return list(dict.fromkeys([*kept, *([max(smaller)] if smaller else []), *leaders(found)]))
