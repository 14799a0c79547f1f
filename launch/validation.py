"""Theta on a suite of tasks during meta-training, and the best theta kept beside the last."""

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from launch.config import Config
from launch.evaluation import SEED
from launch.evaluation.runs import Starts
from launch.suites import suite
from meta_train import evaluate
from meta_train.inner import log_share
from meta_train.pool import Pool

METRIC = "eval/validation"
# Neither what evaluations report nor what they choose settings by.
SEED_OFFSET = 2


def validation(config: Config, data_dir: str | None) -> Callable[[Any], dict[str, jax.Array]]:
    """``theta -> {"eval/validation": mean over tasks, "eval/validation/TASK": ...}``.

    Of each task of the suite ``config.validation``, at its shortest horizon, the mean over
    ``config.eval_seeds`` runs of ``aggregates.log_loss`` of the last tenth of the steps; nothing
    without a suite. Where theta is trained on held-back batches (``meta_loss`` is ``validation`` or
    ``both``), the mean of that and of the same of the validation split after the last step.
    Compiled on first use, one program a task: all in one take longer.

    Raises:
      ValueError: if there is no such suite, or a task has no constant predictor's loss, or no score
        where held-back batches count.
    """
    if not config.validation:
        return lambda theta: {}
    found = suite(config.validation)
    tasks = {name: task.make(data_dir) for name, task in found.tasks.items()}
    optimizer, horizon = config.optimizer.make(), found.horizons[0]
    size = {"num_steps": horizon, "num_seeds": config.eval_seeds, "seed": SEED + SEED_OFFSET}
    held_back = config.inner.meta_loss in ("validation", "both")

    programs = Pool()

    def log_loss(name, theta):
        losses, scores = evaluate.inner_runs(
            tasks[name], optimizer, theta, **size, split="validation"
        )
        finals = [losses[:, -max(1, horizon // 10) :].mean(axis=1)]
        finals += [scores["loss"]] if held_back else []
        starts = Starts(tasks[name])
        constants = starts.constant(starts.keys(size["seed"], config.eval_seeds))
        return jnp.mean(jnp.stack([log_share(final, constants) for final in finals]))

    for name, task in tasks.items():
        if task.constant_loss is None:
            raise ValueError(
                f"--cfg.validation={config.validation}: the task {name!r} must have a "
                "`constant_loss`, got none; choose another suite."
            )
        if held_back and task.score is None:
            raise ValueError(
                f"--cfg.validation={config.validation}: the task {name!r} must have a `score` for "
                f"--cfg.inner.meta_loss={config.inner.meta_loss}, got none; choose another suite."
            )

    def measure(theta):
        of = {
            f"{METRIC}/{name}": programs.get(name, partial(jax.jit, partial(log_loss, name)))(theta)
            for name in tasks
        }
        return of | {METRIC: jnp.mean(jnp.stack(list(of.values())))}

    return measure


class Best:
    """The theta with the lowest ``eval/validation`` so far, exported when it is found.

    Attributes:
      loss: its ``eval/validation``; None if there is none yet. Checkpoints have it, so a job that
        continues keeps the same theta as one that never stopped.
    """

    def __init__(self, export: Callable[[Path, np.ndarray, int], None], folder: Path, loss: Any):
        """Args:
        export: ``(folder, theta, step) -> None``.
        folder: where to.
        loss: from the checkpoint, None at the beginning.
        """
        self._export, self._folder, self.loss = export, folder, loss

    def offer(self, step: int, theta: Any, metrics: dict[str, Any]) -> None:
        """Keeps theta, a vector, if it is the best; of equals the first."""
        if METRIC not in metrics:
            return
        loss, theta = float(metrics[METRIC]), np.asarray(theta)
        finite = np.isfinite(loss) and np.all(np.isfinite(theta))
        if finite and (self.loss is None or loss < self.loss):
            try:
                self._export(self._folder, theta, step)
            except OSError as error:
                print(
                    f"warning: the best theta so far, of outer step {step}, could not be written "
                    f"({error.strerror}); training goes on, and the next better one is tried.",
                    file=sys.stderr,
                )
            else:
                self.loss = loss
