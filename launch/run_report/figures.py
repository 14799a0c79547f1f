"""Figures of jobs as SVG that stands in a page: no address, text as text."""

import io
import itertools
import re
from collections.abc import Sequence
from typing import Any

import matplotlib

matplotlib.use("agg")
import numpy as np
from matplotlib.figure import Figure

from launch.run_report.behaviour import Behaviour
from launch.run_report.folder import JobFolder
from launch.studies.shared.plots import BLUE, GREEN, ORANGE, PINK, SKY, STYLE, VERMILION, plain

COLORS = (BLUE, VERMILION, GREEN, ORANGE, PINK, SKY, "#000000", "#777777")
DASHES = ("-", "--", ":", "-.")
# Inches: as wide as a phone shows it at its own size.
SIZE = (4.6, 2.9)
# Points of a curve, above which means of neighbours are drawn.
POINTS = 300
# Entries of a legend, above which there is none.
_LEGEND = 12
# Letters of a label, above which two do not stand side by side.
_LONG_LABEL = 36
_count = itertools.count()


def style() -> Any:
    """For ``matplotlib.rc_context``."""
    return STYLE | {"svg.fonttype": "none", "font.size": 8, "axes.labelsize": 8}


def svg(figure: Figure) -> str:
    """The figure as an element of HTML; its ids are its own in any page."""
    file = io.StringIO()
    metadata = {"Date": None, "Creator": None, "Format": None, "Type": None}
    figure.savefig(file, format="svg", metadata=metadata)
    text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"\s*<metadata>.*?</metadata>", "", text, flags=re.S)
    # HTML knows both name spaces.
    text = re.sub(r' xmlns(:\w+)?="[^"]*"', "", text)
    mine = f"f{next(_count)}-"
    text = re.sub(r' id="', f' id="{mine}', text)
    text = re.sub(r'href="#', f'href="#{mine}', text)
    return text.replace("url(#", f"url(#{mine}")


def curves(
    jobs: Sequence[JobFolder], names: Sequence[str], ylabel: str, legend: Sequence[str] = ()
) -> Figure | None:
    """Metrics over outer steps, a colour a job and dashes a metric; None if no job has them.

    Args:
      legend: what to call the metrics; by default their names.
    """
    drawn = [
        (job, i, name, *thinned(*job.series(name)))
        for job in jobs
        for i, name in enumerate(names)
        if len(job.series(name)[0])
    ]
    if not drawn:
        return None
    figure, axis = _axis("outer step", ylabel)
    one = len(jobs) == 1 and len(names) > 1
    order = {job.name: i for i, job in enumerate(jobs)}
    for job, i, name, steps, values in drawn:
        words = legend[i] if legend else name
        parts = [job.name] if len(jobs) > 1 else []
        parts += [words] if len(names) > 1 else []
        axis.plot(
            steps,
            values,
            DASHES[0 if one else i % len(DASHES)],
            color=COLORS[(i if one else order[job.name]) % len(COLORS)],
            marker="." if len(steps) < 30 else None,
            label=plain(", ".join(parts)),
        )
    _finish(axis, len(drawn) if len(jobs) > 1 or len(names) > 1 else 0)
    if not any(np.any(values[np.isfinite(values)]) for *_, values in drawn):
        axis.set_ylim(-0.05, 1)
    _scale(axis, [values for *_, values in drawn])
    return figure


def histograms(jobs: Sequence[JobFolder], name: str, xlabel: str) -> Figure | None:
    """The first histogram of each job, pale, and its last; None if no job has any."""
    figure, axis = _axis(xlabel, "share of entries a bin")
    count = 0
    for i, job in enumerate(jobs):
        found = [(row["step"], row[name]) for row in job.rows if row.get(name)]
        shown = [found[0], found[-1]] if len(found) > 1 else found
        for (step, histogram), alpha in zip(shown[::-1], (1.0, 0.4), strict=False):
            counts = np.asarray(histogram["counts"], float)
            label = f"{f'{job.name}, ' if len(jobs) > 1 else ''}step {step:,}"
            axis.stairs(
                counts / max(1, counts.sum()),
                np.linspace(histogram["low"], histogram["high"], len(counts) + 1),
                color=COLORS[i % len(COLORS)],
                alpha=alpha,
                label=plain(label),
            )
            count += 1
    if not count:
        return None
    _finish(axis, count)
    axis.set_yscale("log")
    return figure


def behaviour(found: Behaviour) -> dict[str, Figure]:
    """Title -> figure: sizes of updates over time, and against those of gradients, by layer."""
    steps = np.arange(1, len(found.losses) + 1)
    places = [np.linspace(0, 0.95, max(2, len(found.layers)))[i] for i in range(len(found.layers))]
    colors = [matplotlib.colormaps["viridis"](place) for place in places]
    pictures = {}
    for title, values, ylabel in (
        ("Update size over time", found.updates, "root mean square of the update"),
        (
            "Update size over that of the parameters",
            found.updates / np.where(found.params > 0, found.params, np.nan),
            "update over parameters, RMS",
        ),
    ):
        figure, axis = _axis("inner step", ylabel)
        for layer, color, column in zip(found.layers, colors, values.T, strict=True):
            axis.plot(*thinned(steps, column), color=color, label=plain(layer))
        _finish(axis, len(found.layers))
        _scale(axis, [values])
        pictures[title] = figure
    figure, axis = _axis("root mean square of the gradient", "root mean square of the update")
    every = max(1, len(steps) // POINTS)
    for layer, color, grads, updates in zip(
        found.layers, colors, found.grads.T, found.updates.T, strict=True
    ):
        axis.plot(
            grads[::every], updates[::every], ".", color=color, markersize=3, label=plain(layer)
        )
    _finish(axis, len(found.layers))
    _scale(axis, [found.updates])
    if _spread(found.grads) > 10:
        axis.set_xscale("log")
    pictures["Update size against gradient"] = figure
    figure, axis = _axis("inner step", "training loss")
    axis.plot(*thinned(steps, found.losses), color=BLUE)
    _scale(axis, [found.losses])
    return {"Loss of this run": figure} | pictures


def comparison(document: dict[str, Any], horizon: str) -> Figure:
    """Median losses of an ``evaluation.json`` at a horizon, one line an optimizer."""
    figure, axis = _axis("inner step", f"training loss ({document.get('unit', 'loss')})")
    lines = document["results"][horizon]
    for i, line in enumerate(lines):
        losses = np.array(
            [[np.nan if x is None else x for x in run] for run in line["losses"]], float
        )
        rate = line.get("learning_rate")
        label = line["name"] if rate is None else f"{line['name']}, rate {rate:.2g}"
        middle = np.nanmedian(losses, axis=0)
        axis.plot(
            *thinned(np.arange(len(middle)), middle),
            color=COLORS[i % len(COLORS)],
            label=plain(label),
        )
    _finish(axis, len(lines))
    _scale(axis, [np.asarray(line.get_ydata()) for line in axis.get_lines()])
    return figure


def thinned(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """At most ``POINTS`` points: of longer curves means of as many neighbours each."""
    each = -(-len(values) // POINTS)
    if each <= 1:
        return steps, values
    pieces = range(0, len(values), each)
    middle = np.array([steps[i : i + each].mean() for i in pieces])
    kept = [values[i : i + each][np.isfinite(values[i : i + each])] for i in pieces]
    return middle, np.array([piece.mean() if len(piece) else np.nan for piece in kept])


def _axis(xlabel: str, ylabel: str) -> tuple[Figure, Any]:
    figure = Figure(figsize=SIZE, layout="constrained")
    axis = figure.subplots()
    axis.set(xlabel=xlabel, ylabel=ylabel)
    return figure, axis


def _finish(axis: Any, entries: int) -> None:
    if 0 < entries <= _LEGEND:
        labels = axis.get_legend_handles_labels()[1]
        columns = 1 if max(map(len, labels)) > _LONG_LABEL else 2
        axis.figure.legend(loc="outside lower center", ncols=columns, fontsize=7)


def _scale(axis: Any, values: Sequence[np.ndarray]) -> None:
    """Logarithmic where all is above 0 and more than a decade apart."""
    if _spread(np.concatenate([np.ravel(v) for v in values])) > 10:
        axis.set_yscale("log")


def _spread(values: np.ndarray) -> float:
    finite = values[np.isfinite(values)]
    if not len(finite) or finite.min() <= 0:
        return 0.0
    return float(finite.max() / finite.min())
