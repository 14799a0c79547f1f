"""How the figures of all studies look: one style, one colour a method."""

from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.rcsetup import cycler

# The palette of Okabe and Ito: told apart by colour-blind readers too.
BLUE, ORANGE, GREEN, VERMILION = "#0072B2", "#E69F00", "#009E73", "#D55E00"
PINK, SKY, GRAY, BLACK = "#CC79A7", "#56B4E9", "0.5", "black"

LAYERS = ("#440154", "#31688e", "#35b779", "#d8b70a")  # first to last

# Of methods, in all studies.
COLORS = {
    "RTRL": BLACK,
    "exact": BLACK,
    "PES": BLUE,
    "NRES": GREEN,
    "UORO": PINK,
    "full ES": PINK,
    "truncated ES": ORANGE,
    "TBPTT": VERMILION,
    "random search": GRAY,
    "H-ES": VERMILION,
    "gradient descent": BLUE,
    "stale": BLACK,
    "skip": GRAY,
}

STYLE: Any = {
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.prop_cycle": cycler(color=[BLUE, ORANGE, GREEN, VERMILION, PINK, SKY]),
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 10,
    "figure.constrained_layout.use": True,
    "grid.alpha": 0.25,
    "grid.linewidth": 0.5,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "legend.title_fontsize": 8,
    "lines.linewidth": 1.6,
    "lines.markersize": 4,
}


def plain(words: str) -> str:
    """Words of somebody's own for a figure: a folder called ``$x$`` is no formula, and one called
    ``_x`` is in the legend.
    """
    return f"{' ' if words.startswith('_') else ''}{words}".replace("$", r"\$")


def panels(columns: int, size: tuple[float, float], rows: int = 1, **kwargs: Any) -> Any:
    """A figure of ``size`` inches, and its axes."""
    figure = Figure(figsize=size)
    return figure, figure.subplots(rows, columns, **kwargs)


def band(axes: Any, x: Any, runs: Any, *line_style: str, middle: Any = np.median, **line) -> None:
    """Draws the median (or ``middle``) of ``runs [seeds, x]`` as a line, their range as a band."""
    runs = np.asarray(runs)
    (drawn,) = axes.plot(x, middle(runs, axis=0), *line_style, **line)
    axes.fill_between(
        x, runs.min(axis=0), runs.max(axis=0), color=drawn.get_color(), alpha=0.2, linewidth=0
    )


def level(axes: Any, y: float, label: str | None = None, **line: Any) -> None:
    """A horizontal line to compare with."""
    axes.axhline(y, label=label, **{"color": BLACK, "linewidth": 0.9, "linestyle": "--"} | line)


def log_ticks(axis: Any, places=(0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0)) -> None:
    """Labels a logarithmic y axis at ``places`` alone, in plain numbers."""
    low, high = axis.get_ylim()
    axis.minorticks_off()
    axis.set_yticks(places, [f"{place:g}" for place in places])
    axis.set_ylim(low, high)


def inner_steps_axis(axes: Any, last: int) -> None:
    """From 0 to ``last`` in total."""
    axes.set(xlabel="inner steps in total (thousands)", xlim=(0, last))
    axes.xaxis.set_major_formatter(lambda steps, place: f"{steps / 1000:g}")


def steps_axis(axes: Any, ticks: Any) -> None:
    """A logarithmic x axis labelled at ``ticks`` alone, in plain numbers."""
    axes.set_xscale("log")
    axes.set_xticks(ticks, [f"{tick:,g}" for tick in ticks])
    axes.xaxis.minorticks_off()


def surface(figure: Figure, axes: Any, x: Any, y: Any, values: Any, label: str, **how: Any) -> Any:
    """The loss ``values [y, x]`` in colours; returns the colour bar, named ``label``."""
    axes.grid(False)
    mesh = axes.pcolormesh(x, y, values, cmap="magma", rasterized=True, **how)
    axes.set(xlim=(x[0], x[-1]), ylim=(y[0], y[-1]))
    return figure.colorbar(mesh, ax=axes, label=label, extend="max")


def path(axes: Any, points: Any, color: str, style: str = "-") -> None:
    """A descent ``points [steps, 2]`` on a surface, with a dot at its end."""
    axes.plot(*np.transpose(points), color="white", linewidth=2.4)
    axes.plot(*np.transpose(points), color=color, linestyle=style)
    axes.plot(*points[-1], "o", color=color, markersize=5, markeredgecolor="white")


def start_and_optimum(axes: Any, start: Any, optimum: Any) -> None:
    """A square and a star on a surface."""
    axes.plot(*start, "s", color="white", markeredgecolor="black", markersize=6, label="start")
    axes.plot(*optimum, "*", color="#F0E442", markeredgecolor="black", markersize=13,
              clip_on=False, label="grid optimum", linestyle="none")  # fmt: skip


def image(axes: Any, values: Any, title: str, **how: Any) -> Any:
    """A small image without ticks; returns what a colour bar belongs to."""
    axes.set(xticks=[], yticks=[])
    axes.set_title(title, fontsize=9, pad=2)
    axes.grid(False)
    axes.spines[:].set_visible(False)
    return axes.imshow(values, **how)
