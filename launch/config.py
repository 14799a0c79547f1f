"""The configuration of a job, and the one place where a name becomes an object."""

import dataclasses
import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

import optax

import launch.configs
from learned_opt import OPTIMIZERS, LearnedOptimizer
from meta_train import devices, estimators
from meta_train.compression import COMPRESSORS
from meta_train.inner import META_LOSSES, REDUCTIONS, inner_training
from meta_train.reversible.inner import reversible_inner_training
from meta_train.samplers import SAMPLERS
from meta_train.unroll import UnrolledSystem
from tasks import Task, mlp_classifier, quadratic_family
from tasks.data import load_images
from tasks.mlp import ACTIVATIONS


@dataclass(frozen=True)
class TaskConfig:
    """The inner problem. Fields marked with a task's name are read by that task alone."""

    name: str = "mlp"
    batch_size: int = 64
    dataset: str = "digits"  # mlp: digits, or a prepared TFDS image data set
    hidden_sizes: tuple[int, ...] = (32,)  # mlp
    activation: str = "relu"  # mlp
    standardize: bool = False  # mlp: pixels of mean 0 and variance 1, else in 0..1
    dim: int = 10  # quadratic
    condition: float = 100.0  # quadratic
    noise: float = 0.1  # quadratic


@dataclass(frozen=True)
class OptimizerConfig:
    """The learned optimizer. Fields marked with a name are read by that optimizer alone."""

    name: str = "mlp"
    hidden_sizes: tuple[int, ...] = (32, 32)  # mlp, reversible_mlp
    step_mult: float = 1e-3  # mlp, reversible_mlp
    exp_mult: float = 1e-3  # mlp, reversible_mlp
    learning_rate: float = 1e-3  # sgdm, adam, schedule, per_tensor_sgdm: where it starts
    momentum: float = 0.9  # sgdm, per_tensor_sgdm: where it starts; schedule: fixed
    decay: float = 1.0  # schedule: where it starts
    num_tensors: int = 4  # per_tensor_sgdm: arrays of the task's parameters


@dataclass(frozen=True)
class InnerConfig:
    """Inner training."""

    horizon: int = 100  # inner steps of an episode (the longest, if drawn)
    min_horizon: int = 0  # above 0: horizons log-uniform between this and `horizon`
    meta_loss: str = "train"  # train, fresh or validation
    reduction: str = "mean"  # mean, last, or telescoped: the last loss as a sum of differences
    loss_ceiling: float = 0.0  # losses above it, or not finite, count as it; 0: no ceiling


@dataclass(frozen=True)
class EstimatorConfig:
    """The gradient estimator. Fields marked with a name are read by that estimator alone."""

    name: str = "pes"
    num_particles: int = 32  # inner runs; antithetic estimators pair them up
    truncation: int = 20  # inner steps per outer step, for the truncated estimators
    sigma: float = 0.01  # standard deviation of the perturbations, for the ES family
    sampler: str = "normal"  # distribution of the perturbations, for the ES family
    chunk: int = 0  # particles (or pairs) computed at a time; 0: chosen for the device
    noise_period: int = 0  # gpes: inner steps per perturbation; 0: two truncations
    pairs_per_group: int = 8  # reparam_es: pairs that share weights; even, few: heavy tails
    num_surrogates: int = 1  # guided_es: surrogate gradients a pair remembers
    guided_alpha: float = 0.5  # guided_es: share of the isotropic part, in (0, 1]


@dataclass(frozen=True)
class HybridConfig:
    """Hybrid-ES, read by the estimator ``hybrid_es`` alone; see ``estimators.hybrid_es``."""

    base: str = "tbptt"  # the estimator of the gradients, with the fields of `estimator`
    refresh_every: int = 5  # outer steps per gradient
    assist: bool = False  # search after the gradient steps too
    num_workers: int = 8  # split over the devices; must divide the particles (or pairs)
    candidates_per_worker: int = 4
    num_tasks: int = 1  # episodes averaged for a candidate's cost
    mode: str = "control_variate"
    combine: str = "argmin"  # select
    top: int = 1  # select, combine=top
    antithetic: bool = False  # select
    num_surrogates: int = 4  # guided
    alpha: float = 0.5  # guided
    sigma: float = 0.0  # of the candidates' perturbations; 0: as `estimator.sigma`
    sampler: str = ""  # of the candidates' perturbations; empty: as `estimator.sampler`
    relative_sigma: bool = False  # sigma in units of the gradient's own spread
    per_layer: bool = False  # sigma (if relative) and the mask by layers of theta
    success_rate: float = 0.0  # select: speed of the 1/5th success rule; 0: off
    mask: str = "none"  # none, random, layers or largest
    fraction: float = 1.0  # of the entries or layers perturbed
    predict: bool = False  # in between, a learned prediction in place of the stale gradient
    compression: str = "none"  # of the gradients: none, int8 or top_k
    kept: float = 0.01  # top_k: share of the entries kept
    replay_log: bool = False  # write WORKDIR/replay.log, from which the weights can be rebuilt


@dataclass(frozen=True)
class MetaConfig:
    """The meta-optimizer."""

    optimizer: str = "adam"
    learning_rate: float = 1e-3
    schedule: str = "constant"  # constant or cosine (to 0 over num_steps)
    warmup: int = 0  # outer steps of linear warm-up
    clip_value: float = 0.0  # clip each component of the meta-gradient; 0: off
    clip_norm: float = 0.0  # clip the norm of the meta-gradient; 0: off


@dataclass(frozen=True)
class Config:
    """A training job."""

    trains: str = "optimizer"  # optimizer: meta-training; network: the task's own parameters
    seed: int = 0
    num_steps: int = 1000  # outer steps
    num_devices: int = 0  # local devices; 0: all (on a CPU, one virtual device per core)
    log_every: int = 10  # outer steps between rows of metrics
    eval_every: int = 100  # outer steps between evaluations of theta itself; 0: never
    eval_seeds: int = 8  # inner runs of an evaluation
    checkpoint_every: int = 100
    keep_checkpoints: int = 3
    wandb_project: str = "learned-opt"
    wandb_mode: str = "auto"  # auto (online if logged in), online, offline, disabled
    task: TaskConfig = field(default_factory=TaskConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    inner: InnerConfig = field(default_factory=InnerConfig)
    estimator: EstimatorConfig = field(default_factory=EstimatorConfig)
    hybrid: HybridConfig = field(default_factory=HybridConfig)
    meta: MetaConfig = field(default_factory=MetaConfig)


# What may change when a job continues: it leaves the trajectory of theta as it was.
MAY_CHANGE = {
    "num_devices",
    "log_every",
    "eval_every",
    "eval_seeds",
    "checkpoint_every",
    "keep_checkpoints",
    "wandb_project",
    "wandb_mode",
    "estimator.chunk",
}

TASKS: dict[str, Callable[[TaskConfig, str | None], Task]] = {
    "mlp": lambda c, data_dir: mlp_classifier(
        load_images(c.dataset, data_dir),
        hidden_sizes=c.hidden_sizes,
        activation=c.activation,
        batch_size=c.batch_size,
        standardize=c.standardize,
    ),
    "quadratic": lambda c, data_dir: quadratic_family(
        dim=c.dim, condition=c.condition, noise=c.noise, batch_size=c.batch_size
    ),
}

OPTIMIZER_ARGUMENTS: dict[str, tuple[str, ...]] = {
    "mlp": ("hidden_sizes", "step_mult", "exp_mult"),
    "reversible_mlp": ("hidden_sizes", "step_mult", "exp_mult"),
    "sgdm": ("learning_rate", "momentum"),
    "adam": ("learning_rate",),
    "schedule": ("learning_rate", "decay", "momentum"),
    "per_tensor_sgdm": ("num_tensors", "learning_rate", "momentum"),
}


def _pairs(build, c: EstimatorConfig, system, horizons, **more):
    return build(
        system,
        num_pairs=c.num_particles // 2,
        horizons=horizons,
        sigma=c.sigma,
        sampler=c.sampler,
        chunk=c.chunk or devices.default_chunk(),
        **more,
    )


def _particles(build, c: EstimatorConfig, system, horizons, **more):
    return build(
        system,
        num_particles=c.num_particles,
        horizons=horizons,
        chunk=c.chunk or devices.default_chunk(),
        **more,
    )


def _groups(c: EstimatorConfig, system, horizons):
    return estimators.reparam_es(
        system,
        num_particles=c.num_particles // (2 * c.pairs_per_group),
        pairs_per_particle=c.pairs_per_group,
        horizons=horizons,
        sigma=c.sigma,
        sampler=c.sampler,
        chunk=c.chunk or devices.default_chunk(),
    )


ESTIMATORS: dict[str, Callable[..., estimators.GradientEstimator]] = {
    "pes": lambda c, *a: _pairs(estimators.pes, c, *a, truncation=c.truncation),
    "full_es": lambda c, *a: _pairs(estimators.full_es, c, *a),
    "truncated_es": lambda c, *a: _pairs(estimators.truncated_es, c, *a, truncation=c.truncation),
    "gpes": lambda c, *a: _pairs(
        estimators.gpes, c, *a, truncation=c.truncation, noise_period=noise_period(c)
    ),
    "nres": lambda c, *a: _pairs(estimators.nres, c, *a, truncation=c.truncation),
    "es_single": lambda c, *a: _pairs(estimators.es_single, c, *a, truncation=c.truncation),
    "pes_analytic": lambda c, *a: _pairs(estimators.pes_analytic, c, *a, truncation=c.truncation),
    "guided_es": lambda c, *a: _pairs(
        estimators.guided_es,
        c,
        *a,
        truncation=c.truncation,
        num_surrogates=c.num_surrogates,
        alpha=c.guided_alpha,
    ),
    "reparam": lambda c, *a: _pairs(estimators.reparam, c, *a),
    "reparam_es": _groups,
    "tbptt": lambda c, *a: _particles(estimators.tbptt, c, *a, truncation=c.truncation),
    "bptt": lambda c, *a: _particles(estimators.bptt, c, *a),
    "reversible": lambda c, *a: _particles(estimators.reversible, c, *a),
    "artbp": lambda c, *a: _particles(estimators.artbp, c, *a, mean_truncation=c.truncation),
    "rtrl": lambda c, *a: _particles(estimators.rtrl, c, *a, truncation=c.truncation),
    "uoro": lambda c, *a: _particles(estimators.uoro, c, *a, truncation=c.truncation),
    "forward_gradient": lambda c, *a: _particles(
        estimators.forward_gradient, c, *a, truncation=c.truncation
    ),
}
# Built on one of these, with the exchange between devices: see `make_estimator`.
HYBRID = "hybrid_es"
ANTITHETIC = (
    "pes",
    "full_es",
    "truncated_es",
    "gpes",
    "nres",
    "es_single",
    "pes_analytic",
    "guided_es",
    "reparam",
)
# Estimators whose outer step is a whole episode.
WHOLE_EPISODE = (
    "full_es",
    "bptt",
    "reversible",
    "artbp",
    "reparam",
    "reparam_es",
    "guided_es",
)
# Forward runs of the inner problem per particle: these also run theta itself.
FORWARD_RUNS = {"truncated_es": 1.5, "pes_analytic": 1.5, "guided_es": 1.5}

META_OPTIMIZERS: dict[str, Callable[..., optax.GradientTransformation]] = {
    "adam": optax.adam,
    "adamw": optax.adamw,
    "sgd": optax.sgd,
    "rmsprop": optax.rmsprop,
}
SCHEDULES = ("constant", "cosine")
TRAINS = ("optimizer", "network")
WANDB_MODES = ("auto", "online", "offline", "disabled")


def preset_names() -> list[str]:
    """Names of the files in ``launch/configs``."""
    return sorted(module.name for module in pkgutil.iter_modules(launch.configs.__path__))


def load_preset(name: str) -> Config:
    """The configuration of a preset.

    Raises:
      ValueError: on an unknown name.
    """
    _check_choice("--preset", name, preset_names())
    return importlib.import_module(f"launch.configs.{name}").get_config()


def validate(config: Config) -> None:
    """Checks every value that can be checked without loading data or compiling.

    Raises:
      ValueError: naming the flag, what was given, and what to do.
    """
    _check_choice("--cfg.trains", config.trains, TRAINS)
    _check_choice("--cfg.task.name", config.task.name, TASKS)
    _check_choice("--cfg.task.activation", config.task.activation, ACTIVATIONS)
    _check_choice("--cfg.optimizer.name", config.optimizer.name, OPTIMIZERS)
    _check_choice("--cfg.estimator.name", config.estimator.name, (*ESTIMATORS, HYBRID))
    _check_choice("--cfg.estimator.sampler", config.estimator.sampler, SAMPLERS)
    _check_choice("--cfg.inner.meta_loss", config.inner.meta_loss, META_LOSSES)
    _check_choice("--cfg.inner.reduction", config.inner.reduction, (*REDUCTIONS, "telescoped"))
    _check_choice("--cfg.meta.optimizer", config.meta.optimizer, META_OPTIMIZERS)
    _check_choice("--cfg.meta.schedule", config.meta.schedule, SCHEDULES)
    _check_choice("--cfg.wandb_mode", config.wandb_mode, WANDB_MODES)
    for flag, value, minimum in (
        ("num_steps", config.num_steps, 1),
        ("num_devices", config.num_devices, 0),
        ("log_every", config.log_every, 1),
        ("eval_every", config.eval_every, 0),
        ("eval_seeds", config.eval_seeds, 1),
        ("checkpoint_every", config.checkpoint_every, 1),
        ("keep_checkpoints", config.keep_checkpoints, 1),
        ("inner.min_horizon", config.inner.min_horizon, 0),
        ("inner.loss_ceiling", config.inner.loss_ceiling, 0),
        ("estimator.num_particles", config.estimator.num_particles, 1),
        ("estimator.truncation", config.estimator.truncation, 1),
        ("estimator.chunk", config.estimator.chunk, 0),
        ("estimator.num_surrogates", config.estimator.num_surrogates, 1),
        ("meta.warmup", config.meta.warmup, 0),
        ("meta.clip_value", config.meta.clip_value, 0),
        ("meta.clip_norm", config.meta.clip_norm, 0),
    ):
        if not value >= minimum:
            raise ValueError(f"--cfg.{flag} must be at least {minimum}, got {value}.")
    if not 0 <= config.seed < 2**32:
        raise ValueError(f"--cfg.seed must be between 0 and {2**32 - 1}, got {config.seed}.")
    if config.meta.warmup >= config.num_steps:
        raise ValueError(
            f"--cfg.meta.warmup must be below --cfg.num_steps={config.num_steps}, got "
            f"{config.meta.warmup}."
        )
    for flag, sizes in (
        ("task.hidden_sizes", config.task.hidden_sizes),
        ("optimizer.hidden_sizes", config.optimizer.hidden_sizes),
    ):
        if not all(isinstance(size, int) and size > 0 for size in sizes):
            raise ValueError(f"--cfg.{flag} must be whole numbers above 0, got {sizes}.")
    estimators.base.check_positive(
        **{"cfg.estimator.sigma": config.estimator.sigma},
        **{"cfg.meta.learning_rate": config.meta.learning_rate},
    )
    _validate_estimator(population(config))
    if config.trains == "network" and config.inner.horizon != 1:
        raise ValueError(
            f"--cfg.trains=network needs --cfg.inner.horizon=1, got {config.inner.horizon}: a step "
            "of supervised training is a whole episode. Set --cfg.estimator.truncation=1 too."
        )
    if config.estimator.name == HYBRID:
        _validate_hybrid(config)
    if config.inner.reduction == "last" and config.inner.min_horizon:
        raise ValueError(
            "--cfg.inner.reduction=last needs one fixed horizon, got --cfg.inner.min_horizon="
            f"{config.inner.min_horizon}: a drawn horizon has no last step known in advance. "
            "Set --cfg.inner.min_horizon=0, or --cfg.inner.reduction=telescoped or mean."
        )
    undone = population(config).name == "reversible"
    if undone and not make_optimizer(config.optimizer).reversible:
        valid = [name for name in sorted(OPTIMIZERS) if OPTIMIZERS[name]().reversible]
        raise ValueError(
            "--cfg.estimator.name=reversible needs an optimizer whose steps can be undone, "
            f"--cfg.optimizer.name one of {valid}, got {config.optimizer.name!r}. For other "
            "optimizers --cfg.estimator.name=bptt has the same expectation, at more memory."
        )
    if undone and config.inner.reduction == "telescoped":
        raise ValueError(
            "--cfg.estimator.name=reversible cannot undo differences of losses, got "
            "--cfg.inner.reduction=telescoped. Set --cfg.inner.reduction=last: the same loss."
        )
    make_horizons(config)


def _validate_hybrid(config: Config) -> None:
    """What can be checked of Hybrid-ES without a system; the estimator checks the rest."""
    hybrid, meta = config.hybrid, config.meta
    _check_choice("--cfg.hybrid.base", hybrid.base, ESTIMATORS)
    _check_choice("--cfg.hybrid.mode", hybrid.mode, estimators.hybrid.MODES)
    _check_choice("--cfg.hybrid.compression", hybrid.compression, COMPRESSORS)
    if hybrid.sampler:
        _check_choice("--cfg.hybrid.sampler", hybrid.sampler, SAMPLERS)
    if not hybrid.sigma >= 0:
        raise ValueError(f"--cfg.hybrid.sigma must be at least 0, got {hybrid.sigma}.")
    if hybrid.num_workers < 1 or num_shardable(config) % hybrid.num_workers:
        raise ValueError(
            f"--cfg.hybrid.num_workers must divide the population of {hybrid.base!r}, "
            f"{num_shardable(config)} particles (pairs, for antithetic estimators), got "
            f"{hybrid.num_workers}: every worker computes a part of the gradient."
        )
    plain = meta.optimizer == "sgd" and meta.schedule == "constant" and not meta.warmup
    if hybrid.mode == "select" and (not plain or meta.clip_value or meta.clip_norm):
        raise ValueError(
            "--cfg.hybrid.mode=select tries steps of plain gradient descent, but the "
            f"meta-optimizer would take others (--cfg.meta is {meta}). Set "
            "--cfg.meta.optimizer=sgd with a constant rate and no clipping, or another mode."
        )
    if hybrid.mask == "layers" and not hybrid.per_layer:
        raise ValueError("--cfg.hybrid.mask=layers needs --cfg.hybrid.per_layer=true.")
    nothing: Any = None  # Nothing is called yet.
    estimators.hybrid_es(
        nothing,
        estimators.GradientEstimator(nothing, nothing),
        horizons=make_horizons(config),
        **hybrid_arguments(config),
    )


def _validate_estimator(c: EstimatorConfig) -> None:
    if c.name == "reparam_es" and (c.pairs_per_group < 4 or c.pairs_per_group % 2):
        raise ValueError(
            f"--cfg.estimator.pairs_per_group must be even and at least 4, got {c.pairs_per_group}."
        )
    unit, runs = population_unit(c)
    if c.num_particles % runs:
        what = "even for the antithetic estimator" if unit == "pairs" else "whole groups for"
        more = c.num_particles + -c.num_particles % runs
        raise ValueError(
            f"--cfg.estimator.num_particles must be {what} {c.name!r}, a multiple of {runs}, got "
            f"{c.num_particles}. Try {more}."
        )
    if c.name == "gpes" and (c.noise_period < 0 or c.noise_period % c.truncation):
        raise ValueError(
            f"--cfg.estimator.noise_period must be a multiple of --cfg.estimator.truncation="
            f"{c.truncation}, or 0 for two truncations, got {c.noise_period}."
        )
    if not 0 < c.guided_alpha <= 1:
        raise ValueError(
            f"--cfg.estimator.guided_alpha must be above 0 and at most 1, got {c.guided_alpha}."
        )


def _check_choice(flag: str, value: str, valid) -> None:
    if value not in valid:
        raise ValueError(f"{flag} must be one of {sorted(valid)}, got {value!r}.")


def population(config: Config) -> EstimatorConfig:
    """The estimator that runs the population: the named one, or the one Hybrid-ES is built on."""
    hybrid = config.estimator.name == HYBRID
    name = config.hybrid.base if hybrid else config.estimator.name
    return dataclasses.replace(config.estimator, name=name)


def population_unit(c: EstimatorConfig) -> tuple[str, int]:
    """What one entry of the particle axis is, and the inner runs it holds."""
    if c.name == "reparam_es":
        return "groups", 2 * c.pairs_per_group
    return ("pairs", 2) if c.name in ANTITHETIC else ("particles", 1)


def num_shardable(config: Config) -> int:
    """Length of the particle axis."""
    c = population(config)
    return c.num_particles // population_unit(c)[1]


def shards(config: Config) -> tuple[int, str, int]:
    """How many parts the population may be split into over devices, and the flag and its share
    that make one."""
    if config.estimator.name == HYBRID:
        return config.hybrid.num_workers, "--cfg.hybrid.num_workers", 1
    per_shard = population_unit(config.estimator)[1]
    return num_shardable(config), "--cfg.estimator.num_particles", per_shard


def inner_steps_per_outer_step(config: Config) -> float:
    """Forward inner steps of one outer step, all particles counted; on average, for Hybrid-ES."""
    name, hybrid = population(config).name, config.hybrid
    length = config.inner.horizon if name in WHOLE_EPISODE else config.estimator.truncation
    steps = config.estimator.num_particles * FORWARD_RUNS.get(name, 1) * length
    if config.estimator.name != HYBRID:
        return steps
    candidates = hybrid.num_workers * hybrid.candidates_per_worker
    candidates += hybrid.num_workers if hybrid.success_rate else 0
    if hybrid.mode in estimators.hybrid.IDLE:
        candidates = 0
    searches = 1.0 if hybrid.assist else 1 - 1 / hybrid.refresh_every
    search_steps = candidates * hybrid.num_tasks * config.inner.horizon
    return steps / hybrid.refresh_every + searches * search_steps


def make_task(config: TaskConfig, data_dir: str | None) -> Task:
    """The inner problem."""
    _check_choice("--task", config.name, TASKS)
    return TASKS[config.name](config, data_dir)


def optimizer_arguments(config: OptimizerConfig) -> dict[str, Any]:
    """The keyword arguments the named optimizer's constructor gets."""
    arguments = {name: getattr(config, name) for name in OPTIMIZER_ARGUMENTS[config.name]}
    return {k: list(v) if isinstance(v, tuple) else v for k, v in arguments.items()}


def make_optimizer(config: OptimizerConfig) -> LearnedOptimizer:
    """The learned optimizer."""
    return OPTIMIZERS[config.name](**optimizer_arguments(config))


def make_system(config: Config, task: Task, optimizer: LearnedOptimizer) -> UnrolledSystem:
    """Inner training as an unrolled system."""
    inner = config.inner
    undone = population(config).name == "reversible"
    system = (reversible_inner_training if undone else inner_training)(
        task,
        optimizer,
        num_steps=inner.horizon,
        meta_loss=inner.meta_loss,
        reduction="mean" if inner.reduction == "telescoped" else inner.reduction,
        loss_ceiling=inner.loss_ceiling or None,
    )
    if inner.reduction == "telescoped":
        return estimators.telescoped(system, make_horizons(config))
    return system


def make_horizons(config: Config) -> estimators.Horizons:
    """The distribution of episode lengths."""
    inner, truncation = config.inner, config.estimator.truncation
    if population(config).name in WHOLE_EPISODE and population(config).name != "guided_es":
        truncation = 1
    estimators.base.check_multiple(inner.horizon, truncation)
    if not inner.min_horizon:
        return estimators.fixed_horizon(inner.horizon)
    return estimators.log_uniform_horizons(inner.min_horizon, inner.horizon, truncation)


def noise_period(c: EstimatorConfig) -> int:
    """Inner steps a perturbation of ``gpes`` lasts."""
    return c.noise_period or 2 * c.truncation


def make_estimator(
    config: Config,
    system: UnrolledSystem,
    exchange: estimators.Exchange = estimators.ALONE,
    layers: tuple[int, ...] = (),
) -> estimators.GradientEstimator:
    """The gradient estimator.

    Args:
      exchange: how Hybrid-ES exchanges between devices; the others leave that to the trainer.
      layers: sizes of the parts of theta, for Hybrid-ES ``per_layer``.
    """
    horizons = make_horizons(config)
    c = population(config)
    surrogate = ESTIMATORS[c.name](c, system, horizons)
    if config.estimator.name != HYBRID:
        return surrogate
    return estimators.hybrid_es(
        system,
        surrogate,
        horizons=horizons,
        exchange=exchange,
        **hybrid_arguments(config, layers),
    )


def hybrid_arguments(config: Config, layers: tuple[int, ...] = ()) -> dict[str, Any]:
    """The keyword arguments of ``estimators.hybrid_es`` that are mere values."""
    hybrid = config.hybrid
    same = (
        "refresh_every",
        "num_workers",
        "candidates_per_worker",
        "mode",
        "combine",
        "top",
        "antithetic",
        "assist",
        "num_tasks",
        "num_surrogates",
        "alpha",
    )
    return {name: getattr(hybrid, name) for name in same} | {
        "noise": estimators.Noise(
            hybrid.sigma or config.estimator.sigma,
            hybrid.sampler or config.estimator.sampler,
            hybrid.relative_sigma,
            layers if hybrid.per_layer else (),
            hybrid.success_rate,
            hybrid.mask,
            hybrid.fraction,
        ),
        "step_size": config.meta.learning_rate,
        "predictor": estimators.learned_features() if hybrid.predict else None,
        "compressor": COMPRESSORS[hybrid.compression](hybrid.kept),
    }


def make_meta_optimizer(config: Config) -> optax.GradientTransformation:
    """The meta-optimizer: clipping, then the optimizer with its schedule."""
    meta = config.meta
    rate: optax.ScalarOrSchedule = meta.learning_rate
    if meta.schedule == "cosine":
        rate = optax.warmup_cosine_decay_schedule(
            0.0, meta.learning_rate, meta.warmup, max(config.num_steps, meta.warmup + 1)
        )
    elif meta.warmup:
        rate = optax.linear_schedule(0.0, meta.learning_rate, meta.warmup)
    return optax.chain(
        optax.clip(meta.clip_value) if meta.clip_value else optax.identity(),
        optax.clip_by_global_norm(meta.clip_norm) if meta.clip_norm else optax.identity(),
        META_OPTIMIZERS[meta.optimizer](rate),
    )


# What each task reads of ``TaskConfig``.
TASK_FIELDS: dict[str, tuple[str, ...]] = {
    "mlp": ("batch_size", "dataset", "hidden_sizes", "activation", "standardize"),
    "quadratic": ("batch_size", "dim", "condition", "noise"),
}


def task_facts(config: TaskConfig) -> dict[str, Any]:
    """The task's name and its own fields, for whatever states what the task was."""
    every = to_dict(config)
    return {name: every[name] for name in ("name", *TASK_FIELDS[config.name])}


def to_dict(config: Any) -> dict[str, Any]:
    """A configuration, or a part of one, as JSON-serializable nested dicts."""
    return dataclasses.asdict(
        config, dict_factory=lambda kv: {k: list(v) if isinstance(v, tuple) else v for k, v in kv}
    )


def from_dict(kind: type, tree: dict[str, Any]) -> Any:
    """Inverse of ``to_dict``: a frozen dataclass from nested dicts."""
    values = {}
    for entry in dataclasses.fields(kind):
        value = tree[entry.name]
        if dataclasses.is_dataclass(entry.type):
            value = from_dict(cast(type, entry.type), value)
        values[entry.name] = tuple(value) if isinstance(value, list) else value
    return kind(**values)


def contradictions(config: Config, saved: dict[str, Any]) -> list[str]:
    """Where ``config`` would leave the trajectory of the job saved with ``saved``.

    More steps may be asked for, unless the learning-rate schedule depends on their number.
    """
    may_change = set(MAY_CHANGE)
    if config.meta.schedule == "constant":
        may_change.add("num_steps")
    # A field that the checkpoint does not know is younger than it, and was at its default.
    now, then = _flatten(to_dict(config)), _flatten(to_dict(Config())) | _flatten(saved)
    return [
        f"--cfg.{key}: the checkpoint has {then.get(key)!r}, this command {now.get(key)!r}"
        for key in sorted(now.keys() | then.keys())
        if key not in may_change and now.get(key) != then.get(key)
    ]


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
