"""A job: what a configuration becomes, before anything is computed."""

from functools import partial
from typing import Any, NamedTuple

import jax
from jax.flatten_util import ravel_pytree

from launch import config as cfg
from launch.subjects import SUBJECTS, Subject
from meta_train import devices, estimators, strict_json, trainer
from meta_train.unroll import with_flat_theta


class Job(NamedTuple):
    """What a configuration becomes: everything the loop needs, nothing computed yet."""

    config: cfg.Config
    num_devices: int
    subject: Subject  # what theta is
    unravel: Any  # theta as the vector the job trains -> theta as the subject's pytree
    init: Any  # () -> TrainState, device-free
    step: Any  # TrainState -> (TrainState, metrics), over the devices
    axes: Any  # which part of the state has the particle axis
    alone: Any  # the estimator, on one device
    meta_optimizer: Any
    evaluate: Any  # theta -> {"eval/...": scalar}


def build(config: cfg.Config, data_dir: str | None) -> Job:
    """Checks the configuration and builds the job.

    Raises:
      ValueError: naming the flag and what to do, before any compute.
    """
    cfg.validate(config)
    devices.configure_cpu_devices(config.num_devices)
    num_devices = devices.choose_num_devices(config.num_devices, *cfg.shards(config))
    subject = SUBJECTS[config.trains](config, cfg.make_task(config.task, data_dir))
    theta_spec = jax.eval_shape(subject.init, jax.random.key(0))
    system, unravel = with_flat_theta(subject.system, theta_spec)
    layers = tuple(leaf.size for leaf in jax.tree.leaves(theta_spec))
    exchange = estimators.Exchange(devices.device_tree_mean, devices.device_gather)
    estimator = cfg.make_estimator(config, system, exchange, layers)
    meta_optimizer = cfg.make_meta_optimizer(config)
    step = trainer.make_step(estimator, meta_optimizer, devices.device_mean)
    axes = trainer.state_axes(estimator)

    def init_theta(key):
        return ravel_pytree(subject.init(key))[0]

    return Job(
        config,
        num_devices,
        subject,
        unravel,
        partial(trainer.init_state, estimator, meta_optimizer, init_theta, config.seed),
        devices.population_map(step, num_devices, axes),
        axes,
        cfg.make_estimator(config, system, layers=layers),
        meta_optimizer,
        jax.jit(lambda theta: subject.evaluate(unravel(theta))),
    )


def describe(job: Job) -> str:
    """The resolved plan: configuration, sizes, memory, inner steps in total."""
    config = job.config
    spec = jax.eval_shape(job.init)
    theta = sum(leaf.size for leaf in jax.tree.leaves(spec.theta))
    host = jax.tree.map(lambda leaf: leaf.nbytes, devices.host_like(spec))
    population = sum(jax.tree.leaves(host.estimator_state))
    placed = devices.placed_spec(spec, job.num_devices, job.axes)
    memory = job.step.lower(placed).compile().memory_analysis()
    total = config.num_steps * cfg.inner_steps_per_outer_step(config)
    axis = cfg.population_unit(cfg.population(config))[0]
    return "\n".join(
        [
            strict_json.dumps(cfg.to_dict(config), indent=2),
            "",
            f"meta-parameters          {theta:,}",
            f"devices                  {job.num_devices} x {jax.local_devices()[0].device_kind}",
            f"{axis + ' per device':<25}{cfg.num_shardable(config) // job.num_devices}",
            f"population state         {population / 2**20:.1f} MiB over all devices",
            f"memory of a step         {memory.temp_size_in_bytes / 2**20:.1f} MiB temporary, "
            f"{memory.argument_size_in_bytes / 2**20:.1f} MiB state, per device",
            f"outer steps              {config.num_steps:,}",
            f"inner steps in total     {total:,.0f}",
        ]
    )
