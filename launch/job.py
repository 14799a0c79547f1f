"""A job: what a configuration becomes, before anything is computed."""

from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.flatten_util import ravel_pytree

from launch import config as cfg
from launch.choices import modules_outside, to_dict
from launch.config import Config
from launch.own_modules import faults_of
from launch.trainables import TRAINABLES, Trainable
from launch.validation import validation
from meta_train import devices, estimators, strict_json, trainer
from meta_train.checks import check_estimator
from meta_train.mixture_step import make_mixture_step
from meta_train.progress import progress, remark
from meta_train.unroll import theta_tree, with_flat_theta


class Job(NamedTuple):
    """What a configuration becomes: everything the loop needs, nothing computed yet."""

    config: Config
    num_devices: int
    trainable: Trainable  # what theta is
    theta_tree: Any  # theta as the vector the job trains -> theta as the trainable's pytree
    init: Any  # () -> TrainState, device-free; as a fresh job starts
    begin: Any  # () -> TrainState: the same from `init_from`, where the job says so
    step: Any  # TrainState -> (TrainState, metrics), over the devices
    axes: Any  # which part of the state has the particle axis
    one_device_estimator: Any  # the estimator (of the first task), on one device
    meta_optimizer: Any
    evaluate: Any  # theta -> {"eval/...": scalar}


def build(config: Config, data_dir: str | None, num_hosts: int | None = None) -> Job:
    """Checks the configuration and builds the job.

    Args:
      num_hosts: to plan for so many like this one; None: those that there are.

    Raises:
      ValueError: naming the flag and what to do, before any compute.
    """
    requested = devices.configure_cpu_devices(config.num_devices)
    shards, field, share = config.estimator.shards
    num_devices = devices.choose_num_devices(
        requested, shards, f"--cfg.estimator.{field}", share, num_hosts
    )
    names = cfg.task_names(config.task)
    trainable = TRAINABLES[config.trains](config, data_dir)
    validate = validation(config, data_dir)
    # Keys inside: making one compiles a program.
    theta_spec = jax.eval_shape(lambda: trainable.init(jax.random.key(0)))
    systems = [with_flat_theta(system, theta_spec)[0] for system in trainable.systems]
    to_tree = theta_tree(theta_spec)
    one_device = estimators.Context(
        devices.default_chunk(),
        layers=tuple(leaf.size for leaf in jax.tree.leaves(theta_spec)),
        learning_rate=config.meta.learning_rate,
    )
    exchange = estimators.Exchange(devices.device_mean, devices.device_gather)
    parts = [
        config.estimator.make(system, config.horizons(), one_device._replace(exchange=exchange))
        for system in systems
    ]

    def init_theta(key):
        return ravel_pytree(trainable.init(key))[0]

    if modules_outside(to_dict(config.estimator)):
        key = jax.eval_shape(lambda: jax.random.key(0))
        with faults_of("--cfg.estimator cannot be used"):
            check_estimator(parts[0], jax.eval_shape(init_theta, key), key)

    held = _held(trainable.held, theta_spec) if trainable.held else None
    meta_optimizer = config.meta.make(config.num_steps, held)
    if len(parts) > 1:
        # Traced here, for the progress, what asking for the shapes of the state would trace.
        key = jax.eval_shape(lambda: jax.random.key(0))
        theta = jax.eval_shape(init_theta, key)
        for part in progress(parts, desc="checking", unit="task"):
            jax.eval_shape(part.init, theta, key)
        mixed = estimators.mixture(parts, names=names, **config.task.mixing)
        estimator, axes = mixed.estimator, trainer.state_axes(mixed.estimator)
        step = make_mixture_step(mixed, meta_optimizer, num_devices)
    else:
        estimator, axes = parts[0], trainer.state_axes(parts[0])
        if config.estimator.keeps_log:
            # Its steps are to round as a replay's, which knows the rate as a constant.
            step = trainer.make_step(estimator, meta_optimizer, devices.device_mean)
            step = devices.population_map(step, num_devices, axes)
        else:
            step = _at_rate(config, estimator, held, num_devices, axes)

    def begin():
        given = trainable.start()
        first = init_theta if given is None else lambda key: ravel_pytree(given)[0]
        start = partial(trainer.init_state, estimator, meta_optimizer, first)
        # The seed is an argument, so that jobs of other seeds are the same programs.
        return jax.jit(start)(np.uint32(config.seed))

    return Job(
        config,
        num_devices,
        trainable,
        to_tree,
        partial(trainer.init_state, estimator, meta_optimizer, init_theta, config.seed),
        begin,
        step,
        axes,
        config.estimator.make(systems[0], config.horizons(), one_device),
        meta_optimizer,
        lambda theta: trainable.evaluate(to_tree(theta)) | validate(to_tree(theta)),
    )


def _at_rate(config: Config, estimator: Any, held: Any, num_devices: int, axes: Any) -> "_AtRate":
    """The step over devices as a program that takes the meta-optimizer's learning rate.

    So jobs that differ only in it (and in the seed) are one program, compiled once.
    """

    def step(given):
        state, rate = given
        # Of theta's type, so that it makes no other of updates.
        rate = rate.astype(jax.tree.leaves(state.theta)[0].dtype)
        meta_optimizer = config.meta.make(config.num_steps, held, rate)
        state, metrics = trainer.make_step(estimator, meta_optimizer, devices.device_mean)(state)
        return (state, given[1]), metrics

    mapped = devices.population_map(step, num_devices, (axes, None))
    return _AtRate(mapped, np.asarray(config.meta.learning_rate), num_devices)


class _AtRate:
    """A step of (state, rate) as one of states: called, lowered and compiled as ``jax.jit``'s."""

    def __init__(self, step: Any, rate: np.ndarray, num_devices: int):
        self._step, self._rate, self._num_devices = step, rate, num_devices
        self._placed: Any = None  # A step takes its memory, and gives it back.

    def __call__(self, state: trainer.TrainState) -> tuple[trainer.TrainState, Any]:
        if self._placed is None:
            self._placed = devices.replicate(self._rate, self._num_devices)
        (state, self._placed), metrics = self._step((state, self._placed))
        return state, metrics

    def lower(self, state: Any) -> "_AtRate":
        # In place, as one of several processes lowers for arrays that are.
        rate = devices.replicate(self._rate, self._num_devices)
        return _AtRate(self._step.lower((state, rate)), self._rate, self._num_devices)

    def compile(self) -> "_AtRate":
        return _AtRate(self._step.compile(), self._rate, self._num_devices)

    def memory_analysis(self) -> Any:
        return self._step.memory_analysis()

    def as_text(self) -> str:
        return self._step.as_text()


def _held(keys: tuple[str, ...], theta_spec: Any) -> np.ndarray:
    """Where theta as a vector is of those keys."""
    leaves = jax.tree_util.tree_leaves_with_path(theta_spec)
    return np.concatenate([np.full(leaf.size, path[1].key in keys) for path, leaf in leaves])


def say_compiling(job: Job) -> None:
    """Says on stderr that the step is about to be compiled, and as how many programs."""
    remark(f"Compiling the training step, {_programs(job.config)} ...")


def _programs(config: Config) -> str:
    count = len(config.task.parts)
    return "one program" if count == 1 else f"{count} programs, one a task"


def describe(job: Job, measure_memory: bool = False, num_hosts: int = 1) -> str:
    """The resolved plan: configuration, sizes, memory, inner steps in total.

    Args:
      measure_memory: compile the step, which may take minutes, and ask for the memory of its
        temporary arrays. All else is known from shapes.
      num_hosts: as on one of so many like this one, for which the job was built.
    """
    config = job.config
    spec = jax.eval_shape(job.init)
    theta = sum(leaf.size for leaf in jax.tree.leaves(spec.theta))
    host = jax.tree.map(lambda leaf: leaf.nbytes, devices.host_like(spec))
    population = sum(jax.tree.leaves(host.estimator_state))
    if measure_memory:
        say_compiling(job)
        placed = devices.placed_spec(spec, job.num_devices, job.axes, num_hosts)
        memory = job.step.lower(placed).compile().memory_analysis()
        needed = (
            f"{memory.temp_size_in_bytes / 2**20:.1f} MiB temporary, "
            f"{memory.argument_size_in_bytes / 2**20:.1f} MiB state, per device"
        )
    else:
        needed = f"not asked for: --measure_memory compiles the step ({_programs(config)}) to know"
    total = config.num_steps * config.inner_steps()
    axis, size, _ = config.estimator.population
    everywhere = num_hosts * job.num_devices
    replicated = sum(jax.tree.leaves(host)) - population
    kind = jax.local_devices()[0].device_kind
    of = f"{num_hosts} hosts with " if num_hosts > 1 else ""
    return "\n".join(
        [
            strict_json.dumps(to_dict(config), indent=2),
            "",
            f"meta-parameters          {theta:,}",
            f"devices                  {of}{job.num_devices} x {kind}",
            f"{axis + ' per device':<25}{size // everywhere}",
            f"population state         {population / 2**20:.1f} MiB over all devices",
            f"state per device         {population / everywhere / 2**20:.2f} MiB of the population,"
            f" {replicated / 2**20:.2f} MiB of theta and the meta-optimizer",
            f"memory of a step         {needed}",
            f"outer steps              {config.num_steps:,}",
            f"inner steps in total     {total:,.0f}",
        ]
    )
