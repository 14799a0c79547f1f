"""The figure of a suite's evaluation: intervals of all optimizers, and performance profiles."""

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("agg")
from matplotlib import pyplot as plt

from launch.evaluation.kept import replacing
from launch.evaluation.report import LABEL, RATIOS, REFERENCE, shortened
from launch.evaluation.suite import DEFAULT, ONE_RATE, TUNED
from launch.studies.shared.plots import BLUE, GREEN, ORANGE, STYLE, VERMILION, plain

# Colours and markers of the columns; "" is an optimizer that has no rate to choose.
COLORS = {"": VERMILION, TUNED: BLUE, ONE_RATE: GREEN, DEFAULT: ORANGE}
MARKERS = {"": "*", TUNED: "o", ONE_RATE: "s", DEFAULT: "D"}
NAMES = {
    "": "without tuning",
    TUNED: TUNED,
    ONE_RATE: "one setting for the suite",
    DEFAULT: DEFAULT,
}
# Of the profiles, one after another.
COLORED = (VERMILION, BLUE, GREEN, ORANGE, "#CC79A7", "#56B4E9", "black", "0.4")
LINES = ("-", "--", ":")
# Of the profiles, those drawn by name: the best by score and all without tuning.
DRAWN = 6


def plot(summary: dict[str, Any], title: str, path: Path) -> None:
    """Writes the PNG.

    Args:
      summary: from ``report.summarize``.
      title: what was evaluated, in a line.
    """
    with plt.rc_context(STYLE):
        horizons = list(summary["horizons"].items())
        count = max(len(found["rows"]) for _, found in horizons)
        # Without Adam there is no target, so no profile.
        scored = np.isfinite([r["profile_score"] for _, f in horizons for r in f["rows"]]).all()
        heights = [0.19 * count + 1, 3] if scored else [0.19 * count + 1]
        figure, axes = plt.subplots(
            len(heights),
            len(horizons),
            figsize=(6.4 * len(horizons), 0.19 * count + (6 if scored else 2.4)),
            squeeze=False,
            height_ratios=heights,
        )
        looks: dict[str, tuple[str, str]] = {}
        for column, (horizon, found) in enumerate(horizons):
            _intervals(axes[0, column], found["rows"], horizon)
            if scored:
                _profiles(axes[1, column], found["rows"], looks)
        columns = {row["column"] for _, found in horizons for row in found["rows"]}
        handles = [
            plt.Line2D(
                [],
                [],
                color=color,
                marker=MARKERS[name],
                label=f"{NAMES[name]}: training loss, 95%",
            )
            for name, color in COLORS.items()
            if name in columns
        ]
        handles.append(plt.Line2D([], [], color="black", marker="|", ls="", label="test loss"))
        figure.legend(handles=handles, loc="outside lower center", ncols=3)
        figure.suptitle(plain(title), fontsize=11)
        with replacing(path) as temporary:
            figure.savefig(temporary, dpi=130, format="png")
        plt.close(figure)


def _intervals(axis: Any, rows: list[dict[str, Any]], horizon: str) -> None:
    rows = sorted(rows, key=lambda row: -row["log_loss"]["train"]["estimate"])
    for y, row in enumerate(rows):
        of, color = row["log_loss"]["train"], COLORS[row["column"]]
        axis.plot([of["low"], of["high"]], [y, y], color=color, linewidth=2, alpha=0.5)
        axis.plot(of["estimate"], y, MARKERS[row["column"]], color=color, markersize=5)
        axis.plot(row["log_loss"]["test"]["estimate"], y, "|", color="black", markersize=8)
    axis.axvline(0, color="0.6", linewidth=0.8, linestyle="--")
    labels = [plain(shortened(row["label"], LABEL)) for row in rows]
    axis.set_yticks(range(len(rows)), labels, fontsize=7)
    for label, row in zip(axis.get_yticklabels(), rows, strict=True):
        label.set_color(COLORS[row["column"]])
    axis.set(
        title=f"{int(horizon):,} steps",
        xlabel="log-loss, interquartile mean over tasks and seeds\n"
        "(0: a constant prediction; less is better)",
    )


def _profiles(axis: Any, rows: list[dict[str, Any]], looks: dict[str, tuple[str, str]]) -> None:
    """Draws them; ``looks`` has the colours and lines of labels, which are those of all panels."""
    ranked = sorted(rows, key=lambda row: -row["profile_score"])
    named = [row for row in ranked if not row["column"]]
    named += [row for row in ranked if row["column"]][:DRAWN]
    # The target is Adam's, so it is among them.
    named += [r for r in ranked if r["label"] == f"{REFERENCE} ({TUNED})" and r not in named]
    for row in named:
        new = LINES[len(looks) // len(COLORED) % len(LINES)], COLORED[len(looks) % len(COLORED)]
        style, color = looks.setdefault(row["label"], new)
        axis.step(
            RATIOS,
            np.asarray(row["profile"]),
            style,
            where="post",
            color=color,
            linewidth=1.4 if row["column"] else 2.2,
            label=f"{plain(shortened(row['label'], LABEL))}: {row['profile_score']:.2f}",
        )
    others = [row["profile"] for row in ranked if row not in named]
    if others:
        lines = axis.step(
            RATIOS, np.transpose(others), where="post", color="0.85", linewidth=0.8, zorder=1
        )
        lines[0].set_label(f"the {len(others)} others")
    axis.set(
        title="performance profile and AlgoPerf's score",
        xlabel="steps to tuned Adam's loss at 3/4 of the horizon,\nover those of the fastest",
        ylabel="share of tasks",
        xlim=(1, 4),
        ylim=(-0.02, 1.02),
    )
    axis.legend(loc="upper center", bbox_to_anchor=(0.45, -0.22), ncols=2, fontsize=7)
