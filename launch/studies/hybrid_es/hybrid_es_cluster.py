"""Hybrid-ES on a network: simulated time to a target accuracy, beside gradient descent.

python -m launch.reproduce hybrid_es_cluster --workdir=DIR [--data_dir=DIR]

Every trajectory is computed for real, on one machine, from the global seeds; only the clock is
simulated (``launch/cluster_sim.py``).
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from launch import cluster_sim as sim
from launch.studies.base import Claim, Result, Study
from launch.studies.hybrid_es import hybrid_training as training
from launch.studies.hybrid_es.hybrid_training import BATCH, Problem
from launch.studies.shared import plots
from meta_train.progress import progress

TARGET = 0.98  # training accuracy, mean over seeds
NUM_STEPS = 400
# A worker: a small embedded processor on a radio link, unless the bandwidth is swept.
SPEED = 1e9  # FLOP/s
LATENCY = 1e-3  # s
BANDWIDTH = 1e4  # bytes/s
# One normal number against one multiply or add of the network: 4.1 and 0.011 ns measured on
# one core of a two-core x86 machine, float32.
DRAW_FLOPS = 400
WORKERS = (1, 2, 4, 10, 30, 100, 300, 1000, 3000, 10_000)
QUICK_WORKERS = (1, 2, 10, 100, 1000, 10_000)
BANDWIDTHS = (1e2, 1e3, 1e4, 1e5, 1e6, 1e7, 1e8, 1e9)
NUM_FIXED = 64  # workers where the bandwidth is swept
NUM_UNEQUAL = 16  # workers of the unequal clusters
PATIENCE = 1.0


class Recipe(NamedTuple):
    """One way to train: a ``mode`` of Hybrid-ES and its numbers; the step in between is towards
    the mean of the ``top`` candidates."""

    method: str
    mode: str
    refresh_every: int
    rate: float
    sigma: float = 1.0
    num_candidates: int = 2
    top: int = 1


GD, STALE, HYBRID = "gradient descent", "stale gradient", "H-ES"
SAME_RATE_LINE = "gradient descent, rate 1"
SAME_RATE = Recipe(GD, "skip", 1, 1.0)
RECIPES = (
    SAME_RATE,
    Recipe(GD, "skip", 1, 3.0),
    Recipe(GD, "skip", 1, 10.0),
    Recipe(STALE, "stale", 3, 2.0),
    Recipe(STALE, "stale", 5, 2.0),
    Recipe(STALE, "stale", 10, 1.0),
    Recipe(HYBRID, "select", 10, 1.0, 5.0, 64, 8),
    Recipe(HYBRID, "select", 10, 1.0, 6.0, 128, 16),
)
QUICK_RECIPES = (SAME_RATE, RECIPES[2], RECIPES[4], RECIPES[7])
COLORS = {GD: plots.BLUE, STALE: "black", HYBRID: plots.VERMILION}


def gradient_work(problem: Problem, exchange) -> sim.Work:
    """A gradient: examples are shared out, their gradients summed; lost ones are done again.

    Forward and backward take 6 operations a weight and example, the update 2 a weight.
    """
    size = problem.num_weights
    return sim.Work(BATCH, 6.0 * size, exchange(4.0 * size), 2.0 * size, redo=True)


def search_work(problem: Problem, recipe: Recipe, num_workers: int) -> sim.Work:
    """A search: candidates are shared out (or parts of their batches, where there are more
    workers), all costs are sent to all (and summed), and everyone draws the best again."""
    size, candidates = problem.num_weights, recipe.num_candidates
    parts = min(BATCH, math.ceil(num_workers / candidates))
    flops = DRAW_FLOPS * size + 2.0 * size * BATCH / parts
    after = recipe.top * DRAW_FLOPS * size + 2.0 * size
    exchange = sim.all_gather if parts == 1 else sim.halving_doubling
    return sim.Work(candidates * parts, flops, exchange(4.0 * candidates), after)


def between_work(problem: Problem, recipe: Recipe, num_workers: int) -> sim.Work:
    """The steps between two gradients."""
    if recipe.mode == "select":
        return search_work(problem, recipe, num_workers)
    return sim.Work(0, 0.0, sim.silence, 2.0 * problem.num_weights)


class Clock(NamedTuple):
    """Seconds of a step with a gradient, and of a step between two."""

    gradient: float
    between: float

    def at(self, recipe: Recipe, num_steps: float) -> float:
        """The simulated time after ``num_steps`` steps."""
        if not math.isfinite(num_steps):
            return math.inf
        gradients = math.ceil(num_steps / recipe.refresh_every)
        return gradients * self.gradient + (num_steps - gradients) * self.between


def simulated(problem, recipe, cluster, exchange) -> Clock:
    """By the event clock."""
    works = (gradient_work(problem, exchange), between_work(problem, recipe, len(cluster.id)))
    return Clock(*(sim.simulate_step(cluster, work).seconds for work in works))


def closed_form(problem, recipe, num: int, bandwidth: float, ring: bool) -> Clock:
    """For a homogeneous cluster."""
    size = problem.num_weights
    sent = 2 * 4 * size * (num - 1) / num / bandwidth
    hops = 2 * (num - 1) if ring else 2 * math.ceil(math.log2(num))
    compute = math.ceil(BATCH / num) * 6 * size + 2 * size
    gradient = compute / SPEED + hops * LATENCY + sent
    if recipe.mode != "select":
        return Clock(gradient, 2 * size / SPEED)
    candidates = recipe.num_candidates
    parts = min(BATCH, math.ceil(num / candidates))
    share = math.ceil(candidates * parts / num)
    flops = share * (DRAW_FLOPS * size + 2 * size * BATCH / parts)
    flops += recipe.top * DRAW_FLOPS * size + 2 * size
    gather = math.ceil(math.log2(num)) * LATENCY + 4 * candidates * (num - 1) / num / bandwidth
    return Clock(gradient, flops / SPEED + (1 if parts == 1 else 2) * gather)


def steps_to_target(curve: np.ndarray) -> float:
    """Of a mean curve ``[T]`` measured after every step; inf if never."""
    reached = np.flatnonzero(curve >= TARGET)
    return float(reached[0] + 1) if len(reached) else math.inf


def how(recipe: Recipe) -> dict[str, Any]:
    """The recipe as arguments of ``training.estimator``."""
    return {
        "mode": recipe.mode,
        "refresh_every": recipe.refresh_every,
        "num_candidates": recipe.num_candidates,
        "combine": "top",
        "top": recipe.top,
    }


def plan(problem: Problem, recipe: Recipe, cluster: sim.Cluster):
    """``step -> Work``."""
    gradient = gradient_work(problem, sim.halving_doubling)
    between = between_work(problem, recipe, len(cluster.id))
    return lambda step: between if step % recipe.refresh_every else gradient


def lossy_run(problem: Problem, recipe: Recipe, cluster, num_steps: int, seed: int):
    """Hybrid-ES without the costs that do not arrive: accuracies and simulated times, ``[T]``."""
    estimator = training.estimator(problem, recipe.sigma, rate=recipe.rate, **how(recipe))

    @jax.jit
    def step(theta, state, index, heard):
        key = training.key_of(seed, index)
        grad, state = training.estimate_without(estimator, theta, state, key, heard)
        theta = training.descend(theta, grad, recipe.rate)
        return theta, state, training.measure(problem, theta).train

    def advance(carry, arrived):
        theta, state, index = carry
        heard = np.ones(recipe.num_candidates, bool)
        if index % recipe.refresh_every:  # A candidate is heard of if all parts of its batch are.
            heard = arrived.reshape(recipe.num_candidates, -1).all(axis=1)
        theta, state, accuracy = step(theta, state, index, jnp.asarray(heard))
        return (theta, state, index + 1), float(accuracy)

    start = (*training.init(problem, estimator, seed), 0)
    works = plan(problem, recipe, cluster)
    done = sim.simulate(cluster, works, num_steps, advance, start, seed=seed, patience=PATIENCE)
    return np.array(done.records), done.clock


def clock_alone(problem: Problem, recipe: Recipe, cluster, num_steps: int, **rules) -> np.ndarray:
    """Simulated times ``[T]`` of a run in which everything arrives, or is done again."""

    def nothing(state, arrived):
        return state, None

    works = plan(problem, recipe, cluster)
    return sim.simulate(cluster, works, num_steps, nothing, None, **rules).clock


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


class Sweep(NamedTuple):
    """Simulated seconds to the target, by method, for numbers of workers and bandwidths."""

    workers: dict[str, list[float]]
    bandwidths: dict[str, list[float]]
    recipes: list[dict[str, Any]]
    worst_error: float


def sweep(problem: Problem, steps: dict[Recipe, float], workers) -> Sweep:
    """Each method with its fastest recipe, all-reduces with the faster of two algorithms."""
    lines = {
        "gradient descent, ring": (GD, (True,)),
        SAME_RATE_LINE: (SAME_RATE, (True, False)),
        **{method: (method, (True, False)) for method in (GD, STALE, HYBRID)},
    }
    known: dict[Any, Clock] = {}
    rows, worst = [], 0.0

    def seconds(recipe, num, bandwidth, ring):
        nonlocal worst
        case = (recipe.mode, recipe.num_candidates, num, bandwidth, ring)
        if case not in known:
            cluster = sim.homogeneous(num, speed=SPEED, latency=LATENCY, bandwidth=bandwidth)
            exchange = sim.ring_all_reduce if ring else sim.halving_doubling
            known[case] = simulated(problem, recipe, cluster, exchange)
            formula = closed_form(problem, recipe, num, bandwidth, ring)
            for found, expected in zip(known[case], formula, strict=True):
                worst = max(worst, abs(found / expected - 1))
        return known[case].at(recipe, steps[recipe])

    def best(name, num, bandwidth):
        wanted, rings = lines[name]
        options = {
            (seconds(recipe, num, bandwidth, ring), recipe)
            for recipe in steps
            if wanted in (recipe, recipe.method)
            for ring in rings
        }
        found, recipe = min(options)
        rows.append(line(num, bandwidth, name, recipe, steps[recipe], found))
        return found

    points = [(num, BANDWIDTH) for num in workers], [(NUM_FIXED, b) for b in BANDWIDTHS]

    by_workers, by_bandwidth = (
        {name: [best(name, *point) for point in at] for name in progress(lines, desc="clusters")}
        for at in points
    )
    return Sweep(by_workers, by_bandwidth, rows, worst)


class Unequal(NamedTuple):
    """One method on a cluster of unequal workers: accuracy and simulated time, ``[T]``."""

    method: str
    cluster: str
    accuracy: np.ndarray
    clock: np.ndarray

    @property
    def seconds(self) -> float:
        steps = steps_to_target(self.accuracy)
        return float(self.clock[int(steps) - 1]) if math.isfinite(steps) else math.inf


EQUAL, SLOW, SLOW_EQUAL, LOSSY = (
    "equal workers",
    "one 4 times slower",
    "one 4 times slower, equal shares",
    "10% lost in each step",
)


def unequal(problem, recipe, curve: np.ndarray, link: dict[str, float], seeds: int) -> list:
    """A method on four clusters. Only where costs are missing is the trajectory another."""
    even = sim.homogeneous(NUM_UNEQUAL, speed=SPEED, **link)
    slow = even._replace(speed=even.speed * np.where(even.id == 0, 0.25, 1.0))
    lossy = even._replace(dropout=np.full(NUM_UNEQUAL, 0.1))
    num = len(curve)
    clocks = {
        EQUAL: clock_alone(problem, recipe, even, num),
        SLOW: clock_alone(problem, recipe, slow, num),
        SLOW_EQUAL: clock_alone(problem, recipe, slow, num, proportional=False),
    }
    found = [Unequal(recipe.method, name, curve, clock) for name, clock in clocks.items()]
    if recipe.mode == "select":
        runs = [lossy_run(problem, recipe, lossy, num, seed) for seed in range(seeds)]
        accuracy, clock = (np.mean(x, axis=0) for x in zip(*runs, strict=True))
    else:
        clock = clock_alone(problem, recipe, lossy, num, patience=PATIENCE)
        accuracy = curve
    return [*found, Unequal(recipe.method, LOSSY, accuracy, clock)]


def run(quick: bool, data_dir: str | None) -> Result:
    problem = training.problem(data_dir)
    recipes, seeds, workers = (QUICK_RECIPES, 1, QUICK_WORKERS) if quick else (RECIPES, 3, WORKERS)
    curves = {}
    for recipe in progress(recipes, desc="recipes"):
        train = training.trainer(problem, NUM_STEPS, recipe.rate, **how(recipe))
        curves[recipe] = np.mean([train(recipe.sigma, seed).train for seed in range(seeds)], axis=0)
    steps = {recipe: steps_to_target(curve) for recipe, curve in curves.items()}
    found = sweep(problem, steps, workers)

    def fastest(method):
        """By the number of gradients, which is what counts on a slow link."""
        mine = [recipe for recipe in recipes if recipe.method == method]
        return min(mine, key=lambda recipe: steps[recipe] / recipe.refresh_every)

    link = {"latency": LATENCY, "bandwidth": BANDWIDTH}
    fast = {"latency": LATENCY / 100, "bandwidth": 1e9}
    uneven = [
        row
        for method in (GD, HYBRID)
        for row in unequal(problem, fastest(method), curves[fastest(method)], link, seeds)
    ]
    hurried = [
        clock_alone(
            problem,
            fastest(HYBRID),
            sim.homogeneous(NUM_UNEQUAL, speed=SPEED, **fast)._replace(speed=speeds),
            NUM_STEPS,
        )[-1]
        for speeds in SPEED * np.array([np.ones(NUM_UNEQUAL), [0.25] + [1] * (NUM_UNEQUAL - 1)])
    ]
    table = found.recipes + [
        line(NUM_UNEQUAL, BANDWIDTH, f"{row.method}, {row.cluster}", fastest(row.method),
             steps_to_target(row.accuracy), row.seconds)
        for row in uneven
    ]  # fmt: skip
    data = {
        "worker": {"speed": SPEED, "latency": LATENCY, "draw_flops": DRAW_FLOPS},
        "workers": workers,
        "by_workers": found.workers,
        "bandwidths": BANDWIDTHS,
        "by_bandwidth": found.bandwidths,
        "unequal": uneven,
    }
    return Result(
        claims(found, uneven, hurried[1] / hurried[0] - 1, workers),
        table,
        draw(found, uneven, workers),
        data,
        training.caption(
            data_dir,
            NUM_STEPS,
            f"time to a mean training accuracy of {TARGET:.0%} over {seeds} seeds; simulated "
            "clock; no band",
        ),
    )


def claims(found: Sweep, uneven: list[Unequal], hurried: float, workers) -> list[Claim]:
    by = found.bandwidths
    ratio = {name: np.array(by[name]) / np.array(by[HYBRID]) for name in by}
    slow, fast = BANDWIDTHS.index(1e3), BANDWIDTHS.index(1e9)
    wins = [b for b, other in zip(BANDWIDTHS, ratio[GD], strict=True) if other > 1]
    seconds = {(row.method, row.cluster): row.seconds for row in uneven}
    slower = {
        name: seconds[HYBRID, name] / seconds[HYBRID, EQUAL] - 1
        for name in (SLOW, SLOW_EQUAL, LOSSY)
    }
    alone = found.workers[GD][0]
    ring = found.workers["gradient descent, ring"]
    return [
        Claim(
            "Where all workers are equal the event clock is the closed form.",
            found.worst_error < 1e-9,
            f"largest relative difference {found.worst_error:.1e}, 1 to {workers[-1]:,} workers",
        ),
        Claim(
            "On a slow link H-ES reaches the target sooner than gradient descent at any of the "
            "tried rates, and sooner than repeating the stale gradient.",
            bool(ratio[GD][slow] > 1 and ratio[STALE][slow] > 1),
            f"at 1 kB/s and {NUM_FIXED} workers gradient descent takes {ratio[GD][slow]:.1f} "
            f"times as long ({ratio[SAME_RATE_LINE][slow]:.1f} at H-ES's learning rate), the "
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
            bool(alone < min(min(x[1:]) for x in found.workers.values())),
            f"{alone:.1f} s; {workers[-1]:,} workers at {BANDWIDTH / 1e3:g} kB/s: gradient descent "
            f"{found.workers[GD][-1]:.0f} s ({ring[-1]:.0f} s around a ring), H-ES "
            f"{found.workers[HYBRID][-1]:.0f} s",
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


def draw(found: Sweep, uneven: list[Unequal], workers) -> Figure:
    figure, panels = plots.panels(3, (11.5, 3.6))
    styles = {
        "gradient descent, ring": (COLORS[GD], ":", "gradient descent, ring all-reduce"),
        SAME_RATE_LINE: (COLORS[GD], "--", "gradient descent at H-ES's learning rate"),
        GD: (COLORS[GD], "-", GD),
        STALE: (COLORS[STALE], "-", "stale gradient, no search"),
        HYBRID: (COLORS[HYBRID], "-", HYBRID),
    }
    sides: tuple[Any, ...] = (
        (panels[0], workers, found.workers, f"workers; {BANDWIDTH / 1e3:g} kB/s"),
        (panels[1], BANDWIDTHS, found.bandwidths, f"bandwidth (bytes/s); {NUM_FIXED} workers"),
    )
    for axes, at, seconds, label in sides:
        for name, (color, style, text) in styles.items():
            width = 3.0 if name == GD else 1.3  # Where it is under the stale gradient's.
            axes.plot(at, seconds[name], f".{style}", color=color, linewidth=width, label=text)
        axes.set(xscale="log", yscale="log", xlabel=label)
        axes.set_ylabel(f"simulated time to {TARGET:.0%} accuracy (s)")
    panels[0].legend(fontsize=7)
    last = panels[2]
    lines = {EQUAL: "-", SLOW: "--", LOSSY: ":"}
    for row in uneven:
        if row.cluster in lines:
            style, label = lines[row.cluster], f"{row.method}, {row.cluster}"
            error = 100 - 100 * row.accuracy
            last.plot(row.clock, error, style, color=COLORS[row.method], lw=1.2, label=label)
    plots.level(last, 100 - 100 * TARGET, color="gray", linestyle="-")
    last.set(
        xlim=(0, 1.6 * max(row.seconds for row in uneven if math.isfinite(row.seconds))),
        yscale="log",
        ylim=(0.5, 100),
        xlabel=f"simulated time (s); {NUM_UNEQUAL} workers, {BANDWIDTH / 1e3:g} kB/s",
        ylabel="training error (%)",
    )
    last.legend(fontsize=7, loc="upper right")
    return figure


STUDY = Study(
    "Hybrid-ES on a simulated network: time to an accuracy, slow and lost workers", 2.0, run
)
