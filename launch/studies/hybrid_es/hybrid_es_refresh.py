"""Hybrid-ES: how rarely a gradient will do. Accuracy against r, beside the controls.

python -m launch.reproduce hybrid_es_refresh --workdir=DIR [--data_dir=DIR]
"""

from typing import Any

from matplotlib.figure import Figure

from launch.studies.base import Claim, Result, Study
from launch.studies.hybrid_es import hybrid_training as training
from launch.studies.hybrid_es.hybrid_training import Curve
from meta_train.progress import progress

NUM_STEPS = 300
RATE = 1.0
INTERVALS = (1, 2, 3, 5, 10, 20)
QUICK_INTERVALS = (1, 3, 10)
# Method: mode, sigma in deviations of the gradient's components, further arguments, style.
METHODS: dict[str, tuple[str, float, dict[str, Any], tuple[str, str]]] = {
    "H-ES, ranked, mirrored, sigma 3": ("select", 3.0, {}, ("#D55E00", "o-")),
    "H-ES, best candidate, sigma 1": (
        "select",
        1.0,
        {"combine": "argmin", "antithetic": False},
        ("#0072B2", "s-"),
    ),
    "stale": ("stale", 1.0, {}, ("black", "^--")),
    "skip": ("skip", 1.0, {}, ("gray", "v:")),
}
RANKED, BEST, STALE, SKIP = METHODS


def run(quick: bool, data_dir: str | None) -> Result:
    problem = training.problem(data_dir)
    intervals, seeds = (QUICK_INTERVALS, 2) if quick else (INTERVALS, 5)
    found: dict[str, dict[int, Curve]] = {name: {} for name in METHODS}
    with progress(total=(1 + len(METHODS) * (len(intervals) - 1)) * seeds, desc="runs") as bar:
        for r in intervals:
            for name, (mode, sigma, how, _) in METHODS.items():
                if r == 1 and name != RANKED:  # Gradient descent, whatever the method.
                    found[name][r] = found[RANKED][r]
                    continue
                train = training.trainer(
                    problem, NUM_STEPS, RATE, NUM_STEPS, mode=mode, refresh_every=r, **how
                )
                found[name][r] = training.last(train, (sigma,), seeds, bar)
    table = [
        {
            "r": r,
            "method": name,
            "gradients": -(-NUM_STEPS // r),
            "train %": float(curves[r].train.mean()),
            "+-": float(curves[r].train.std(ddof=1)),
            "validation %": float(curves[r].dev.mean()),
            "+- ": float(curves[r].dev.std(ddof=1)),
            "train loss": float(curves[r].loss.mean()),
        }
        for r in intervals
        for name, curves in found.items()
    ]
    data = {
        name: {str(r): [x.tolist() for x in curve] for r, curve in curves.items()}
        for name, curves in found.items()
    }
    caption = (
        f"{'MNIST' if data_dir else 'digits'} sigmoid classifier, batch {training.BATCH}, "
        f"{NUM_STEPS} steps; line: mean, band: range of {seeds} seeds"
    )
    return Result(claims(found), table, draw(intervals, found), data, caption)


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
    figure = Figure(figsize=(9.5, 3.6), layout="constrained")
    axes: Any = figure.subplots(1, 2, sharey=True)
    for panel, (split, title) in zip(
        axes, (("train", "training"), ("dev", "validation")), strict=True
    ):
        for name, curves in found.items():
            color, style = METHODS[name][3]
            values = [getattr(curves[r], split)[0] for r in intervals]
            low, high = [v.min() for v in values], [v.max() for v in values]
            panel.fill_between(intervals, low, high, color=color, alpha=0.15, linewidth=0)
            panel.plot(
                intervals, [v.mean() for v in values], style, color=color, markersize=5, label=name
            )
        panel.set_xscale("log")
        panel.set_xticks(intervals, [str(r) for r in intervals])
        panel.minorticks_off()
        panel.set_ylim(84, 100.4)
        panel.set_xlabel("r: steps per gradient")
        panel.set_ylabel(f"{title} accuracy (%)")
        panel.yaxis.set_tick_params(labelleft=True)
        panel.grid(alpha=0.25, linewidth=0.5)
        panel.spines[["top", "right"]].set_visible(False)
    axes[0].legend(
        fontsize=8,
        frameon=False,
        loc="lower left",
        title="shaded: range over seeds",
        title_fontsize=8,
    )
    return figure


STUDY = Study(
    "Hybrid-ES: accuracy against the refresh interval, and where it beats skip and stale (Bartolo)",
    2.0,
    run,
)
