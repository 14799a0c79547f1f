"""The MLP optimizer meta-trained with five estimators at equal inner compute.

    python -m launch.reproduce learned_optimizer --workdir=DIR

The settings of the demo (digits MLP, 16 antithetic pairs or 32 runs, horizon 100, truncation
20, sigma 0.01, Adam at 1e-3 on clipped meta-gradients), with a constant learning rate. The
meta-loss is that of theta itself, unperturbed: the mean training loss of whole inner runs
with fixed keys, the same for all. Equal inner compute is equal forward inner steps, all
particles counted, and the unperturbed run of each pair of truncated ES; the backward passes
of TBPTT show in the processor time. (At equal *outer* steps truncated ES is ahead of PES here:
over five truncations an episode its bias costs less than the noise that PES adds to avoid it.)
"""

import dataclasses
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.flatten_util import ravel_pytree
from matplotlib.figure import Figure

from launch import config as cfg
from launch.choices import to_dict
from launch.studies.base import Claim, Result, Study
from launch.studies.shared import plots
from launch.studies.shared.compare import by_name
from launch.trainables import make_system
from learned_opt import OptimizerConfig
from meta_train import devices, estimators, evaluate, trainer
from meta_train.progress import progress
from meta_train.unroll import with_flat_theta
from tasks import TaskConfig

ESTIMATORS = {
    "PES": "pes",
    "NRES": "nres",
    "truncated ES": "truncated_es",
    "full ES": "full_es",
    "TBPTT": "tbptt",
}
HORIZON = cfg.load_preset("demo").inner.horizon
EVALUATIONS, EVALUATION_SEED = 32, 1000


class MetaTrainingSetting(NamedTuple):
    """How much is run: inner steps of a run between two records, records, seeds; the task."""

    inner_steps: int
    num_records: int
    num_seeds: int
    task: TaskConfig
    optimizer: OptimizerConfig


# Between records every estimator takes whole outer steps: of 640, 960 and 3,200 inner steps.
FULL = MetaTrainingSetting(28_800, 12, 3, cfg.task("mlp"), cfg.optimizer("mlp"))
QUICK = MetaTrainingSetting(
    9_600,
    4,
    2,
    cfg.task("mlp", hidden_sizes=(8,), batch_size=16),
    cfg.optimizer("mlp", hidden_sizes=(16,)),
)


def job_config(name: str, setting: MetaTrainingSetting) -> cfg.Config:
    """The job of the demo with another estimator, at a constant learning rate."""
    demo = cfg.load_preset("demo")
    return dataclasses.replace(
        demo,
        task=setting.task,
        optimizer=setting.optimizer,
        estimator=cfg.estimator(ESTIMATORS[name], num_particles=32),
        meta=dataclasses.replace(demo.meta, schedule="constant"),
    )


class MetaCurves(NamedTuple):
    """Of one estimator, ``[seeds, records + 1]``: meta-losses, processor seconds of outer steps."""

    losses: np.ndarray
    seconds: np.ndarray


def evaluation(setting: MetaTrainingSetting) -> Callable[[jax.Array], float]:
    """``theta -> meta-loss`` of whole inner runs under theta itself, always the same ones."""
    task, optimizer = setting.task.make(), setting.optimizer.make()
    unravel = ravel_pytree(optimizer.init(jax.random.key(0)))[1]

    @jax.jit
    def mean_loss(theta):
        return evaluate.inner_curves(
            task, optimizer, unravel(theta), HORIZON, EVALUATIONS, EVALUATION_SEED
        ).mean()

    return lambda theta: float(mean_loss(theta))


def meta_train(
    label: str,
    config: cfg.Config,
    setting: MetaTrainingSetting,
    meta_loss: Callable[[jax.Array], float],
) -> MetaCurves:
    """Runs the job once for each seed; progress is shown under the label."""
    task, optimizer = config.task.make(), config.optimizer.make()
    theta_spec = jax.eval_shape(optimizer.init, jax.random.key(0))
    system, _ = with_flat_theta(make_system(config, task, optimizer), theta_spec)
    context = estimators.Context(
        devices.default_chunk(),
        estimators.Exchange(devices.device_tree_mean, devices.device_gather),
        learning_rate=config.meta.learning_rate,
    )
    estimator = config.estimator.make(system, config.horizons(), context)
    meta_optimizer = config.meta.make(config.num_steps)
    num_devices = devices.choose_num_devices(0, *config.estimator.shards)
    axes = trainer.state_axes(estimator)
    step = devices.population_map(
        trainer.make_step(estimator, meta_optimizer, devices.device_mean), num_devices, axes
    )

    def init_theta(key):
        return ravel_pytree(optimizer.init(key))[0]

    @jax.jit
    def init(seed):
        return trainer.init_state(estimator, meta_optimizer, init_theta, seed)

    def steps(state, num_steps):
        began = time.process_time()  # Of all threads; other programs hardly lengthen it.
        for _ in range(num_steps):
            state, metrics = step(state)
            jax.block_until_ready(metrics)  # See `devices.max_in_flight`.
        return state, time.process_time() - began

    def start(seed):
        return devices.place(init(seed), num_devices, axes)

    steps(start(0), 1)  # Compiles.
    per_record = setting.inner_steps / config.inner_steps()
    ends = [round(record * per_record) for record in range(setting.num_records + 1)]
    shape = setting.num_seeds, setting.num_records + 1
    curves = MetaCurves(np.zeros(shape), np.zeros(shape))
    for seed in range(setting.num_seeds):
        state, spent = start(seed), 0.0
        for record in progress(range(shape[1]), desc=f"{label}, seed {seed}", leave=False):
            if record:
                state, seconds = steps(state, ends[record] - ends[record - 1])
                spent += seconds
            curves.losses[seed, record] = meta_loss(devices.first_replica(state.theta))
            curves.seconds[seed, record] = spent
    return curves


def run(quick: bool, data_dir: str | None) -> Result:
    del data_dir
    setting = QUICK if quick else FULL
    configs = {name: job_config(name, setting) for name in ESTIMATORS}
    curves = meta_train_all(configs, setting)
    return Result(
        claims(curves),
        rows(setting, configs, curves),
        draw(setting, curves, plots.COLORS),
        data(setting, curves),
        caption(setting),
    )


def caption(setting: MetaTrainingSetting) -> str:
    """What the figure is of."""
    facts = ", ".join(f"{name} {value}" for name, value in to_dict(setting.task).items())
    return (
        f"task: {facts}; T = {HORIZON}; mean training loss of {EVALUATIONS} runs under "
        f"theta itself; line: median, band: range of {setting.num_seeds} seeds"
    )


def meta_train_all(
    configs: dict[str, cfg.Config], setting: MetaTrainingSetting
) -> dict[str, MetaCurves]:
    devices.configure_cpu_devices()
    meta_loss = evaluation(setting)
    return {name: meta_train(name, config, setting, meta_loss) for name, config in configs.items()}


def data(setting: MetaTrainingSetting, curves: dict[str, MetaCurves]) -> dict[str, Any]:
    return {
        "inner_steps": setting.inner_steps * np.arange(setting.num_records + 1),
        "meta_loss": by_name(curves, "losses"),
        "seconds": by_name(curves, "seconds"),
    }


def rows(
    setting: MetaTrainingSetting, configs: dict[str, cfg.Config], curves: dict[str, MetaCurves]
) -> list[dict[str, Any]]:
    """The table: medians over seeds."""
    inner_steps = setting.inner_steps * setting.num_records
    return [
        {
            "estimator": name,
            "seeds": len(found.losses),
            "outer steps": round(inner_steps / configs[name].inner_steps()),
            "inner steps": inner_steps,
            "processor s": float(np.median(found.seconds[:, -1])),
            "meta-loss before": float(np.median(found.losses[:, 0])),
            "after": float(np.median(found.losses[:, -1])),
            "worst": float(found.losses[:, -1].max()),
        }
        for name, found in curves.items()
    ]


def claims(curves: dict[str, MetaCurves]) -> list[Claim]:
    first = {name: found.losses[:, 0] for name, found in curves.items()}
    last = {name: found.losses[:, -1] for name, found in curves.items()}
    online = [name for name in curves if name != "full ES"]

    def said(*names: str) -> str:
        ends = (f"{name} {', '.join(f'{x:.3f}' for x in last[name])}" for name in names)
        return "meta-losses at the end, by seed: " + "; ".join(ends)

    return [
        Claim(
            "Every estimator improves the optimizer it starts from, with every seed.",
            all(bool((last[name] < first[name]).all()) for name in curves),
            said(*curves) + "; before: " + ", ".join(f"{x:.3f}" for x in first["PES"]),
        ),
        Claim(
            "Updates after every truncation beat full ES, which waits for whole episodes.",
            all(bool((last[name] < last["full ES"]).all()) for name in online),
            said(*curves),
        ),
        Claim(
            "PES ends below truncated ES, which spends a third of its inner steps on unperturbed "
            "runs.",
            bool((last["PES"] < last["truncated ES"]).all()),
            said("PES", "truncated ES"),
        ),
        Claim(
            "On this smooth problem TBPTT needs the fewest inner steps: its gradients have no "
            "perturbation noise, and 20 of 100 steps tell which way to go.",
            all(bool((last["TBPTT"] < last[name]).all()) for name in curves if name != "TBPTT"),
            said(*online),
        ),
    ]


def draw(
    setting: MetaTrainingSetting, curves: dict[str, MetaCurves], colors: Mapping[str, Any]
) -> Figure:
    """Meta-loss against inner steps and processor time: medians, and ranges over seeds."""
    figure, (left, right) = plots.panels(2, (8.6, 3.6), sharey=True)
    inner_steps = setting.inner_steps / 1000 * np.arange(setting.num_records + 1)
    for name, found in curves.items():
        for axes, x in ((left, inner_steps), (right, np.median(found.seconds, axis=0))):
            plots.band(axes, x, found.losses, color=colors[name], label=name)
            axes.set_xlim(0, None)
    left.set(
        xlabel="inner steps of all particles (thousands)",
        ylabel="meta-loss (nats, mean of an episode)",
    )
    right.set_xlabel("processor time of outer steps (s)")
    right.legend()
    return figure


STUDY = Study(
    "the MLP optimizer by PES, NRES, ES and TBPTT at equal inner compute (Vicol 2021, 5)", 8.0, run
)
