"""Optimizers and baselines on every task of a suite: sweeps, choices, and the runs reported.

Nothing is chosen on runs that are reported: those of sweeps have other seeds. At the shortest
horizon every setting of a baseline is tried. At the next ones, each of which is several times as
long, those that did best before, the next smaller rate, as the best rate falls with the horizon,
and the default; then the neighbours of the best, until none is better, or, where all that were
tried diverge, every setting.
"""

import gc
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import learned_opt
from launch.choices import to_dict
from launch.evaluation import SEED
from launch.evaluation.aggregates import interquartile_mean, log_loss
from launch.evaluation.baselines import BASELINES, EVALUATED, LISTED, Setting, theta_of
from launch.evaluation.kept import (
    PARTS,
    Arrays,
    decided_by_task,
    digest_of_optimizer,
    digest_of_steps,
    kept,
    software,
)
from launch.evaluation.runs import Runner, Starts
from learned_opt.base import LearnedOptimizer
from learned_opt.pretrained import trained_folder
from meta_train.evaluate import SELECTION_OFFSET
from meta_train.progress import progress
from tasks import SPLITS, Split, TaskConfig

# What a baseline's setting may be: the best of its sweep for each task, the best of the suite for
# all tasks, and the library's default.
TUNED, ONE_RATE, DEFAULT = "tuned per task", "one rate", "default"
COLUMNS = (TUNED, ONE_RATE, DEFAULT)
CHOOSE_BY: dict[str, Split] = {"training": "train", "validation": "validation"}
# Runs of each setting in a sweep, and how many of the best are tried again at the second horizon
# and at later ones, before their neighbours.
SWEEP_SEEDS, KEPT_SETTINGS = 2, (3, 1)


class Contender(NamedTuple):
    """An optimizer that is evaluated as it is.

    Attributes:
      optimizer: the optimizer.
      theta: its meta-parameters.
      decides: of what its steps follow from, as JSON.
      untrained: whether theta is a fresh one.
      outside: whether its code is from outside this package.
    """

    optimizer: LearnedOptimizer
    theta: Any
    decides: dict[str, Any]
    untrained: bool = False
    outside: bool = False


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


def contender(name_or_path: str) -> Contender:
    """A trained optimizer from its folder or by its name in the package, or an untrained one by the
    name of its architecture or ``MODULE:NAME``.

    Raises:
      ValueError: if it is neither.
    """
    path = trained_folder(name_or_path)
    outside = ":" in name_or_path
    if (outside or name_or_path in learned_opt.OPTIMIZERS) and not path.exists():
        from launch import config as cfg

        try:
            config = cfg.optimizer(name_or_path)
            optimizer = config.make()
        except ValueError as error:
            raise ValueError(f"--optimizer={name_or_path}: {error}") from error
        decides = {"untrained": to_dict(config), "version": learned_opt.__version__}
        return Contender(optimizer, optimizer.init(jax.random.key(0)), decides, True, outside)
    if not path.is_dir():
        raise ValueError(
            f"--optimizer must be a folder of a trained optimizer, or one of "
            f"{', '.join(learned_opt.OPTIMIZERS)} for an untrained one, got {name_or_path!r}."
        )
    outside = ":" in learned_opt.load_config(path)["name"]
    return Contender(
        *learned_opt.load(path), {"weights": digest_of_optimizer(path)}, False, outside
    )


class _Ground:
    """A task of the suite with all that was compiled for it."""

    def __init__(self, name: str, config: TaskConfig, data_dir: str | None, num_seeds: int):
        self.name, self.starts = name, Starts(config.make(data_dir))
        if self.starts.task.score is None or self.starts.task.constant_loss is None:
            raise ValueError(
                f"the task {name!r} of a suite must have a `score` and a `constant_loss`, got "
                "none; add them to it, or evaluate on it alone with --cfg.task."
            )
        self.keys = self.starts.keys(SEED, num_seeds)
        starts = jax.eval_shape(self.starts.begin, self.keys)
        scores = jax.eval_shape(lambda of, run: self.starts.score(run, of, "test"), *starts)
        if not isinstance(scores, dict) or "loss" not in scores:
            words = ", ".join(sorted(scores)) if isinstance(scores, dict) else repr(scores)
            raise ValueError(
                f"`score` of the task {name!r} must return a dict with its `loss`, by which a "
                f"suite judges, got {words or 'nothing'}; add it."
            )
        self.facts = decided_by_task(to_dict(config), self.starts.task)


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
        self._runners: dict[tuple[str, str], Runner] = {}  # The last one asked for is the last.
        self._lock = threading.Lock()
        self._grounds = [_Ground(n, c, data_dir, num_seeds) for n, c in tasks.items()]
        # Runs that one program advances together, of baselines and others alike.
        self._width = max(num_seeds, LEAST_WIDTH)
        # Compiling quickly pays where there are few steps.
        self._quick = self._horizons[-1] <= QUICK_UP_TO
        self._shared = {"quick": self._quick, **software()}

    def run(self) -> list[Entry]:
        """Everything, from what is kept where it is."""
        entries: list[Entry] = []
        candidates = {
            (ground.name, name): baseline.settings
            for ground in self._grounds
            for name, baseline in self._baselines.items()
        }
        pairs = [(g, name) for g in self._grounds for name in self._baselines]
        alone = [(g, name) for g in self._grounds for name in self._contenders]
        total = len(self._horizons) * (len(pairs) + len(alone))
        with progress(total=total, desc="evaluation") as bar:
            for stage, horizon in enumerate(self._horizons):
                swept, ranked = self._swept(pairs, candidates, horizon, bar)
                chosen = {}
                for where, losses in swept.items():
                    best = min(losses, key=lambda s: float(np.mean(losses[s])))
                    default = self._baselines[where[1]].untuned
                    chosen[where] = (best, ranked[where[1]][0], default)
                reports = [
                    lambda g=g, n=n: self._report(g, n, chosen[g.name, n], horizon)  # noqa: B023
                    for g, n in pairs
                ]
                reports += [
                    lambda g=g, n=n: self._report(g, n, (), horizon)  # noqa: B023
                    for g, n in alone
                ]
                entries += [entry for found in _all(reports, bar.update) for entry in found]
                keep = KEPT_SETTINGS[min(stage, len(KEPT_SETTINGS) - 1)]
                for where, losses in swept.items():
                    order = sorted(losses, key=lambda s: float(np.mean(losses[s])))
                    both = (*survivors(order, keep), *survivors(ranked[where[1]], keep))
                    default = self._baselines[where[1]].untuned
                    candidates[where] = tuple(dict.fromkeys([*both, default]))
        return entries

    def _swept(
        self, pairs: Sequence[tuple[_Ground, str]], candidates: dict, horizon: int, bar: Any
    ) -> tuple[dict[tuple[str, str], dict[Setting, np.ndarray]], dict[str, list[Setting]]]:
        """The losses of all settings tried on each task, and those that all tasks tried, ranked.

        Args:
          candidates: (task, baseline) -> the settings to begin with.
        """
        swept: dict[tuple[str, str], dict[Setting, np.ndarray]] = {
            (g.name, name): {} for g, name in pairs
        }
        wanted = dict(candidates)
        while True:
            new = {
                (g, n): settings
                for g, n in pairs
                if (settings := tuple(s for s in wanted[g.name, n] if s not in swept[g.name, n]))
            }
            bar.total += len(new)
            jobs = [partial(self._sweep, g, n, new[g, n], horizon) for g, n in new]
            for (g, n), losses in zip(new, _all(jobs, bar.update), strict=True):
                swept[g.name, n] |= losses
            ranked = {
                name: rank_for_suite({g.name: swept[g.name, name] for g in self._grounds})
                for name in self._baselines
            }
            if not new:
                return swept, ranked
            wanted = {}
            for (task, name), losses in swept.items():
                baseline, best = self._baselines[name], min(losses, key=lambda s: losses[s].mean())
                near = (*baseline.beside(best), *baseline.beside(ranked[name][0]))
                # Beside what diverges all may: there is no slope to follow.
                wanted[task, name] = baseline.settings if losses[best].mean() >= WORST else near

    def _runner(self, ground: _Ground, name: str) -> Runner:
        """What runs an optimizer on a task; of those asked for long ago it is made again."""
        key = (ground.name, name)
        with self._lock:
            runner = self._runners.pop(key, None) or self._make_runner(ground, name)
            if len(self._runners) >= MOST_RUNNERS:
                for old in list(self._runners)[: MOST_RUNNERS // 2]:
                    del self._runners[old]
                gc.collect()
            self._runners[key] = runner
            return runner

    def _make_runner(self, ground: _Ground, name: str) -> Runner:
        if name in self._contenders:
            found = self._contenders[name].optimizer
            return Runner(ground.starts, found, self._num_seeds, shared=True, quick=self._quick)
        baseline = self._baselines[name]
        return Runner(
            ground.starts,
            baseline.optimizer(),
            self._width,
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

    def _sweep(
        self, ground: _Ground, name: str, settings: Sequence[Setting], horizon: int
    ) -> dict[Setting, np.ndarray]:
        """``log_loss`` of each setting, ``[SWEEP_SEEDS]``, by what is chosen by."""

        def compute() -> Arrays:
            keys = ground.starts.keys(SEED + SELECTION_OFFSET, SWEEP_SEEDS)
            split = CHOOSE_BY[self._choose_by]
            runs = self._runner(ground, name)(*_grid(settings, keys), horizon, (split,))
            losses = runs.scores[split]["loss"]
            constant = np.asarray(ground.starts.constant(keys))
            shape = (len(settings), SWEEP_SEEDS)
            return {"log_loss": log_loss(losses.reshape(shape), np.broadcast_to(constant, shape))}

        decides = self._decides(ground, name, horizon) | {
            "sweep": settings,
            "seed": SEED + SELECTION_OFFSET,
            "seeds": SWEEP_SEEDS,
            "by": self._choose_by,
        }
        found = kept(self._folder, decides, compute)["log_loss"]
        return dict(zip(settings, found, strict=True))

    def _report(
        self, ground: _Ground, name: str, chosen: Sequence[Setting], horizon: int
    ) -> list[Entry]:
        """The runs that are reported, of each chosen setting, or of an optimizer as it is."""
        settings = tuple(dict.fromkeys(chosen))
        shape = (max(1, len(settings)), self._num_seeds)

        def compute() -> Arrays:
            runner, keys = self._runner(ground, name), ground.keys
            if settings:
                runs = runner(*_grid(settings, keys), horizon)
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


# Programs of a runner take hundreds of the 65,530 mappings of memory that Linux gives a process;
# those that are made again are read from where compiled programs are kept.
MOST_RUNNERS = 48
# Steps of the longest horizon up to which programs are compiled in haste.
QUICK_UP_TO = 200
LEAST_WIDTH = 5
# A little below the log-loss of a run that diverged.
WORST = log_loss(np.array(np.inf), np.array(1.0)) - 1e-6


def _grid(settings: Sequence[Setting], keys: jax.Array) -> tuple[Any, jax.Array]:
    """Theta and keys of every setting with every key, the keys varying faster."""
    thetas = [theta_of(s) for s in settings for _ in range(len(keys))]
    stacked = jax.tree.map(lambda *x: jnp.asarray(np.stack(x)), *thetas)
    return stacked, jnp.tile(keys, len(settings))


def rank_for_suite(losses: dict[str, dict[Setting, np.ndarray]]) -> list[Setting]:
    """Settings that all tasks tried, the best first by the interquartile mean over all runs."""
    first, *others = losses.values()
    common = [s for s in first if all(s in found for found in others)]
    return sorted(
        common, key=lambda s: interquartile_mean(np.stack([x[s] for x in losses.values()]))
    )


def survivors(ranked: Sequence[Setting], keep: int) -> tuple[Setting, ...]:
    """What of settings, the best first, is tried at a longer horizon.

    The ``keep`` best, and beside the best the next smaller value under its schedule; a list has
    none.
    """
    best = ranked[0]
    smaller = [s for s in ranked if s.schedule == best.schedule != LISTED and s.value < best.value]
    beside = [max(smaller)] if smaller else []
    return tuple(dict.fromkeys([*ranked[:keep], *beside]))


def _all(jobs: Sequence[Callable[[], Any]], done: Callable[[], Any]) -> list[Any]:
    """The results of all jobs, as many at once as this process has cores."""
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        futures = [pool.submit(job) for job in jobs]
        try:
            results = []
            for future in futures:
                results.append(future.result())
                done()
            return results
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
