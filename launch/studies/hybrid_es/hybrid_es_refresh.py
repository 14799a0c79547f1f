"""Hybrid-ES: how rarely a gradient will do. Accuracy against r, beside the controls.

python -m launch.reproduce hybrid_es_refresh --workdir=DIR [--data_dir=DIR]
"""

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from launch.studies.base import Claim, Result, Study
from launch.studies.hybrid_es import hybrid_training as training
from launch.studies.hybrid_es.hybrid_training import Curve
from launch.studies.shared import plots

NUM_STEPS = 300
RATE = 1.0
INTERVALS = (1, 2, 3, 5, 10, 20)
QUICK_INTERVALS = (1, 3, 10)
# Method: mode, sigma in deviations of the gradient's components, further arguments, style.
METHODS: dict[str, tuple[str, float, dict[str, Any], tuple[str, str]]] = {
    "H-ES, ranked, mirrored, sigma 3": ("select", 3.0, {}, (plots.VERMILION, "o-")),
    "H-ES, best candidate, sigma 1": (
        "select",
        1.0,
        {"combine": "argmin", "antithetic": False},
        (plots.BLUE, "s-"),
    ),
    "stale": ("stale", 1.0, {}, ("black", "^--")),
    "skip": ("skip", 1.0, {}, ("gray", "v:")),
}
RANKED, BEST, STALE, SKIP = METHODS


def run(quick: bool, data_dir: str | None) -> Result:
    problem = training.problem(data_dir)
    intervals, seeds = (QUICK_INTERVALS, 2) if quick else (INTERVALS, 5)
    found: dict[str, dict[int, Curve]] = {name: {} for name in METHODS}
    for r in intervals:
        for name, (mode, sigma, how, _) in METHODS.items():
            if r == 1 and name != RANKED:  # Gradient descent, whatever the method.
                found[name][r] = found[RANKED][r]
                continue
            train = training.trainer(
                problem, NUM_STEPS, RATE, NUM_STEPS, mode=mode, refresh_every=r, **how
            )
            found[name][r] = training.last(train, (sigma,), seeds, f"{name}, r = {r}")
    table = [
        {"r": r, "method": name, "gradients": -(-NUM_STEPS // r)}
        | training.columns(curves[r])
        | {"train loss": float(curves[r].loss.mean())}
        for r in intervals
        for name, curves in found.items()
    ]
    caption = training.caption(data_dir, NUM_STEPS, f"line: mean, band: range of {seeds} seeds")
    return Result(claims(found), table, draw(intervals, found), found, caption)


def claims(found) -> list[Claim]:
    def train(name, r):
        return float(found[name][r].train.mean())

    def sentence(r):
        names = (("H-ES", RANKED), ("best candidate", BEST), ("stale", STALE), ("skip", SKIP))
        return ", ".join(f"{label} {train(name, r):.2f}%" for label, name in names)

    def validation(name):
        values = found[name][10].dev
        return f"{values.mean():.2f} +- {values.std(ddof=1):.2f}%"

    rows = found[RANKED][10].train, found[STALE][10].train, found[SKIP][10].train
    return [
        Claim(
            "With a gradient every 10 steps Hybrid-ES (ranked, mirrored, sigma 3) beats both "
            "controls in every seed.",
            bool(rows[0].min() > max(rows[1].max(), rows[2].max())),
            f"training accuracy after {NUM_STEPS} steps: {sentence(10)}; validation: H-ES "
            f"{validation(RANKED)}, stale {validation(STALE)}",
        ),
        Claim(
            "With a gradient every 3 steps repeating the stale gradient is as good: within 0.3 "
            "points.",
            abs(train(RANKED, 3) - train(STALE, 3)) <= 0.3,
            f"training accuracy: {sentence(3)}",
        ),
        Claim(
            "A tenth of the gradients costs Hybrid-ES at most 1.5 points, skipping more than 5.",
            train(RANKED, 1) - train(RANKED, 10) <= 1.5 < 5 < train(SKIP, 1) - train(SKIP, 10),
            f"{train(RANKED, 1):.2f}% with a gradient in every step",
        ),
    ]


def draw(intervals, found) -> Figure:
    figure, panels = training.accuracy_panels(84, "r: steps per gradient")
    for axes, split in zip(panels, ("train", "dev"), strict=True):
        for name, curves in found.items():
            color, style = METHODS[name][3]
            runs = np.transpose([getattr(curves[r], split)[0] for r in intervals])
            plots.band(axes, intervals, runs, style, middle=np.mean, color=color, label=name)
        plots.steps_axis(axes, intervals)
    panels[0].legend(loc="lower left")
    return figure


STUDY = Study("Hybrid-ES: accuracy against the refresh interval, beside skip and stale", 2.0, run)
