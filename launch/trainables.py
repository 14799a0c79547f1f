"""What theta is: a learned optimizer, the weights of a network, or a policy."""

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from launch import leaves
from launch.choices import to_dict
from launch.config import Config, task_names
from launch.provenance import provenance
from learned_opt import LearnedOptimizer, weights
from learned_opt.base import WITHOUT_PART_IN_THETA
from meta_train import evaluate, strict_json
from meta_train.estimators import telescoped
from meta_train.inner import inner_training
from meta_train.pool import Pool
from meta_train.reversible.inner import reversible_inner_training
from meta_train.supervised import supervised_training
from meta_train.unroll import UnrolledSystem
from tasks import Task


class Trainable(NamedTuple):
    """What a job trains.

    Attributes:
      name: what theta is, and the folder of the job it is exported to.
      init: ``key -> theta``.
      start: ``() -> theta``, what ``config.init_from`` holds; None without it.
      systems: the unrolled systems whose theta it is, one a task.
      evaluate: ``theta -> {"eval/...": scalar}``, compiled on first use, a program a task.
      export: ``(folder, theta, step) -> None``.
      held: the keys of ``theta["params"]`` that the job leaves as they begin.
    """

    name: str
    init: Callable[[jax.Array], Any]
    start: Callable[[], Any]
    systems: tuple[UnrolledSystem, ...]
    evaluate: Callable[[Any], dict[str, jax.Array]]
    export: Callable[[Path, Any, int], None]
    held: tuple[str, ...] = ()


def trainable_optimizer(config: Config, data_dir: str | None) -> Trainable:
    """Meta-training: theta is a learned optimizer's."""
    made = [task.make(data_dir) for task in config.task.parts]
    tasks = dict(zip(task_names(config.task), made, strict=True))
    optimizer = config.optimizer.make()

    programs = Pool()

    def losses_of(name, theta, seed):
        losses = evaluate.inner_curves(
            tasks[name], optimizer, theta, config.inner.horizon, config.eval_seeds, seed
        )
        return losses.mean(), losses[:, -max(1, config.inner.horizon // 10) :].mean()

    # The seed is an argument, so that jobs of other seeds are the same programs.
    seed = np.uint32(config.seed)

    def evaluation(theta):
        found = {}
        for name in tasks:
            of = f"/{name}" if len(tasks) > 1 else ""
            program = programs.get(name, partial(jax.jit, partial(losses_of, name)))
            found[f"eval/mean_loss{of}"], found[f"eval/final_loss{of}"] = program(theta, seed)
        return found

    before = _began_from(config)

    def export(path, theta, step):
        """A trained optimizer for ``learned_opt.load``."""
        arguments = to_dict(config.optimizer)
        weights.save(
            path,
            arguments.pop("name"),
            arguments,
            jax.tree.map(np.asarray, theta),
            training=_training(config, step) | before,
        )

    def start():
        return start_theta(config)

    systems = tuple(make_system(config, task, optimizer) for task in tasks.values())
    return Trainable(
        "optimizer", optimizer.init, start, systems, evaluation, export, optimizer.held
    )


def make_system(config: Config, task: Task, optimizer: LearnedOptimizer) -> UnrolledSystem:
    """Inner training as an unrolled system, in the form that the estimator needs."""
    inner = config.inner
    shared: dict[str, Any] = {
        "meta_loss": inner.meta_loss,
        "reduction": "mean" if inner.reduction == "telescoped" else inner.reduction,
        "loss_ceiling": inner.loss_ceiling or None,
    }
    if config.estimator.needs_reversible:
        system = reversible_inner_training(task, optimizer, **shared)
    else:
        weight = inner.horizon if inner.equal_runs else None
        system = inner_training(task, optimizer, **shared, scale=inner.scale, run_weight=weight)
    if inner.reduction == "telescoped":
        return telescoped(system, config.horizons())
    return system


def trainable_network(config: Config, data_dir: str | None) -> Trainable:
    """Supervised training: theta are the parameters of the task's own network."""
    task = config.task.make(data_dir)
    instance = task.sample(jax.random.key(config.seed))

    def loss(params, key):
        return task.loss(params, instance, task.batch(instance, key, "train"), key)

    @jax.jit
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
        scores = jax.device_get(evaluation(params))
        document = {
            "training": _training(config, step),
            "scores": {name.removeprefix("eval/"): float(x) for name, x in scores.items()},
            "unit_of_losses": task.unit,
        }
        save_weights(path, params, document)

    def init(key):
        return task.init(instance, key)

    return Trainable(
        "network", init, lambda: None, (supervised_training(loss),), evaluation, export
    )


def trainable_policy(config: Config, data_dir: str | None) -> Trainable:
    """Control: theta is a policy's, judged as its environment says."""
    del data_dir
    dynamics = config.task.dynamics()

    @jax.jit
    def evaluation(theta):
        found = dynamics.evaluate(theta, config.eval_seeds, jnp.int32(config.seed))
        return {f"eval/{name}": value for name, value in found.items()}

    def export(path, theta, step):
        document = {
            "policy": to_dict(config.task),
            "training": _training(config, step),
            "unit_of_losses": dynamics.unit,
        }
        save_weights(path, theta, document)

    system = UnrolledSystem(dynamics.init, dynamics.step)
    return Trainable("policy", dynamics.init_theta, lambda: None, (system,), evaluation, export)


def save_weights(folder: Path, params: Any, document: dict[str, Any]) -> None:
    """Arrays by their path in the parameters, and a JSON description."""
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {name: np.asarray(leaf) for name, leaf in leaves.named(params)}
    save_file(arrays, folder / "weights.safetensors.tmp")
    os.replace(folder / "weights.safetensors.tmp", folder / "weights.safetensors")
    (folder / "config.json.tmp").write_text(strict_json.dumps(document, indent=2) + "\n")
    os.replace(folder / "config.json.tmp", folder / "config.json")


TRAINABLES: dict[str, Callable[[Config, str | None], Trainable]] = {
    "optimizer": trainable_optimizer,
    "network": trainable_network,
    "policy": trainable_policy,
}


def start_theta(config: Config) -> Any:
    """Theta of the trained optimizer in the folder ``config.init_from``; None if it is empty.

    Raises:
      ValueError: if there is none, or it is not the optimizer of this job.
    """
    if not config.init_from:
        return None
    saved = weights.load_config(config.init_from)
    there = {"name": saved["name"], **saved["arguments"]}
    here = to_dict(config.optimizer)
    differences = [
        f"--cfg.optimizer.{key} is {value!r} there, {here[key]!r} here".replace(".name ", " ")
        for key, value in there.items()
        if key in here and here[key] != value and key not in WITHOUT_PART_IN_THETA
    ]
    if differences:
        raise ValueError(
            f"--cfg.init_from={config.init_from} holds another optimizer than this job trains: "
            f"{'; '.join(differences)}. Give --cfg.optimizer what it has there."
        )
    return weights.load(config.init_from)[1]


def _began_from(config: Config) -> dict[str, Any]:
    """How the optimizer was trained that theta starts from, for the model card."""
    if not config.init_from:
        return {}
    try:
        return {"began_from": weights.load_config(config.init_from)["training"]}
    except ValueError:  # A job that continues needs it no more, and it may have gone.
        return {}


def _training(config: Config, step: int) -> dict[str, Any]:
    """How theta came about, for the model card."""
    return {
        "task": to_dict(config.task),
        "horizon": config.inner.horizon,
        "meta_loss": config.inner.meta_loss,
        "estimator": to_dict(config.estimator),
        "outer_steps": step,
        "inner_steps": step * config.inner_steps(),
        "seed": config.seed,
        "init_from": config.init_from or None,
        "provenance": provenance(config),
    }
