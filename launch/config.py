"""The configuration of a job. Importing it imports no other package; making one does."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import pkgutil
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import launch.configs
from launch.choices import KINDS, find, from_dict, name_of, suggest, thing, thing_from_dict, to_dict
from launch.own_modules import UnknownModuleError, faults_of, imported

if TYPE_CHECKING:
    from learned_opt import OptimizerConfig
    from meta_train.estimators import EstimatorConfig, Horizons
    from meta_train.meta_optimizers import MetaOptimizerConfig
    from tasks import TaskConfig

TRAINS = ("optimizer", "network", "policy")
META_LOSSES = ("train", "fresh", "validation", "both")
REDUCTIONS = ("mean", "last", "late", "telescoped")
SCALES = ("loss", "log")
WANDB_MODES = ("auto", "online", "offline", "disabled")


def task(name: str, /, **values: Any) -> TaskConfig:
    """The task of that name with these values, as ``--cfg.task=name --cfg.task.value=...``."""
    return thing("TaskConfig", name, **values)


def optimizer(name: str, /, **values: Any) -> OptimizerConfig:
    """The learned optimizer of that name with these values."""
    return thing("OptimizerConfig", name, **values)


def estimator(name: str, /, **values: Any) -> EstimatorConfig:
    """The gradient estimator of that name with these values."""
    return thing("EstimatorConfig", name, **values)


def meta_optimizer(name: str, /, **values: Any) -> MetaOptimizerConfig:
    """The meta-optimizer of that name with these values."""
    return thing("MetaOptimizerConfig", name, **values)


@dataclass(frozen=True)
class InnerConfig:
    """Inner training.

    Attributes:
      horizon: inner steps of an episode (the longest, if drawn).
      min_horizon: above 0: horizons log-uniform between this and horizon.
      meta_loss: train, fresh, validation, or both (train and validation): what a step's loss is
        measured on.
      reduction: mean, last (a run weighs as much as it has steps), late (every step counts, the
        last fifth most), or telescoped: the last loss as a sum of differences, every run weighing
        alike.
      loss_ceiling: losses above it, or not finite, count as it; 0: no ceiling.
      scale: loss, or log: the logarithm of its share of a constant predictor's loss, for tasks of
        different units.
      equal_runs: divide by each run's own horizon, so that long runs count no more than short ones.
    """

    horizon: int = 100
    min_horizon: int = 0
    meta_loss: str = "train"
    reduction: str = "mean"
    loss_ceiling: float = 0.0
    scale: str = "loss"
    equal_runs: bool = False

    def __post_init__(self):
        _check_choice("meta_loss", self.meta_loss, META_LOSSES)
        _check_choice("reduction", self.reduction, REDUCTIONS)
        _check_choice("scale", self.scale, SCALES)
        _check_least(1, horizon=self.horizon)
        _check_least(0, min_horizon=self.min_horizon, loss_ceiling=self.loss_ceiling)


@dataclass(frozen=True)
class WandbConfig:
    """What W&B is told of the run.

    Attributes:
      entity: team or user the run belongs to; empty: W&B's default.
      group: name under which runs stand together.
      tags: words to find it by, separated by commas.
      name: of the run; empty: that of the job's folder.
    """

    entity: str = ""
    group: str = ""
    tags: str = ""
    name: str = ""


@dataclass(frozen=True)
class Config:
    """A training job.

    Attributes:
      trains: optimizer: meta-training; network: the task's own parameters; policy: one for an
        environment.
      init_from: folder of a trained optimizer to start theta from, or the name of one in the
        package; empty: a fresh one.
      seed: of everything that is drawn.
      num_steps: outer steps.
      num_devices: local devices; 0: all (on a CPU, one virtual device per core).
      log_every: outer steps between rows of metrics.
      eval_every: outer steps between evaluations of theta itself; 0: never.
      eval_seeds: inner runs of an evaluation.
      validation: suite on which theta is evaluated too, the best being kept; empty: none.
      checkpoint_every: outer steps between checkpoints.
      keep_checkpoints: how many of the newest to keep.
      nonfinite_patience: outer steps without a finite particle after which to stop (the step that
        runs by then is finished first); 0: never.
      wandb_project: W&B project.
      wandb_mode: auto (online if logged in), online, offline or disabled.
      task: the inner problem.
      optimizer: the learned optimizer.
      estimator: the estimator of the meta-gradient.
      meta: the meta-optimizer.
    """

    trains: str = "optimizer"
    init_from: str = ""
    seed: int = 0
    num_steps: int = 1000
    num_devices: int = 0
    log_every: int = 10
    eval_every: int = 100
    eval_seeds: int = 8
    validation: str = ""
    checkpoint_every: int = 100
    keep_checkpoints: int = 3
    nonfinite_patience: int = 100
    wandb_project: str = "learned-opt"
    wandb_mode: str = "auto"
    wandb: WandbConfig = field(default_factory=WandbConfig)
    task: TaskConfig = field(default_factory=lambda: task("mlp"))
    optimizer: OptimizerConfig = field(default_factory=lambda: optimizer("mlp"))
    inner: InnerConfig = field(default_factory=InnerConfig)
    estimator: EstimatorConfig = field(default_factory=lambda: estimator("pes"))
    meta: MetaOptimizerConfig = field(default_factory=lambda: meta_optimizer("adam"))

    def __post_init__(self):
        _check_choice("trains", self.trains, TRAINS)
        _check_choice("wandb_mode", self.wandb_mode, WANDB_MODES)
        _check_least(
            1,
            num_steps=self.num_steps,
            log_every=self.log_every,
            eval_seeds=self.eval_seeds,
            checkpoint_every=self.checkpoint_every,
            keep_checkpoints=self.keep_checkpoints,
        )
        _check_least(
            0,
            num_devices=self.num_devices,
            eval_every=self.eval_every,
            nonfinite_patience=self.nonfinite_patience,
        )
        # Outer steps are counted in 32 bits.
        if self.num_steps >= 2**31:
            raise ValueError(f"`num_steps` must be at most {2**31 - 1}, got {self.num_steps}.")
        if not re.fullmatch(r"[^/\\#?%:]{1,128}", self.wandb_project):
            raise ValueError(
                "`wandb_project` must be a name of 1 to 128 characters, as W&B has it, none of / "
                f"\\ # ? % :, got {self.wandb_project!r}."
            )
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"`seed` must be between 0 and {2**32 - 1}, got {self.seed}.")
        if self.meta.warmup >= self.num_steps:
            raise ValueError(
                f"`meta.warmup` must be below --cfg.num_steps={self.num_steps}, got "
                f"{self.meta.warmup}: the rate would still be rising at the end. Give "
                f"--cfg.meta.warmup={self.num_steps // 10}, or --cfg.num_steps="
                f"{10 * self.meta.warmup} or more."
            )
        if self.trains != "optimizer" and len(self.task.parts) > 1:
            raise ValueError(
                f"`trains`={self.trains} trains one task's {self.trains}; choose one task."
            )
        if self.trains == "network" and self.inner.horizon != 1:
            raise ValueError(
                f"`trains`=network needs inner.horizon=1, got {self.inner.horizon}: a step of "
                "supervised training is a whole episode. Set estimator.truncation=1 too."
            )
        drawn = {"horizon"} if self.trains == "network" else {"horizon", "min_horizon"}
        unread = [
            f.name
            for f in dataclasses.fields(InnerConfig)
            if f.name not in drawn and getattr(self.inner, f.name) != f.default
        ]
        if self.trains != "optimizer" and unread:
            raise ValueError(
                f"`inner.{unread[0]}` is for trains=optimizer, got "
                f"{getattr(self.inner, unread[0])} for a {self.trains}, which has no inner runs."
            )
        if self.trains != "optimizer" and self.init_from:
            raise ValueError(
                f"`init_from` is for trains=optimizer, got {self.init_from!r} for a {self.trains}."
            )
        if self.validation:
            self._check_validation()
        if self.estimator.needs_reversible and self.inner.reduction == "telescoped":
            raise ValueError(
                "`inner.reduction`=telescoped cannot be walked back by a reversible estimator. "
                "Set inner.reduction=last: the same loss."
            )
        if self.estimator.needs_reversible and (
            self.inner.scale != "loss" or self.inner.equal_runs or self.inner.reduction == "late"
        ):
            raise ValueError(
                "`inner.scale`=log, `inner.equal_runs` and `inner.reduction`=late are not for a "
                "reversible estimator, whose runs are walked back; leave them out."
            )
        if self.estimator.plain_descent and not self.meta.plain_descent:
            raise ValueError(
                "`meta` must be plain gradient descent for this estimator, which tries such steps, "
                f"but the meta-optimizer would take others ({self.meta}). Set meta=sgd with a "
                "constant rate and no clipping, or another mode of the estimator."
            )
        self.horizons()

    def _check_validation(self) -> None:
        from launch.suites import TO_CHOOSE_BY

        if self.validation == "heldout":
            raise ValueError(
                "`validation` must not be heldout, by which nothing may be chosen; take "
                "validation=validation."
            )
        _check_choice("validation", self.validation, TO_CHOOSE_BY)
        if self.trains != "optimizer" or not self.eval_every:
            raise ValueError(
                "`validation` is for trains=optimizer with eval_every above 0, got "
                f"trains={self.trains}, eval_every={self.eval_every}; set them, or leave it empty."
            )

    def horizons(self) -> Horizons:
        """The distribution of episode lengths."""
        from meta_train.estimators.horizons import fixed_horizon, log_uniform_horizons

        inner, multiple = self.inner, self.estimator.horizon_multiple
        if inner.horizon % multiple:
            near = max(1, round(inner.horizon / multiple)) * multiple
            raise ValueError(
                "`inner.horizon` must be a multiple of the estimator's `truncation` (what it works "
                f"through at once), got inner.horizon={inner.horizon} and {multiple}; after its "
                "end an episode would idle to the end of its truncation. Set "
                f"inner.horizon={near}, or another truncation."
            )
        if not inner.min_horizon:
            return fixed_horizon(inner.horizon)
        return log_uniform_horizons(inner.min_horizon, inner.horizon, multiple)

    def inner_steps(self) -> float:
        """Forward inner steps of one outer step, all particles counted; on average."""
        running = self.task.mixing.get("drawn") or len(self.task.parts)
        return running * self.estimator.inner_steps(self.inner.horizon)


def task_names(config: TaskConfig) -> list[str]:
    """What to call each part of a task: its own name, numbered where several have the same."""
    given = getattr(config, "names", ())
    if given:
        return list(given)
    found = [name_of(part) for part in config.parts]
    return [
        name if found.count(name) == 1 else f"{name}_{found[: i + 1].count(name)}"
        for i, name in enumerate(found)
    ]


def _check_choice(name: str, value: str, valid: tuple[str, ...]) -> None:
    if value not in valid:
        hint = suggest(str(value), valid)
        raise ValueError(f"`{name}` must be one of {', '.join(valid)}, got {value!r}.{hint}")


def _check_least(minimum: int, **values: float) -> None:
    for name, value in values.items():
        if not value >= minimum:
            raise ValueError(f"`{name}` must be at least {minimum}, got {value}.")


# What may change when a job continues: it leaves the trajectory of theta as it was.
MAY_CHANGE = {
    "num_devices",
    "log_every",
    "eval_every",
    "eval_seeds",
    "checkpoint_every",
    "keep_checkpoints",
    "nonfinite_patience",
    "wandb_project",
    "wandb_mode",
    *(f"wandb.{field.name}" for field in dataclasses.fields(WandbConfig)),
    "estimator.chunk",
    "estimator.base.chunk",
}


def preset_names() -> list[str]:
    """Names of the files in ``launch/configs``."""
    return sorted(module.name for module in pkgutil.iter_modules(launch.configs.__path__))


def optimizer_presets() -> dict[str, str]:
    """Presets of ``launch/configs/digits.py``: their names, to those of their optimizers."""
    return {f"{name}_digits": name for name in KINDS["OptimizerConfig"].things()}


def load_preset(name: str) -> Config:
    """The configuration of a preset, from ``get_config`` of a file of ``launch/configs``.

    Or of any module, by its dotted name.

    Raises:
      ValueError: on an unknown name.
    """
    if name in preset_names():
        return importlib.import_module(f"launch.configs.{name}").get_config()
    if name in optimizer_presets():
        return importlib.import_module("launch.configs.digits").get_config(
            optimizer_presets()[name]
        )
    try:
        module = imported(name)
    except UnknownModuleError:
        names = preset_names()
        raise ValueError(
            f"--preset must be one of {', '.join(names)}, OPTIMIZER_digits, or a module of your "
            f"own with `get_config`, mypkg.mymod as Python imports it, got {name!r}."
            f"{suggest(name, [*names, *optimizer_presets()])}"
        ) from None
    except ValueError as error:
        raise ValueError(f"--preset {error}") from error.__cause__
    if not hasattr(module, "get_config"):
        raise ValueError(
            f"--preset names the module {name!r}, which has no function `get_config`; it must "
            "return a launch.config.Config."
        )
    with faults_of(f"--preset={name}: its `get_config`, called without arguments, ended"):
        config = module.get_config()
    if not isinstance(config, Config):
        raise ValueError(
            f"--preset={name}: its `get_config` must return a launch.config.Config, got "
            f"{type(config).__name__}."
        )
    return config


def read_config(tree: Mapping[str, Any], where: str = "config.json") -> Config:
    """The configuration that ``to_dict`` wrote, in this version or an older one.

    Raises:
      ValueError: naming the field, if it cannot be read.
    """
    with _no_other_error(where):
        if "optimizer" in tree.get("meta", {}):
            tree = _from_flat(tree)
        return from_dict(Config, tree, where)


def read_task(tree: Mapping[str, Any], where: str) -> TaskConfig:
    """The task that ``to_dict`` wrote, in this version or an older one.

    Raises:
      ValueError: naming the field, if it cannot be read.
    """
    with _no_other_error(where):
        # Before things configured themselves, every task had the fields of all.
        flat = {"batch_size", "dataset", "hidden_sizes", "activation", "standardize"} <= set(tree)
        old = flat and {"dim", "condition", "noise"} <= set(tree)
        return thing_from_dict("TaskConfig", known("TaskConfig", tree) if old else tree, where)


@contextlib.contextmanager
def _no_other_error(where: str) -> Iterator[None]:
    """What a file that is no configuration makes fail, as the ``ValueError`` that it is."""
    try:
        yield
    except (
        TypeError,
        AttributeError,
        KeyError,
        IndexError,
        OverflowError,
        RecursionError,
    ) as error:
        raise ValueError(
            f"{where} holds no configuration that this version wrote "
            f"({type(error).__name__}: {error})."
        ) from None


def contradictions(config: Config, saved: Mapping[str, Any]) -> list[str]:
    """Where ``config`` would leave the trajectory of the job saved with ``saved``.

    More steps may be asked for, unless the learning-rate schedule depends on their number.
    """
    may_change = set(MAY_CHANGE)
    if config.meta.schedule == "constant":
        may_change.add("num_steps")
    now, then = flattened(to_dict(config)), flattened(to_dict(read_config(saved)))
    return [
        f"--cfg.{key.removesuffix('.name')}: the checkpoint has {then.get(key)!r}, this command "
        f"{now.get(key)!r}"
        for key in sorted(now.keys() | then.keys())
        if key not in may_change and now.get(key) != then.get(key)
    ]


def flattened(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """What ``to_dict`` wrote, by paths with dots between."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= flattened(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def _from_flat(tree: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration from before things configured themselves.

    It had one set of fields for all tasks, one for all optimizers and one for all estimators;
    those that the named one does not have were read by nobody.
    """
    tree = dict(tree)
    hybrid, old = dict(tree.pop("hybrid", {})), dict(tree["estimator"])
    if "guided_alpha" in old:
        old["alpha"] = old["guided_alpha"]
    if old["name"] == "hybrid_es":
        found = hybrid | {
            "name": "hybrid_es",
            "base": known("EstimatorConfig", old | {"name": hybrid["base"]}),
        }
        for name in ("sigma", "sampler"):
            found[name] = hybrid[name] or old[name]
        tree["estimator"] = found
    else:
        tree["estimator"] = known("EstimatorConfig", old)
    meta = dict(tree["meta"])
    tree["meta"] = meta | {"name": meta.pop("optimizer")}
    return tree | {
        "task": known("TaskConfig", tree["task"]),
        "optimizer": known("OptimizerConfig", tree["optimizer"]),
    }


def known(base: str, tree: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of a flat ``tree`` that the thing it names has fields for."""
    cls: Any = find(KINDS[base], tree["name"], importing=False)
    fields = {field.name for field in dataclasses.fields(cls)}
    return {name: value for name, value in tree.items() if name == "name" or name in fields}
