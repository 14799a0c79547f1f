"""Hybrid-ES: how rarely a gradient will do. Accuracy against r, beside the controls.

python -m launch.reproduce hybrid_es_refresh --workdir=DIR [--data_dir=DIR]
"""

import numpy as np
from matplotlib.figure import Figure

from launch.studies.base import Claim, Result, Study
from launch.studies.hybrid_es import hybrid_training as training
from launch.studies.hybrid_es.hybrid_training import Recipe
from launch.studies.shared import plots

NUM_STEPS = 300
INTERVALS = (1, 2, 3, 5, 10, 20)
QUICK_INTERVALS = (1, 3, 10)
RANKED, BEST = "H-ES, ranked, mirrored, sigma 3", "H-ES, best candidate, sigma 1"
STALE, SKIP = "stale", "skip"
STYLES = {
    RANKED: (plots.COLORS["H-ES"], "o-"),
    BEST: (plots.ORANGE, "s-"),
    STALE: (plots.COLORS["stale"], "^--"),
    SKIP: (plots.COLORS["skip"], "v:"),
}


def recipe(method: str, r: int) -> Recipe:
    """With a gradient in every step (``r = 1``) all methods are gradient descent."""
    if method == RANKED or r == 1:
        return Recipe("select", r, 1.0, sigma=3.0)
    if method == BEST:
        return Recipe("select", r, 1.0, combine="argmin", antithetic=False)
    return Recipe(method, r, 1.0)


def run(quick: bool, data_dir: str | None) -> Result:
    problem = training.problem(data_dir)
    intervals, seeds = (QUICK_INTERVALS, 2) if quick else (INTERVALS, 5)
    recipes = {(name, r): recipe(name, r) for r in intervals for name in STYLES}
    found = training.train_all(problem, NUM_STEPS, recipes, seeds)
    table = [
        {"r": r, "method": name, "gradients": -(-NUM_STEPS // r)}
        | training.columns(curve)
        | {"train loss": float(curve.loss.mean())}
        for (name, r), curve in found.items()
    ]
    data = {f"{name}, r = {r}": curve._asdict() for (name, r), curve in found.items()}
    caption = training.caption(data_dir, NUM_STEPS, f"line: mean, band: range of {seeds} seeds")
    return Result(claims(found), table, draw(intervals, found), data, caption)


def claims(found) -> list[Claim]:
    def train(name, r):
        return float(found[name, r].train.mean())

    def sentence(r):
        names = (("H-ES", RANKED), ("best candidate", BEST), ("stale", STALE), ("skip", SKIP))
        return ", ".join(f"{label} {train(name, r):.2f}%" for label, name in names)

    def validation(name):
        values = found[name, 10].dev
        return f"{values.mean():.2f} +- {values.std(ddof=1):.2f}%"

    ranked, *controls = (found[name, 10].train for name in (RANKED, STALE, SKIP))
    return [
        Claim(
            "With a gradient every 10 steps Hybrid-ES (ranked, mirrored, sigma 3) beats both "
            "controls in every seed.",
            bool(ranked.min() > max(control.max() for control in controls)),
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
        for name, (color, style) in STYLES.items():
            runs = np.transpose([getattr(found[name, r], split) for r in intervals])
            plots.band(axes, intervals, runs, style, middle=np.mean, color=color, label=name)
        plots.steps_axis(axes, intervals)
    panels[0].legend(loc="lower left")
    return figure


STUDY = Study("Hybrid-ES: accuracy against the refresh interval, beside skip and stale", 2.0, run)
