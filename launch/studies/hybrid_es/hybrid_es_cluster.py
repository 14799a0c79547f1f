"""Hybrid-ES on a network: simulated time to a target accuracy, beside gradient descent.

python -m launch.reproduce hybrid_es_cluster --workdir=DIR [--data_dir=DIR]

Every trajectory is computed for real, on one machine, from the global seeds; only the clock is
simulated (``launch/cluster_sim.py``).
"""

import math
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from launch import cluster_sim as sim
from launch.studies.base import Claim, Result, Study
from launch.studies.hybrid_es import cluster_clock as clocks
from launch.studies.hybrid_es import hybrid_training as training
from launch.studies.hybrid_es.cluster_clock import BANDWIDTH, LATENCY, SPEED
from launch.studies.hybrid_es.hybrid_training import Problem, Recipe
from launch.studies.hybrid_es.unequal_workers import (
    EQUAL,
    LOSSY,
    NUM_UNEQUAL,
    SLOW,
    SLOW_EQUAL,
    TARGET,
    Unequal,
    cluster_of,
    simulate,
    slowed,
    steps_to_target,
    unequal,
)
from launch.studies.shared import plots
from launch.studies.shared.compare import in_parallel
from meta_train.progress import progress

NUM_STEPS = 400
WORKERS = (1, 2, 4, 10, 30, 100, 300, 1000, 3000, 10_000)
QUICK_WORKERS = (1, 2, 10, 100, 1000, 10_000)
BANDWIDTHS = (1e2, 1e3, 1e4, 1e5, 1e6, 1e7, 1e8, 1e9)
NUM_FIXED = 64  # workers where the bandwidth is swept


def _search(sigma: float, num_candidates: int, top: int) -> Recipe:
    """The step in between is towards the mean of the ``top`` candidates."""
    return Recipe("select", 10, 1.0, sigma, num_candidates, "top", top)


SAME_RATE = Recipe("skip", 1, 1.0)  # as H-ES
RECIPES = (
    SAME_RATE,
    Recipe("skip", 1, 3.0),
    Recipe("skip", 1, 10.0),
    Recipe("stale", 3, 2.0),
    Recipe("stale", 5, 2.0),
    Recipe("stale", 10, 1.0),
    _search(5.0, 64, 8),
    _search(6.0, 128, 16),
)
QUICK_RECIPES = (SAME_RATE, RECIPES[2], RECIPES[4], RECIPES[7])
GD, STALE, HYBRID = "gradient descent", "stale gradient", "H-ES"
METHODS = {"skip": GD, "stale": STALE, "select": HYBRID}
COLORS = plots.COLORS | {STALE: plots.COLORS["stale"]}
RING, RATE_1 = "gradient descent, ring", "gradient descent, rate 1"
# The lines of the figure: of which recipes, over which all-reduces (is it a ring?).
LINES: dict[str, tuple[Callable[[Recipe], bool], tuple[bool, ...]]] = {
    RING: (lambda recipe: recipe.mode == "skip", (True,)),
    RATE_1: (lambda recipe: recipe == SAME_RATE, (True, False)),
    GD: (lambda recipe: recipe.mode == "skip", (True, False)),
    STALE: (lambda recipe: recipe.mode == "stale", (True, False)),
    HYBRID: (lambda recipe: recipe.mode == "select", (True, False)),
}


def times(problem: Problem, steps: dict[Recipe, float], points) -> tuple[dict[Any, Any], float]:
    """Each line with its fastest recipe, all-reduces with the faster of two algorithms.

    Returns:
      ``(line, workers, bytes/s) -> (simulated seconds to the target, recipe)``, and the largest
      relative error of the event clock.
    """
    errors = [0.0]

    @cache
    def clock(recipe, num, bandwidth, ring):
        cluster = sim.homogeneous(num, speed=SPEED, latency=LATENCY, bandwidth=bandwidth)
        exchange = sim.ring_all_reduce if ring else sim.halving_doubling
        found = clocks.simulated(problem, recipe, cluster, exchange)
        expected = clocks.closed_form(problem, recipe, num, bandwidth, ring)
        errors.extend(abs(x / y - 1) for x, y in zip(found, expected, strict=True))
        return found

    def options(line, *point):
        wanted, rings = LINES[line]
        for recipe in filter(wanted, steps):
            alike = recipe if recipe.mode == "select" else SAME_RATE  # As long a step.
            for ring in rings:
                yield clock(alike, *point, ring).at(recipe, steps[recipe]), recipe

    lines = progress(LINES, desc="clusters")
    return {(line, *at): min(options(line, *at)) for line in lines for at in points}, max(errors)


def line(workers, bandwidth, method: str, recipe: Recipe, steps, seconds) -> dict[str, Any]:
    """Of the table."""
    return {
        "workers": workers,
        "bytes/s": bandwidth,
        "method": method,
        "r": recipe.refresh_every,
        "rate": recipe.rate,
        "candidates": recipe.num_candidates if recipe.mode == "select" else 0,
        "steps": steps,
        "seconds": seconds,
    }


def run(quick: bool, data_dir: str | None) -> Result:
    problem = training.problem(data_dir)
    recipes, seeds, workers = (QUICK_RECIPES, 1, QUICK_WORKERS) if quick else (RECIPES, 3, WORKERS)

    def curve(recipe):
        train = training.trainer(problem, recipe, NUM_STEPS)
        return np.mean([train(recipe.sigma, seed).train for seed in range(seeds)], axis=0)

    curves = in_parallel({recipe: partial(curve, recipe) for recipe in recipes})
    steps = {recipe: steps_to_target(curve) for recipe, curve in curves.items()}
    sides = [(num, BANDWIDTH) for num in workers], [(NUM_FIXED, b) for b in BANDWIDTHS]
    found, worst_error = times(problem, steps, [*sides[0], *sides[1]])

    def fewest_gradients(mode):
        """They are what counts on a slow link."""
        mine = [recipe for recipe in recipes if recipe.mode == mode]
        return min(mine, key=lambda recipe: steps[recipe] / recipe.refresh_every)

    ours = fewest_gradients("select")
    uneven = [
        row
        for recipe in (fewest_gradients("skip"), ours)
        for row in unequal(problem, recipe, curves[recipe], seeds)
    ]
    fast = cluster_of(latency=LATENCY / 100, bandwidth=1e9)
    hurried = [simulate(problem, ours, each, NUM_STEPS).clock[-1] for each in (fast, slowed(fast))]
    table = [
        line(*point, name, recipe, steps[recipe], seconds)
        for side in sides
        for name in LINES
        for point in side
        for seconds, recipe in [found[name, *point]]
    ] + [
        line(NUM_UNEQUAL, BANDWIDTH, f"{METHODS[row.recipe.mode]}, {row.cluster}", row.recipe,
             steps_to_target(row.accuracy), row.seconds)
        for row in uneven
    ]  # fmt: skip
    by_workers, by_bandwidth = (
        {name: np.array([found[name, *point][0] for point in side]) for name in LINES}
        for side in sides
    )
    data = {
        "worker": {"speed": SPEED, "latency": LATENCY, "draw_flops": clocks.DRAW_FLOPS},
        "workers": workers,
        "by_workers": by_workers,
        "bandwidths": BANDWIDTHS,
        "by_bandwidth": by_bandwidth,
        "unequal": [row._asdict() for row in uneven],
    }
    caption = training.caption(
        data_dir,
        NUM_STEPS,
        f"time to a mean training accuracy of {TARGET:.0%} over {seeds} seeds; simulated clock; "
        "no band",
    )
    return Result(
        claims(worst_error, by_workers, by_bandwidth, uneven, hurried[1] / hurried[0] - 1),
        table,
        draw(workers, by_workers, by_bandwidth, uneven),
        data,
        caption,
    )


def claims(worst_error, by_workers, by_bandwidth, uneven: list[Unequal], hurried) -> list[Claim]:
    ratio = {name: seconds / by_bandwidth[HYBRID] for name, seconds in by_bandwidth.items()}
    slow, fast = BANDWIDTHS.index(1e3), BANDWIDTHS.index(1e9)
    wins = [b for b, other in zip(BANDWIDTHS, ratio[GD], strict=True) if other > 1]
    seconds = {(METHODS[row.recipe.mode], row.cluster): row.seconds for row in uneven}
    slower = {
        name: seconds[HYBRID, name] / seconds[HYBRID, EQUAL] - 1
        for name in (SLOW, SLOW_EQUAL, LOSSY)
    }
    alone = by_workers[GD][0]
    return [
        Claim(
            "Where all workers are equal the event clock is the closed form.",
            worst_error < 1e-9,
            f"largest relative difference {worst_error:.1e}, 1 to {WORKERS[-1]:,} workers",
        ),
        Claim(
            "On a slow link H-ES reaches the target sooner than gradient descent at any of the "
            "tried rates, and sooner than repeating the stale gradient.",
            bool(ratio[GD][slow] > 1 and ratio[STALE][slow] > 1),
            f"at 1 kB/s and {NUM_FIXED} workers gradient descent takes {ratio[GD][slow]:.1f} "
            f"times as long ({ratio[RATE_1][slow]:.1f} at H-ES's learning rate), the "
            f"stale gradient {ratio[STALE][slow]:.1f} times",
        ),
        Claim(
            "On a fast link gradient descent is faster.",
            bool(ratio[GD][fast] < 1),
            f"at 1 GB/s H-ES takes {1 / ratio[GD][fast]:.0f} times as long; it is ahead up to "
            f"{max(wins, default=0) / 1e3:g} kB/s (of those tried)",
        ),
        Claim(
            "One worker alone needs no link, and with the whole data is faster than any number of "
            "workers over the slow one: H-ES pays where gradients must travel.",
            bool(alone < min(times[1:].min() for times in by_workers.values())),
            f"{alone:.1f} s; {WORKERS[-1]:,} workers at {BANDWIDTH / 1e3:g} kB/s: gradient descent "
            f"{by_workers[GD][-1]:.0f} s ({by_workers[RING][-1]:.0f} s around a ring), H-ES "
            f"{by_workers[HYBRID][-1]:.0f} s",
        ),
        Claim(
            "On the slow link, where computing takes little of the time, a worker 4 times slower "
            "costs less than 30%, with shares proportional to speed.",
            bool(0 <= slower[SLOW] < 0.3),
            f"{100 * slower[SLOW]:.2f}% on the slow link ({100 * slower[SLOW_EQUAL]:.2f}% with "
            f"equal shares); where nothing but computing counts {100 * hurried:.0f}%, since every "
            "worker draws the best candidates again, alone",
        ),
        Claim(
            "With 10% of the workers lost in each step H-ES still reaches the target, at most "
            "30% later.",
            bool(slower[LOSSY] < 0.3),
            f"{100 * slower[LOSSY]:+.0f}% simulated time, {seconds[HYBRID, LOSSY]:.0f} s",
        ),
    ]


def draw(workers, by_workers, by_bandwidth, uneven: list[Unequal]) -> Figure:
    figure, (left, middle, right) = plots.panels(3, (11.5, 3.6))
    styles = {
        RING: (":", GD, "gradient descent, ring all-reduce"),
        RATE_1: ("--", GD, "gradient descent at H-ES's learning rate"),
        GD: ("-", GD, GD),
        STALE: ("-", STALE, "stale gradient, no search"),
        HYBRID: ("-", HYBRID, HYBRID),
    }
    for axes, at, times in ((left, workers, by_workers), (middle, BANDWIDTHS, by_bandwidth)):
        for name, (style, method, label) in styles.items():
            width = 3.0 if name == GD else 1.3  # Where it is under the stale gradient's.
            axes.plot(
                at, times[name], f".{style}", color=COLORS[method], linewidth=width, label=label
            )
        axes.set(xscale="log", yscale="log")
        axes.set_ylabel(f"simulated time to {TARGET:.0%} accuracy (s)")
    left.set(xlabel="workers", title=f"Links of {BANDWIDTH / 1e3:g} kB/s")
    middle.set(xlabel="bandwidth (bytes/s)", title=f"{NUM_FIXED} workers")
    left.legend(fontsize=7)
    lines = {EQUAL: "-", SLOW: "--", LOSSY: ":"}
    for row in uneven:
        if row.cluster in lines:
            style, label = lines[row.cluster], f"{METHODS[row.recipe.mode]}, {row.cluster}"
            error = 100 - 100 * row.accuracy
            right.plot(
                row.clock, error, style, color=COLORS[METHODS[row.recipe.mode]], lw=1.2, label=label
            )
    plots.level(right, 100 - 100 * TARGET, color="gray", linestyle="-")
    right.set(
        xlim=(0, 1.6 * max(row.seconds for row in uneven if math.isfinite(row.seconds))),
        yscale="log",
        ylim=(0.5, 100),
        xlabel="simulated time (s)",
        ylabel="training error (%)",
        title=f"{NUM_UNEQUAL} unequal workers, {BANDWIDTH / 1e3:g} kB/s",
    )
    right.legend(fontsize=7, loc="upper right")
    return figure


STUDY = Study(
    "Hybrid-ES on a simulated network: time to an accuracy, slow and lost workers", 2.0, run
)
