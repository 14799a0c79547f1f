"""Hybrid-ES: what the poster leaves for the future, each with a check that it works.

python -m launch.reproduce hybrid_es_features --workdir=DIR [--data_dir=DIR]

Adaptive sigma, masks, learned features, other distributions, compression, a cluster of unequal
workers. Where a classifier is trained, candidates are ranked and mirrored, with a gradient
every 10 steps at rate 1, and sigma is in units of the deviation of the gradient's components.
"""

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree

from launch import cluster_sim as sim
from launch.studies.base import Claim, Result, Study
from launch.studies.hybrid_es import hybrid_training as training
from launch.studies.hybrid_es.cluster_clock import DRAW_FLOPS, LATENCY, SPEED
from launch.studies.hybrid_es.hybrid_training import RELATIVE, Curve, Problem, Recipe
from launch.studies.shared import plots
from launch.studies.shared.compare import in_parallel
from meta_train import samplers, trainer
from meta_train.estimators.hybrid import Noise, learned_features, replay
from meta_train.estimators.hybrid.compression import int8, top_k
from meta_train.estimators.hybrid.messages import traffic

NUM_STEPS = 300
TUNED = Recipe("select", refresh_every=10, rate=1.0, sigma=3.0)
ADAPTIVE = Noise(1.0, relative=True, success_rate=0.5)
FACTORS = (0.1, 1.0, 10.0)  # of the tuned sigma
FRACTIONS = (0.1, 0.3, 1.0)
# Learned features: where the gradient turns slowly under its noise there is something to learn.
SLOW_RATE, INTERVALS = 0.03, (2, 5, 10, 20)
DIM, NUM_PAIRS = 16, 64
# Compression: the poster's kind of run, with many gradients.
FREQUENT = Recipe("select", 3, 3.0, combine="argmin", antithetic=False)
KEPT = 0.1
NUM_WORKERS, NUM_CANDIDATES, SLOWER = 16, 256, (1, 2, 4, 8)
OURS, OTHER = plots.VERMILION, plots.GRAY


class Item(NamedTuple):
    """One future-work item: its claim, rows of the table, what to draw and how.

    A row is what was measured, its value and what was expected of it.
    """

    claim: Claim
    rows: list[tuple[str, Any, str]]
    data: dict[str, Any]
    draw: Callable[[Any], None]


def trained(problem: Problem, recipes: dict[Any, Recipe], seeds: int) -> dict[Any, Curve]:
    """Final accuracies and losses, ``[seeds]``."""
    return training.train_all(problem, NUM_STEPS, recipes, seeds)


def adaptive_sigma(problem: Problem, seeds: int, quick: bool) -> Item:
    """1: the success rule, started at a tenth and at ten times the tuned sigma."""
    recipes: dict[Any, Recipe] = {}
    for kind, noise in (("fixed", RELATIVE), ("adapted", ADAPTIVE)):
        for factor in FACTORS:
            recipes[kind, factor] = TUNED._replace(sigma=3.0 * factor, noise=noise)
    layers = {} if quick else {"one sigma": (), "a sigma per layer": problem.tensor_sizes}
    for kind, sizes in layers.items():
        recipes[kind] = TUNED._replace(refresh_every=3, noise=RELATIVE._replace(layers=sizes))
    loss = {name: float(x.loss.mean()) for name, x in trained(problem, recipes, seeds).items()}
    tuned = loss["fixed", 1.0]
    worst = {
        kind: max(loss[kind, factor] for factor in (0.1, 10.0)) / tuned
        for kind in ("fixed", "adapted")
    }
    limits = {"fixed": "-", "adapted": "<= 1.1"}
    rows = [
        (f"loss over tuned, sigma x {factor:g}, {kind}", loss[kind, factor] / tuned, limit)
        for kind, limit in limits.items()
        for factor in (0.1, 10.0)
    ] + [(f"loss, r = 3, {kind}", loss[kind], "-") for kind in layers]

    def draw(axes):
        sigmas = [3.0 * factor for factor in FACTORS]
        for kind, style, color, label in (
            ("fixed", "o--", OTHER, "fixed"),
            ("adapted", "o-", OURS, "1/5th success rule"),
        ):
            losses = [loss[kind, factor] for factor in FACTORS]
            axes.plot(sigmas, losses, style, color=color, label=label)
        axes.set(xscale="log", ylim=(0, None))
        axes.set(xlabel="sigma at the start (deviations)", ylabel="training loss (nats)")
        axes.legend()

    claim = Claim(
        "Started at a tenth or ten times the tuned sigma, the adaptive sigma ends within 10% of "
        "the tuned loss (or below).",
        worst["adapted"] <= 1.1,
        f"at worst {worst['adapted']:.2f} times the tuned loss of {tuned:.4f} nats; without "
        f"adapting {worst['fixed']:.1f} times"
        + "".join(f"; r = 3, {kind}: {loss[kind]:.4f}" for kind in layers),
    )
    return Item(claim, rows, {str(name): value for name, value in loss.items()}, draw)


def masks(problem: Problem, seeds: int, quick: bool) -> Item:
    """2: only a drawn part of the weights is perturbed."""
    least = FRACTIONS[0]
    fractions = FRACTIONS[:1] if quick else FRACTIONS
    noises = {f"random {f:g}": RELATIVE._replace(mask="random", fraction=f) for f in fractions}
    if not quick:
        noises |= {
            f"largest {least:g}": RELATIVE._replace(mask="largest", fraction=least),
            "layers 0.5": RELATIVE._replace(
                mask="layers", fraction=0.5, layers=problem.tensor_sizes
            ),
        }
    recipes = {name: TUNED._replace(noise=noise) for name, noise in noises.items()}
    curves = trained(problem, recipes, seeds)
    accuracy = {name: float(curve.train.mean()) for name, curve in curves.items()}
    dense, stale = in_between(problem, RELATIVE)
    whole, _ = in_between(problem, RELATIVE._replace(mask="random", fraction=1.0))
    part, _ = in_between(problem, RELATIVE._replace(mask="random", fraction=least))
    same, kept = bool(np.array_equal(dense, whole)), float(np.mean(part == stale))
    spread = np.sqrt(least * (1 - least) / part.size)
    rows = [
        ("share of entries equal to the stale step, bitwise", kept, f"{1 - least:.2f}"),
        ("fraction 1 is dense, bitwise", same, "True"),
        *((f"train %, {name}", value, "-") for name, value in accuracy.items()),
    ]

    def draw(axes):
        values = [accuracy[f"random {f:g}"] for f in fractions]
        axes.plot(fractions, values, "o-", color=OURS)
        plots.steps_axis(axes, fractions)
        axes.set(xlabel="share of the weights perturbed", ylabel="training accuracy (%)")

    claim = Claim(
        "Masked entries are the stale step's to the bit, and a mask of everything changes nothing.",
        same and bool(abs(kept - (1 - least)) < 5 * spread),
        f"{100 * kept:.1f}% of the entries are unperturbed at fraction {least:g}; training "
        + ", ".join(f"{accuracy[f'random {f:g}']:.2f}% at {f:g}" for f in fractions),
    )
    return Item(claim, rows, {"accuracy": accuracy}, draw)


def in_between(problem: Problem, noise: Noise) -> tuple[np.ndarray, np.ndarray]:
    """The step after a gradient, and the stale gradient it started from, ``[P]``."""
    built = training.estimator(problem, TUNED._replace(refresh_every=2, noise=noise))
    theta, state = training.init(problem, built, 0)
    quickly_compiled = {"xla_backend_optimization_level": 0}  # Each runs once.
    estimate = jax.jit(built.estimate, compiler_options=quickly_compiled)
    first, state, _ = estimate(theta, state, training.key_of(0, 0))
    second, _, _ = estimate(theta, state, training.key_of(0, 1))
    return np.asarray(ravel_pytree(second)[0]), np.asarray(ravel_pytree(first)[0])


def learned(problem: Problem, seeds: int, quick: bool) -> Item:
    """3: a predictor of the gradient, against the stale one, on gradients it has not seen."""
    steps, intervals = (600, INTERVALS[1:2]) if quick else (1500, INTERVALS)

    def cosines(r: int, rate: float, num_steps: int) -> np.ndarray:
        """Mean cosine to the gradient of all data in between, ``[seeds, 2]``: stale, predicted."""
        recipe = Recipe("stale", r, rate, predictor=learned_features())
        built = training.estimator(problem, recipe)

        def run(seed):
            def body(carry, step):
                theta, state = carry
                truth = ravel_pytree(jax.grad(training.loss)(theta, problem.train))[0]
                shared = state.shared
                guesses = jnp.stack([shared.prediction.past[0], shared.surrogate])
                norms = jnp.linalg.norm(guesses, axis=1) * jnp.linalg.norm(truth)
                cosine = guesses @ truth / jnp.maximum(norms, 1e-30)
                grad, state, _ = built.estimate(theta, state, training.key_of(seed, step))
                return (training.descend(theta, grad, rate), state), cosine

            start = training.init(problem, built, seed)
            found = jax.lax.scan(body, start, jnp.arange(num_steps))[1]
            between = (np.arange(num_steps) % r != 0) & (np.arange(num_steps) >= 5 * r)
            return jnp.mean(found[between], axis=0)

        compiled = jax.jit(run)
        return np.stack([compiled(seed) for seed in range(seeds)])

    found = {r: cosines(r, SLOW_RATE, steps) for r in intervals}
    means = {f"r = {r}": c.mean(axis=0) for r, c in found.items()}
    if not quick:
        r, rate = TUNED.refresh_every, TUNED.rate
        means[f"r = {r}, rate {rate:g}"] = cosines(r, rate, NUM_STEPS).mean(axis=0)
    learning = {f"r = {r}" for r in intervals if r >= 5}
    rows = [
        (f"cosine, {name}: {kind}", float(mean), limit if name in learning else "-")
        for name, both in means.items()
        for kind, limit, mean in zip(("stale", "predicted"), ("-", "> stale"), both, strict=True)
    ]

    def draw(axes):
        for i, (label, color) in enumerate((("stale", OTHER), ("predicted", OURS))):
            values = [means[f"r = {r}"][i] for r in intervals]
            axes.plot(intervals, values, "o-", color=color, label=label)
        plots.steps_axis(axes, intervals)
        axes.set(ylim=(0, 1), xlabel="r: steps per gradient", ylabel="cosine to the true gradient")
        axes.legend()

    claim = Claim(
        "Where the gradient turns slowly (rate 0.03) the predicted gradient is closer to the true "
        "one than the stale gradient, from r = 5 on and on every seed.",
        all((c[:, 1] > c[:, 0]).all() for r, c in found.items() if r >= 5),
        "mean cosines: "
        + "; ".join(f"{n}: stale {x[0]:.3f}, predicted {x[1]:.3f}" for n, x in means.items()),
    )
    return Item(claim, rows, {"cosine": {str(r): c for r, c in found.items()}}, draw)


def distributions(problem: Problem, seeds: int, quick: bool) -> Item:
    """4: the error of the ES gradient of a quadratic in 16 dimensions, 64 mirrored pairs."""
    del problem, quick
    gradient = jax.random.normal(jax.random.key(0), (DIM,))

    def error(name):
        @jax.jit
        def one(key):
            eps = samplers.draw(name, key, NUM_PAIRS, DIM)
            # A mirrored pair's slope on a quadratic is exactly the directional derivative.
            estimate = (eps @ gradient) @ eps / NUM_PAIRS
            return jnp.sum((estimate - gradient) ** 2) / jnp.sum(gradient**2)

        keys = jax.random.split(jax.random.key(1), 200 * seeds)
        return float(jnp.mean(jax.vmap(one)(keys)))

    found = {name: error(name) for name in samplers.SAMPLERS}
    expected = (DIM + 1) / NUM_PAIRS
    limits = {"normal": f"{expected:.2f}", "orthogonal": "< half", "sobol": "< half"}
    rows = [
        (f"squared error over |g|^2: {name}", value, limits.get(name, "-"))
        for name, value in found.items()
    ]

    def draw(axes):
        axes.barh(list(found), list(found.values()), color=OURS)
        axes.axvline(expected, color="black", linestyle="--", linewidth=1, label="closed form")
        axes.invert_yaxis()
        axes.set_xlabel("squared error of the gradient / |g|²")
        axes.legend(loc="lower center")

    claim = Claim(
        "Orthogonal and Sobol directions at least halve the error of the ES gradient of a "
        "quadratic.",
        max(found["orthogonal"], found["sobol"]) < 0.5 * found["normal"],
        f"normal {found['normal']:.2f} (closed form {expected:.2f}), orthogonal "
        f"{found['orthogonal']:.2g}, Sobol {found['sobol']:.2f}",
    )
    return Item(claim, rows, found, draw)


def compressed(problem: Problem, seeds: int, quick: bool) -> Item:
    """5: gradients in fewer bytes, and the weights from a log of messages."""
    codes = {"float32": None, "int8": int8()} | ({} if quick else {f"top {KEPT:.0%}": top_k(KEPT)})
    recipes = {name: FREQUENT._replace(compressor=code) for name, code in codes.items()}
    curves = trained(problem, recipes, seeds)
    accuracy = {name: float(curve.train.mean()) for name, curve in curves.items()}
    sent, r = {}, FREQUENT.refresh_every
    for name, code in codes.items():
        each = traffic(
            problem.num_weights, num_workers=1, candidates_per_worker=32, compressor=code
        )
        sent[name] = (each.refresh + (r - 1) * each.between) / r
    equal, log_bytes = rebuilt(problem)
    drop = accuracy["float32"] - min(accuracy.values())
    rows = [
        ("weights rebuilt from the log, bitwise", equal, "True"),
        ("bytes of the log, a step", log_bytes, "-"),
        *((f"bytes sent a step, {code}", value, "-") for code, value in sent.items()),
        *(
            (f"train %, {code}", value, "-" if code == "float32" else "drop < 0.5")
            for code, value in accuracy.items()
        ),
    ]

    def draw(axes):
        bars = axes.barh(list(sent), list(sent.values()), color=OURS)
        axes.bar_label(bars, [f" {value:.2f}%" for value in accuracy.values()])
        axes.margins(x=0.2)
        axes.invert_yaxis()
        axes.set_xlabel("bytes a step (labels: training accuracy)")

    claim = Claim(
        "A log of seeds, costs and gradients rebuilds the weights bit for bit, and gradients in "
        "fewer bytes cost less than 0.5 points.",
        equal and drop < 0.5,
        f"largest drop {drop:.2f} points; bytes a step: "
        + ", ".join(f"{code} {value:.0f}" for code, value in sent.items()),
    )
    return Item(claim, rows, {"accuracy": accuracy, "bytes": sent}, draw)


def rebuilt(problem: Problem, num_steps: int = 25) -> tuple[bool, float]:
    """Whether the weights after some steps follow from the log, and its bytes a step."""
    built = training.estimator(problem, TUNED._replace(compressor=int8()))
    optimizer = optax.sgd(TUNED.rate)
    step = jax.jit(trainer.make_step(built, optimizer))
    start = trainer.init_state(built, optimizer, lambda key: training.init(problem, built, 0)[0], 0)
    state = start
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "replay.log"
        log = replay.ReplayLog(path, 0)
        for number in range(1, num_steps + 1):
            state, metrics = step(state)
            log.append(number, jax.device_get(metrics["message"]))
        log.close()
        found = replay.rebuild(built, optimizer, start, path)
        size = path.stat().st_size / num_steps
    pairs = zip(jax.tree.leaves(found.theta), jax.tree.leaves(state.theta), strict=True)
    return all(np.array_equal(a, b) for a, b in pairs), size


def cluster(problem: Problem, seeds: int, quick: bool) -> Item:
    """6: one slow worker among sixteen, with equal shares and with shares by speed."""
    del seeds, quick
    size, sent = problem.num_weights, 4.0 * NUM_CANDIDATES
    work = sim.Work(
        NUM_CANDIDATES,
        (DRAW_FLOPS + 2.0 * training.BATCH) * size,
        sim.all_gather(sent),
        after_flops=(DRAW_FLOPS + 2.0) * size,  # Every worker draws the best candidate again.
    )
    equal = sim.homogeneous(NUM_WORKERS, speed=SPEED, latency=LATENCY, bandwidth=1e5)
    base = sim.simulate_step(equal, work).seconds
    closed = (NUM_CANDIDATES / NUM_WORKERS * work.unit_flops + work.after_flops) / SPEED
    closed += np.log2(NUM_WORKERS) * LATENCY + (NUM_WORKERS - 1) / NUM_WORKERS * sent / 1e5

    def slowdown(factor, proportional):
        slow = equal._replace(speed=np.where(equal.id == 0, SPEED / factor, SPEED))
        return sim.simulate_step(slow, work, proportional=proportional).seconds / base

    found = {
        kind: [slowdown(factor, kind == "by speed") for factor in SLOWER]
        for kind in ("equal shares", "by speed")
    }
    even, by_speed = (values[SLOWER.index(4)] for values in found.values())
    rows = [
        ("equal workers, time over closed form", base / closed, "1"),
        ("a worker 4 times slower, equal shares", even, "-"),
        ("a worker 4 times slower, by speed", by_speed, "< 1.3"),
    ]

    def draw(axes):
        for (kind, values), color in zip(found.items(), (OTHER, OURS), strict=True):
            axes.plot(SLOWER, values, "o-", color=color, label=kind)
        axes.set_xticks(SLOWER)
        axes.set(xlabel="one of 16 workers is slower (times)")
        axes.set(ylabel="time of a step / equal workers")
        axes.legend()

    claim = Claim(
        "Where computing takes the time, a worker four times slower costs less than 30% when "
        "shares go by speed, more when they are equal; equal workers take the closed form's time.",
        by_speed < 1.3 < even and abs(base / closed - 1) < 1e-9,
        f"{100 * (by_speed - 1):.0f}% by speed, {100 * (even - 1):.0f}% with equal shares",
    )
    return Item(claim, rows, found, draw)


ITEMS = {
    "1 sigma": adaptive_sigma,
    "2 masks": masks,
    "3 learned features": learned,
    "4 distributions": distributions,
    "5 compression": compressed,
    "6 cluster": cluster,
}


def run(quick: bool, data_dir: str | None) -> Result:
    problem = training.problem(data_dir)
    seeds = 1 if quick else 5
    items = in_parallel(
        {name: partial(build, problem, seeds, quick) for name, build in ITEMS.items()}
    )
    figure, panels = plots.panels(3, (11, 6.2), rows=2)
    for axes, (name, item) in zip(panels.flat, items.items(), strict=True):
        item.draw(axes)
        axes.set_title(name)
    table = [
        {"item": name, "measured": what, "value": value, "limit": limit}
        for name, item in items.items()
        for what, value, limit in item.rows
    ]
    data = {name: item.data for name, item in items.items()}
    caption = training.caption(data_dir, NUM_STEPS, f"points and bars: means of {seeds} seeds")
    return Result([item.claim for item in items.values()], table, figure, data, caption)


STUDY = Study("Hybrid-ES: sigma, masks, learned features, samplers, compression, cluster", 3.0, run)
