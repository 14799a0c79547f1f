"""The MLP optimizer meta-trained with five estimators at equal inner compute.

    python -m launch.reproduce learned_optimizer --workdir=DIR

The settings of the preset mlp_digits (digits MLP, 16 antithetic pairs or 32 runs, horizon 100,
truncation 20, sigma 0.01, Adam at 1e-3 on clipped meta-gradients), with a constant learning
rate. The meta-loss is that of theta itself, unperturbed: the mean training loss of whole inner
runs with fixed keys, the same for all. Equal inner compute is equal forward inner steps, all
particles counted, and the unperturbed run of each pair of truncated ES; the backward passes of
TBPTT show in the processor time. (At equal *outer* steps truncated ES is ahead of PES here:
over five truncations an episode its bias costs less than the noise that PES adds to avoid it.)
"""

import dataclasses
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.flatten_util import ravel_pytree
from matplotlib.figure import Figure

from launch import config as cfg
from launch.choices import to_dict
from launch.evaluation.one_task import describe
from launch.job import Job, build
from launch.studies.base import Claim, Result, Study
from launch.studies.shared import plots
from launch.studies.shared.compare import by_name, in_parallel
from learned_opt import OptimizerConfig
from meta_train import devices, evaluate, trainer
from meta_train.progress import progress
from meta_train.unroll import theta_tree
from tasks import TaskConfig

ESTIMATORS = {
    "PES": "pes",
    "NRES": "nres",
    "truncated ES": "truncated_es",
    "full ES": "full_es",
    "TBPTT": "tbptt",
}
BASE = cfg.load_preset("mlp_digits")
HORIZON = BASE.inner.horizon
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
    return dataclasses.replace(
        BASE,
        task=setting.task,
        optimizer=setting.optimizer,
        estimator=cfg.estimator(ESTIMATORS[name], num_particles=32),
        meta=dataclasses.replace(BASE.meta, schedule="constant"),
    )


class MetaCurves(NamedTuple):
    """Of one estimator, ``[seeds, records + 1]``: meta-losses, processor seconds of outer steps."""

    losses: np.ndarray
    seconds: np.ndarray


def evaluation(setting: MetaTrainingSetting) -> Callable[[jax.Array], float]:
    """``theta -> meta-loss`` of whole inner runs under theta itself, always the same ones."""
    task, optimizer = setting.task.make(), setting.optimizer.make()
    tree = theta_tree(jax.eval_shape(optimizer.init, jax.random.key(0)))

    @jax.jit
    def mean_loss(theta):
        return evaluate.inner_curves(
            task, optimizer, tree(theta), HORIZON, EVALUATIONS, EVALUATION_SEED
        ).mean()

    return lambda theta: float(mean_loss(theta))


def compiled(config: cfg.Config) -> tuple[Job, Callable[[int], Any]]:
    """The job with its step compiled, and ``seed -> state``, placed as the step takes it."""
    job = build(config, None)

    @jax.jit
    def init(seed):
        def theta(key):
            return ravel_pytree(job.trainable.init(key))[0]

        return trainer.init_state(job.one_device_estimator, job.meta_optimizer, theta, seed)

    def start(seed):
        return devices.place(init(seed), job.num_devices, job.axes)

    spec = devices.placed_spec(jax.eval_shape(init, 0), job.num_devices, job.axes)
    return job._replace(step=job.step.lower(spec).compile()), start


def meta_train(
    label: str,
    job: Job,
    start: Callable[[int], Any],
    setting: MetaTrainingSetting,
    meta_loss: Callable[[jax.Array], float],
) -> MetaCurves:
    """Runs the job once for each seed; progress is shown under the label."""
    per_record = setting.inner_steps / job.config.inner_steps()
    ends = [round(record * per_record) for record in range(setting.num_records + 1)]
    curves = MetaCurves(*np.zeros((2, setting.num_seeds, len(ends))))
    for seed in range(setting.num_seeds):
        state, done, spent = start(seed), 0, 0.0
        for record, end in enumerate(progress(ends, desc=f"{label}, seed {seed}", leave=False)):
            began = time.process_time()  # Of all threads; other programs hardly lengthen it.
            for _ in range(end - done):
                state, metrics = job.step(state)
                jax.block_until_ready(metrics)  # See `devices.max_in_flight`.
            spent, done = spent + time.process_time() - began, end
            curves.losses[seed, record] = meta_loss(devices.first_replica(state.theta))
            curves.seconds[seed, record] = spent
    return curves


def result(
    configs: dict[str, cfg.Config],
    setting: MetaTrainingSetting,
    claims: Callable[[dict[str, MetaCurves]], list[Claim]],
    colors: Mapping[str, Any],
) -> Result:
    """Meta-trains all jobs; the table has medians over seeds."""
    devices.configure_cpu_devices()
    meta_loss = evaluation(setting)
    jobs = in_parallel({name: partial(compiled, config) for name, config in configs.items()})
    curves = {
        name: meta_train(name, job, start, setting, meta_loss)
        for name, (job, start) in jobs.items()
    }
    inner_steps = setting.inner_steps * np.arange(setting.num_records + 1)
    last = int(inner_steps[-1])
    table = [
        {
            "estimator": name,
            "seeds": len(found.losses),
            "outer steps": round(last / configs[name].inner_steps()),
            "inner steps": last,
            "processor s": float(np.median(found.seconds[:, -1])),
            "meta-loss before": float(np.median(found.losses[:, 0])),
            "after": float(np.median(found.losses[:, -1])),
            "worst": float(found.losses[:, -1].max()),
        }
        for name, found in curves.items()
    ]
    data = {"inner_steps": inner_steps} | {
        field: by_name(curves, field) for field in MetaCurves._fields
    }
    caption = (
        f"{describe(to_dict(setting.task))}; T = {HORIZON}; mean training loss of {EVALUATIONS} "
        f"runs under theta itself; line: median, band: range of {setting.num_seeds} seeds"
    )
    return Result(claims(curves), table, draw(inner_steps, curves, colors), data, caption)


def run(quick: bool, data_dir: str | None) -> Result:
    del data_dir
    setting = QUICK if quick else FULL
    configs = {name: job_config(name, setting) for name in ESTIMATORS}
    return result(configs, setting, claims, plots.COLORS)


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


def draw(inner_steps: np.ndarray, curves: dict[str, MetaCurves], colors) -> Figure:
    """Meta-loss against inner steps and processor time: medians, and ranges over seeds."""
    figure, (left, right) = plots.panels(2, (8.6, 3.6), sharey=True)
    for name, found in curves.items():
        seconds = np.median(found.seconds, axis=0)
        for axes, x in ((left, inner_steps / 1000), (right, seconds)):
            plots.band(axes, x, found.losses, color=colors[name], label=name)
    left.set(
        xlim=(0, None),
        xlabel="inner steps of all particles (thousands)",
        ylabel="meta-loss (nats, mean of an episode)",
        title="Equal inner compute",
    )
    right.set(xlim=(0, None), xlabel="processor time of outer steps (s)", title="What they cost")
    right.legend()
    return figure


STUDY = Study(
    "the MLP optimizer by PES, NRES, ES and TBPTT at equal inner compute (Vicol 2021, 5)", 8.0, run
)
