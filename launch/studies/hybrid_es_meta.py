"""Hybrid-ES as an estimator of meta-gradients: the MLP optimizer at equal inner compute.

    python -m launch.reproduce hybrid_es_meta --workdir=DIR

The setting of ``learned_optimizer``. Every ``r``-th outer step is one of TBPTT (so ``r = 1`` is
TBPTT itself); in between, 8 mirrored pairs around the stale gradient, each over one whole
inner run, correct it (mode ``control_variate``). The last gradient repeated instead
(``stale``) is the control. Inner steps count forward; those of TBPTT also go backward, so
the second panel shows time.
"""

import dataclasses
from typing import Any

import matplotlib
import numpy as np

from launch import config as cfg
from launch.studies.base import Claim, Result, Study
from launch.studies.optimizers import learned_optimizer as study
from launch.studies.optimizers.learned_optimizer import Curves, Scale
from meta_train import devices

INTERVALS = (1, 2, 3, 5, 10)
QUICK_INTERVALS = (1, 3)
STALE = 5
STALE_LABEL = f"stale, r = {STALE}"
CANDIDATES_PER_WORKER, NUM_WORKERS = 8, 2
FULL = study.FULL._replace(inner_steps=19_200, num_records=10)
QUICK = study.QUICK
BESIDE = ("PES", "truncated ES")


def hybrid_config(scale: Scale, refresh_every: int, mode: str) -> cfg.Config:
    """The job of TBPTT, with a gradient at every ``refresh_every``-th step only."""
    config = study.job_config("TBPTT", scale)
    if refresh_every == 1:
        return config
    return dataclasses.replace(
        config,
        estimator=cfg.estimator(
            "hybrid_es",
            base=config.estimator,
            refresh_every=refresh_every,
            num_workers=NUM_WORKERS,
            candidates_per_worker=CANDIDATES_PER_WORKER,
            mode=mode,
        ),
    )


def run(quick: bool, data_dir: str | None) -> Result:
    del data_dir
    devices.configure_cpu_devices()
    scale, intervals = (QUICK, QUICK_INTERVALS) if quick else (FULL, INTERVALS)
    configs = {label(r): hybrid_config(scale, r, "control_variate") for r in intervals}
    configs[STALE_LABEL] = hybrid_config(scale, STALE, "stale")
    configs |= {name: study.job_config(name, scale) for name in BESIDE}
    meta_loss = study.evaluation(scale)
    curves = {
        name: study.meta_train(name, config, scale, meta_loss) for name, config in configs.items()
    }
    inner_steps = scale.inner_steps * np.arange(scale.num_records + 1)
    return Result(
        claims=claims(curves, intervals),
        table=[row(name, scale, configs[name], found) for name, found in curves.items()],
        figure=study.draw(inner_steps, curves, colors(curves, intervals)),
        data={
            "inner_steps": inner_steps.tolist(),
            "meta_loss": {name: found.losses.tolist() for name, found in curves.items()},
            "seconds": {name: found.seconds.tolist() for name, found in curves.items()},
        },
    )


def label(refresh_every: int) -> str:
    return "TBPTT (r = 1)" if refresh_every == 1 else f"H-ES, r = {refresh_every}"


def row(name: str, scale: Scale, config: cfg.Config, found: Curves) -> dict[str, Any]:
    """One line of the table: medians over seeds."""
    inner_steps = scale.inner_steps * scale.num_records
    return {
        "estimator": name,
        "seeds": len(found.losses),
        "outer steps": round(inner_steps / config.inner_steps()),
        "seconds": float(np.median(found.seconds[:, -1])),
        "meta-loss before": float(np.median(found.losses[:, 0])),
        "after": float(np.median(found.losses[:, -1])),
        "worst": float(found.losses[:, -1].max()),
    }


def claims(curves: dict[str, Curves], intervals: tuple[int, ...]) -> list[Claim]:
    last = {name: found.losses[:, -1] for name, found in curves.items()}
    median = {name: float(np.median(losses)) for name, losses in last.items()}
    hybrids = [label(r) for r in intervals if r > 1]
    said = "median meta-loss: " + ", ".join(f"{name} {x:.3f}" for name, x in median.items())
    return [
        Claim(
            "Hybrid-ES improves the optimizer it starts from, at every r and with every seed.",
            all(bool((last[name] < curves[name].losses[:, 0]).all()) for name in hybrids),
            said,
        ),
        Claim(
            "At equal inner steps the search does not pay here: TBPTT at every step ends lower, "
            "and so does its gradient repeated, which takes none.",
            all(max(median[label(1)], median[STALE_LABEL]) <= median[name] for name in hybrids),
            said,
        ),
    ]


def colors(curves: dict[str, Curves], intervals: tuple[int, ...]) -> dict[str, Any]:
    """Shades for r, and the colors of ``learned_optimizer``."""
    shades = matplotlib.colormaps["viridis"](np.linspace(0, 0.85, len(intervals)))
    return {name: study.COLORS.get(name, "gray") for name in curves if name.startswith("stale")} | {
        name: study.COLORS.get(name) or shades[[label(r) for r in intervals].index(name)]
        for name in curves
        if not name.startswith("stale")
    }


STUDY = Study(
    "Hybrid-ES: meta-gradients for the MLP optimizer at r = 1 to 10, beside TBPTT, PES and ES",
    6.0,
    run,
)
