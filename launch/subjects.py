"""What theta is: a learned optimizer, or the weights of a network."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from launch import config as cfg
from learned_opt import weights
from meta_train import evaluate, strict_json
from meta_train.supervised import supervised_training
from meta_train.unroll import UnrolledSystem
from tasks import Task


class Subject(NamedTuple):
    """What a job trains.

    Attributes:
      name: what theta is, and the folder of the job it is exported to.
      init: ``key -> theta``.
      system: the unrolled system whose theta it is.
      evaluate: ``theta -> {"eval/...": scalar}``, jittable.
      export: ``(folder, theta, step) -> None``.
    """

    name: str
    init: Callable[[jax.Array], Any]
    system: UnrolledSystem
    evaluate: Callable[[Any], dict[str, jax.Array]]
    export: Callable[[Path, Any, int], None]


def optimizer_subject(config: cfg.Config, task: Task) -> Subject:
    """Meta-training: theta is a learned optimizer's."""
    optimizer = cfg.make_optimizer(config.optimizer)

    def evaluation(theta):
        losses = evaluate.inner_curves(
            task, optimizer, theta, config.inner.horizon, config.eval_seeds, config.seed
        )
        tail = losses[:, -max(1, config.inner.horizon // 10) :]
        return {"eval/mean_loss": losses.mean(), "eval/final_loss": tail.mean()}

    def export(path, theta, step):
        """A trained optimizer for ``learned_opt.load``."""
        weights.save(
            path,
            config.optimizer.name,
            cfg.optimizer_arguments(config.optimizer),
            jax.tree.map(np.asarray, theta),
            training=_training(config, step),
        )

    system = cfg.make_system(config, task, optimizer)
    return Subject("optimizer", optimizer.init, system, evaluation, export)


def network_subject(config: cfg.Config, task: Task) -> Subject:
    """Supervised training: theta are the parameters of the task's own network."""
    instance = task.sample(jax.random.key(config.seed))

    def loss(params, key):
        return task.loss(params, instance, task.batch(instance, key, "train"), key)

    def evaluation(params):
        scores = {}
        for split in ("train", "validation"):
            if task.score is not None:
                found = task.score(params, instance, split)
            else:
                keys = jax.random.split(jax.random.key(config.seed), config.eval_seeds)
                batches = jax.vmap(lambda k, s=split: task.batch(instance, k, s))(keys)
                losses = jax.vmap(task.loss, (None, None, 0, 0))(params, instance, batches, keys)
                found = {"loss": jnp.mean(losses)}
            scores |= {f"eval/{split}_{name}": value for name, value in found.items()}
        return scores

    def export(path, params, step):
        """Arrays by their path in the parameters, and a JSON description."""
        path.mkdir(parents=True, exist_ok=True)
        leaves = jax.tree_util.tree_leaves_with_path(params)
        arrays = {
            jax.tree_util.keystr(where, simple=True, separator="/"): np.asarray(leaf)
            for where, leaf in leaves
        }
        scores = jax.device_get(jax.jit(evaluation)(params))
        document = {
            "training": _training(config, step),
            "scores": {name.removeprefix("eval/"): float(x) for name, x in scores.items()},
            "unit_of_losses": task.unit,
        }
        save_file(arrays, path / "weights.safetensors.tmp")
        os.replace(path / "weights.safetensors.tmp", path / "weights.safetensors")
        (path / "config.json.tmp").write_text(strict_json.dumps(document, indent=2) + "\n")
        os.replace(path / "config.json.tmp", path / "config.json")

    def init(key):
        return task.init(instance, key)

    return Subject("network", init, supervised_training(loss), evaluation, export)


SUBJECTS: dict[str, Callable[[cfg.Config, Task], Subject]] = {
    "optimizer": optimizer_subject,
    "network": network_subject,
}


def _training(config: cfg.Config, step: int) -> dict[str, Any]:
    """How theta came about, for the model card."""
    return {
        "task": cfg.task_facts(config.task),
        "horizon": config.inner.horizon,
        "meta_loss": config.inner.meta_loss,
        "estimator": config.estimator.name,
        "num_particles": config.estimator.num_particles,
        "truncation": config.estimator.truncation,
        "sigma": config.estimator.sigma,
        "outer_steps": step,
        "inner_steps": step * cfg.inner_steps_per_outer_step(config),
        "seed": config.seed,
    }
