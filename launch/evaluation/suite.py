"""Optimizers and baselines on every task of a suite: sweeps, choices, and the runs reported.

Nothing is chosen on runs that are reported: those of sweeps have other seeds.
"""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from launch.choices import to_dict
from launch.evaluation import SEED
from launch.evaluation.aggregates import log_loss
from launch.evaluation.baselines import BASELINES, EVALUATED, Setting, theta_of
from launch.evaluation.contenders import Contender
from launch.evaluation.kept import PARTS, Arrays, decided_by_task, digest_of_steps, kept, software
from launch.evaluation.runs import Runner, Starts, check_runs, check_scores
from launch.evaluation.sweep import (
    EFFORTS,
    MOST_SEEDS,
    Effort,
    Losses,
    Run,
    first_runs,
    judged,
    next_runs,
    promising,
    ranked,
    spare_runs,
    unexplored,
)
from learned_opt import learnable_sgdm
from meta_train.evaluate import SELECTION_OFFSET
from meta_train.pool import Pool
from meta_train.progress import progress
from tasks import SPLITS, Split, TaskConfig

# What a baseline's setting may be: the best of its sweep for each task, the best of the suite for
# all tasks, and the library's default.
TUNED, ONE_RATE, DEFAULT = "tuned per task", "one rate", "default"
COLUMNS = (TUNED, ONE_RATE, DEFAULT)
CHOOSE_BY: dict[str, Split] = {"training": "train", "validation": "validation"}


class Entry(NamedTuple):
    """Runs of one optimizer on one task at one horizon.

    Attributes:
      task, optimizer: names.
      column: one of ``COLUMNS``; empty for an optimizer that has no rate to choose.
      setting: the baseline's; None without one.
      horizon: steps.
      curve: ``[seeds, points]``, of the training batches' losses; see ``runs.part_edges``.
      final: ``[seeds]``, mean of the last tenth of the steps.
      scores: split -> name -> ``[seeds]``, after the last step.
      constant: ``[seeds]``, loss of the constant predictor.
      seconds: of a step of a run, in a population.
      state_bytes: of the optimizer's state of one run.
      edge: whether the setting was chosen at the edge of its sweep.
    """

    task: str
    optimizer: str
    column: str
    setting: Setting | None
    horizon: int
    curve: np.ndarray
    final: np.ndarray
    scores: dict[str, dict[str, np.ndarray]]
    constant: np.ndarray
    seconds: float
    state_bytes: int
    edge: bool = False

    @property
    def label(self) -> str:
        """The optimizer and how its setting was chosen."""
        return f"{self.optimizer} ({self.column})" if self.column else self.optimizer

    def log_loss(self, split: str) -> np.ndarray:
        """``aggregates.log_loss`` of each run, ``[seeds]``."""
        return log_loss(self.scores[split]["loss"], self.constant)


class _Ground:
    """A task of the suite with all that was compiled for it."""

    def __init__(self, name: str, config: TaskConfig, data_dir: str | None, num_seeds: int):
        self.name, self.starts = name, Starts(config.make(data_dir))
        if self.starts.task.score is None or self.starts.task.constant_loss is None:
            raise ValueError(
                f"the task {name!r} of a suite must have a `score` and a `constant_loss`, got "
                "none; add them to it, or evaluate on it alone with --cfg.task."
            )
        check_runs(f"the task {name!r}", self.starts.task, learnable_sgdm())
        self.keys = self.starts.keys(SEED, num_seeds)
        check_scores(f"the task {name!r}", self.starts)
        self.facts = decided_by_task(to_dict(config), self.starts.task)
        self._seconds: dict[str, float] = {}

    def took(self, name: str, seconds: float) -> None:
        """Of a step of a run with that optimizer, as measured last."""
        self._seconds[name] = seconds

    def expects(self, name: str) -> float:
        """Seconds of a step; of an optimizer that has not run yet as of the slowest that has."""
        return self._seconds.get(name, max(self._seconds.values(), default=0.0))


class SuiteEvaluation:
    """The evaluation of ``contenders`` and baselines on ``tasks``; ``run`` does it."""

    def __init__(
        self,
        tasks: dict[str, TaskConfig],
        contenders: dict[str, Contender],
        horizons: Sequence[int],
        num_seeds: int,
        workdir: Path,
        *,
        data_dir: str | None = None,
        choose_by: str = "training",
        baselines: Sequence[str] = tuple(BASELINES),
    ):
        """Args:
          tasks, contenders: by name.
          horizons: inner steps, in increasing order.
          num_seeds: runs that are reported of each.
          workdir: keeps each result in ``evaluation.parts``.
          data_dir: where the tasks' data lie.
          choose_by: the split by whose loss after the last step settings are chosen: ``training``
            or ``validation``.
          baselines: which of ``BASELINES``.

        Raises:
          ValueError: if a task lacks what a suite needs, or an optimizer has a baseline's name.
        """
        if taken := sorted(set(contenders) & set(BASELINES)):
            raise ValueError(
                f"`contenders` must not be called as baselines are, got {', '.join(taken)}; give "
                "them other names."
            )
        self._horizons, self._num_seeds = sorted(horizons), num_seeds
        self._contenders, self._choose_by = contenders, choose_by
        self._baselines = {name: BASELINES[name] for name in baselines}
        self._folder = workdir / PARTS
        self._pool = Pool()
        self._grounds = [_Ground(n, c, data_dir, num_seeds) for n, c in tasks.items()]
        for name, one in contenders.items():
            if one.outside:
                for ground in self._grounds:
                    of = f"the optimizer {name!r} on the task {ground.name!r}"
                    check_runs(of, ground.starts.task, one.optimizer)
        # Compiling quickly pays where there are few steps.
        self._quick = self._horizons[-1] <= QUICK_UP_TO
        self._shared = {"quick": self._quick, **software()}

    def run(self) -> list[Entry]:
        """Everything, from what is kept where it is."""
        entries: list[Entry] = []
        pairs = [(g, name) for g in self._grounds for name in self._baselines]
        alone = [(g, name) for g in self._grounds for name in self._contenders]
        firsts = {(g.name, n): first_runs(self._baselines[n], (), {}, EFFORTS[0]) for g, n in pairs}
        total = len(self._horizons) * (len(pairs) + len(alone))
        with progress(total=total, desc="evaluation") as bar:
            for stage, horizon in enumerate(self._horizons):
                effort = EFFORTS[min(stage, len(EFFORTS) - 1)]
                swept = self._swept(pairs, firsts, horizon, effort, bar)
                of_all = {n: [swept[g.name, n] for g in self._grounds] for n in self._baselines}
                asked: list[tuple[_Ground, str, tuple[Setting, ...]]] = []
                for g, n in pairs:
                    best = [ranked(of, effort.seeds)[0] for of in ([swept[g.name, n]], of_all[n])]
                    asked.append((g, n, (*best, self._baselines[n].untuned)))
                asked += [(g, n, ()) for g, n in alone]
                jobs = [
                    _Job(
                        g.expects(n) * max(1, len(set(x))), partial(self._report, g, n, x, horizon)
                    )
                    for g, n, x in asked
                ]
                entries += [entry for found in _all(jobs, bar.update) for entry in found]
                firsts = {
                    (task, n): first_runs(self._baselines[n], of_all[n], found, effort)
                    for (task, n), found in swept.items()
                }
        return entries

    def _swept(
        self,
        pairs: Sequence[tuple[_Ground, str]],
        firsts: dict[tuple[str, str], list[Run]],
        horizon: int,
        effort: Effort,
        bar: Any,
    ) -> dict[tuple[str, str], Losses]:
        """(task, baseline) -> what its settings came to.

        Args:
          firsts: (task, baseline) -> the runs to begin with.
        """
        swept: dict[tuple[str, str], Losses] = {(g.name, n): {} for g, n in pairs}
        for_suite: dict[str, list[Setting]] = {}
        once: dict[str, list[Setting]] = {}
        while True:
            runs: dict[tuple[str, str], tuple[Run, ...]] = {}
            jobs = []
            for g, n in pairs:
                baseline, first, found = self._baselines[n], firsts[g.name, n], swept[g.name, n]
                wanted = [run for run in first if run[0] not in found]
                if found:
                    wanted += next_runs(baseline, found, for_suite[n], once[n], effort)
                else:
                    wanted += [(s, 0) for s in baseline.beside(first[0][0])]
                wanted = list(dict.fromkeys(wanted))
                # Whole populations: what would be left of the last is for what may be wanted next.
                if wanted:
                    populations = min(max(1, len(first) // WIDTH), -(-len(wanted) // WIDTH))
                    spare = spare_runs(baseline, found, effort)
                    some = tuple(dict.fromkeys([*wanted, *spare]))[: WIDTH * populations]
                    runs[g.name, n] = some
                    work = partial(self._sweep, g, n, some, horizon)
                    jobs.append(_Job(g.expects(n) * len(some), work))
            if not runs:
                return swept
            bar.total += len(jobs)
            for where, losses in zip(runs, _all(jobs, bar.update), strict=True):
                for (setting, _), loss in zip(runs[where], losses, strict=True):
                    swept[where].setdefault(setting, []).append(loss)
            for n, baseline in self._baselines.items():
                found_on = [swept[g.name, n] for g in self._grounds]
                for_suite[n] = promising(baseline, found_on, effort)
                once[n] = unexplored(baseline, found_on)

    def _runner(self, ground: _Ground, name: str) -> Runner:
        """What runs an optimizer on a task."""
        return self._pool.get((ground.name, name), partial(self._make_runner, ground, name))

    def _make_runner(self, ground: _Ground, name: str) -> Runner:
        if name in self._contenders:
            found = self._contenders[name].optimizer
            return Runner(ground.starts, found, WIDTH, shared=True, quick=self._quick)
        baseline = self._baselines[name]
        return Runner(
            ground.starts,
            baseline.optimizer(),
            WIDTH,
            evaluated=EVALUATED.get(baseline.builder),
            quick=self._quick,
        )

    def _decides(self, ground: _Ground, name: str, horizon: int) -> dict[str, Any]:
        if name in self._contenders:
            one = self._contenders[name]
            optimizer = one.decides
            if one.outside:
                of = digest_of_steps(ground.starts.task, one.optimizer, one.theta, horizon)
                optimizer = one.decides | {"steps": of}
        else:
            baseline = self._baselines[name]
            optimizer = {"baseline": baseline.builder, "arguments": baseline.arguments}
        return self._shared | ground.facts | {"horizon": horizon} | optimizer

    def _sweep(self, ground: _Ground, name: str, runs: Sequence[Run], horizon: int) -> list[float]:
        """What each run is chosen by."""

        def compute() -> Arrays:
            keys = ground.starts.keys(SEED + SELECTION_OFFSET, MOST_SEEDS)
            keys = keys[np.array([seed for _, seed in runs])]
            split = CHOOSE_BY[self._choose_by]
            thetas = _stacked([setting for setting, _ in runs])
            found = self._runner(ground, name)(thetas, keys, horizon, (split,))
            ground.took(name, found.seconds)
            constant = np.asarray(ground.starts.constant(keys))
            return {"judged": judged(found.scores[split]["loss"], constant)}

        decides = self._decides(ground, name, horizon) | {
            "sweep": runs,
            "seed": SEED + SELECTION_OFFSET,
            "seeds": MOST_SEEDS,
            "by": self._choose_by,
        }
        return kept(self._folder, decides, compute)["judged"].tolist()

    def _report(
        self, ground: _Ground, name: str, chosen: Sequence[Setting], horizon: int
    ) -> list[Entry]:
        """The runs that are reported, of each chosen setting, or of an optimizer as it is."""
        settings = tuple(dict.fromkeys(chosen))
        shape = (max(1, len(settings)), self._num_seeds)

        def compute() -> Arrays:
            runner, keys = self._runner(ground, name), ground.keys
            if settings:
                thetas = _stacked([s for s in settings for _ in range(self._num_seeds)])
                runs = runner(thetas, jnp.tile(keys, len(settings)), horizon)
            else:
                runs = runner(self._contenders[name].theta, keys, horizon)
            arrays = {
                f"{split}/{score}": values.reshape(shape)
                for split, scores in runs.scores.items()
                for score, values in scores.items()
            }
            return arrays | {
                "curve": runs.curve.reshape(*shape, -1),
                "final": runs.final.reshape(shape),
                "constant": np.asarray(ground.starts.constant(keys)),
                "seconds": np.asarray(runs.seconds),
                "state_bytes": np.asarray(runner.state_bytes()),
            }

        decides = self._decides(ground, name, horizon)
        decides |= {"settings": settings, "seed": SEED, "seeds": self._num_seeds}
        found = kept(self._folder, decides, compute)
        ground.took(name, float(found["seconds"]))

        def entry(column: str, setting: Setting | None) -> Entry:
            i = settings.index(setting) if setting else 0
            scores: dict[str, dict[str, np.ndarray]] = {split: {} for split in SPLITS}
            for key in (k for k in found if "/" in k):
                split, _, score = key.partition("/")
                scores[split][score] = found[key][i]
            chosen_by_sweep = setting is not None and column != DEFAULT
            edge = chosen_by_sweep and self._baselines[name].at_edge(setting)  # type: ignore[arg-type]
            return Entry(
                ground.name,
                name,
                column,
                setting,
                horizon,
                found["curve"][i],
                found["final"][i],
                scores,
                found["constant"],
                float(found["seconds"]),
                int(found["state_bytes"]),
                edge,
            )

        if not chosen:
            return [entry("", None)]
        return [entry(column, s) for column, s in zip(COLUMNS, chosen, strict=True)]


# Steps of the longest horizon up to which programs are compiled in haste.
QUICK_UP_TO = 200
# Runs that one program advances together, of baselines and others alike, whatever the seeds: what
# is tuned must not depend on how many are reported.
WIDTH = 5


def _stacked(settings: Sequence[Setting]) -> Any:
    """Theta of each setting, leaves ``[settings]``."""
    return jax.tree.map(lambda *x: jnp.asarray(np.stack(x)), *map(theta_of, settings))


class _Job(NamedTuple):
    """Some work, and how long it takes, in any unit."""

    length: float
    work: Callable[[], Any]


def _all(jobs: Sequence[_Job], done: Callable[[], Any]) -> list[Any]:
    """The results of all jobs, as many at once as this process has cores.

    The long ones begin, so that at the end no core waits long for another.
    """
    order = sorted(range(len(jobs)), key=lambda i: -jobs[i].length)
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        futures = {pool.submit(jobs[i].work): i for i in order}
        try:
            results = {}
            for future in as_completed(futures):
                results[futures[future]] = future.result()
                done()
            return [results[i] for i in range(len(jobs))]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
