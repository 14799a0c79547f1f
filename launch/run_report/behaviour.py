"""What a learned optimizer does: an inner run under it, layer by layer."""

from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from launch import config as cfg
from launch import leaves
from launch import workdir as workdirs
from launch.config import Config
from launch.job import build
from learned_opt import LearnedOptimizer
from meta_train import devices
from meta_train.meta_optimizers import judged
from tasks import Task


class Behaviour(NamedTuple):
    """One inner run of ``T`` steps on a task with ``n`` layers (leaves of its parameters).

    Attributes:
      task: its name.
      step: of theta, in outer steps.
      layers: their names.
      losses: ``[T]``, before each update.
      params, grads, updates: root mean squares, ``[T, n]``.
    """

    task: str
    step: int
    layers: list[str]
    losses: np.ndarray
    params: np.ndarray
    grads: np.ndarray
    updates: np.ndarray


def of_job(config: Config, workdir: Path, data_dir: str | None) -> Behaviour | None:
    """The run of the newest checkpoint's theta on the job's (first) task, at its horizon.

    None for a network, or before the first checkpoint.

    Raises:
      ValueError: if the job cannot be built here, or no checkpoint can be read.
    """
    if config.trains != "optimizer":
        return None
    job = build(config, data_dir)
    start = workdirs.find_start(workdir, devices.host_like(jax.eval_shape(job.init)))
    if start.host_state is None:
        return None
    theta = judged(start.host_state.theta, start.host_state.meta_opt_state)
    name, task = cfg.task_names(config.task)[0], config.task.parts[0].make(data_dir)
    optimizer = config.optimizer.make()
    found = inner_run(
        task, optimizer, job.theta_tree(jnp.asarray(theta)), config.inner.horizon, config.seed
    )
    return found._replace(task=name, step=start.step)


def inner_run(
    task: Task, optimizer: LearnedOptimizer, theta: Any, num_steps: int, seed: int
) -> Behaviour:
    """Trains once, and keeps the sizes of everything."""

    @jax.jit
    def run(theta, key):
        key_sample, key_init, key_steps = jax.random.split(key, 3)
        instance = task.sample(key_sample)
        params = task.init(instance, key_init)
        transform = optax.with_extra_args_support(optimizer.bind(theta, num_steps))

        def step(carry, key):
            params, opt_state = carry
            key_batch, key_loss = jax.random.split(key)
            batch = task.batch(instance, key_batch, "train")
            loss, grads = jax.value_and_grad(task.loss)(params, instance, batch, key_loss)
            updates, opt_state = transform.update(grads, opt_state, params, value=loss)
            sizes = tuple(map(_root_mean_squares, (params, grads, updates)))
            return (optax.apply_updates(params, updates), opt_state), (loss, *sizes)

        keys = jax.random.split(key_steps, num_steps)
        return params, jax.lax.scan(step, (params, transform.init(params)), keys)[1]

    params, sizes = run(theta, jax.random.key(seed))
    names = [name or "theta" for name, _ in leaves.named(params)]
    return Behaviour("", 0, names, *map(np.asarray, sizes))


def _root_mean_squares(tree: Any) -> jax.Array:
    return jnp.stack([jnp.sqrt(jnp.mean(jnp.square(leaf))) for leaf in jax.tree.leaves(tree)])
