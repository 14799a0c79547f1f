"""Hybrid-ES as an estimator of meta-gradients: the MLP optimizer at equal inner compute.

    python -m launch.reproduce hybrid_es_meta --workdir=DIR

The setting of ``learned_optimizer``. Every ``r``-th outer step is one of TBPTT (so ``r = 1`` is
TBPTT itself); in between, 8 mirrored pairs around the stale gradient, each over one whole
inner run, correct it (mode ``control_variate``). The last gradient repeated instead
(``stale``) is the control. Inner steps count forward; those of TBPTT also go backward, so
the second panel shows processor time.
"""

import dataclasses
from functools import partial

import matplotlib
import numpy as np

from launch import config as cfg
from launch.studies.base import Claim, Result, Study
from launch.studies.optimizers import learned_optimizer as study
from launch.studies.optimizers.learned_optimizer import MetaCurves, MetaTrainingSetting
from launch.studies.shared import plots

INTERVALS = (1, 2, 3, 5, 10)
QUICK_INTERVALS = (1, 3)
STALE = 5
STALE_LABEL = f"stale, r = {STALE}"
CANDIDATES_PER_WORKER, NUM_WORKERS = 8, 2
FULL = study.FULL._replace(inner_steps=19_200, num_records=10)
QUICK = study.QUICK._replace(num_records=2)
BESIDE = ("PES", "truncated ES")


def hybrid_config(setting: MetaTrainingSetting, refresh_every: int, mode: str) -> cfg.Config:
    """The job of TBPTT, with a gradient at every ``refresh_every``-th step only."""
    config = study.job_config("TBPTT", setting)
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
    setting, intervals = (QUICK, QUICK_INTERVALS) if quick else (FULL, INTERVALS)
    configs = {label(r): hybrid_config(setting, r, "control_variate") for r in intervals}
    configs[STALE_LABEL] = hybrid_config(setting, STALE, "stale")
    if not quick:
        configs |= {name: study.job_config(name, setting) for name in BESIDE}
    shades = matplotlib.colormaps["viridis"](np.linspace(0, 0.85, len(intervals)))
    colors = {label(r): shade for r, shade in zip(intervals, shades, strict=True)} | plots.COLORS
    colors |= {STALE_LABEL: plots.COLORS["stale"], label(1): plots.COLORS["TBPTT"]}
    return study.result(configs, setting, partial(claims, intervals), colors)


def label(refresh_every: int) -> str:
    return "TBPTT (r = 1)" if refresh_every == 1 else f"H-ES, r = {refresh_every}"


def claims(intervals: tuple[int, ...], curves: dict[str, MetaCurves]) -> list[Claim]:
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


STUDY = Study("Hybrid-ES: meta-gradients for the MLP optimizer, beside TBPTT, PES and ES", 6.0, run)
