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
from launch.studies.hybrid_es.hybrid_es_cluster import DRAW_FLOPS
from launch.studies.hybrid_es.hybrid_training import RELATIVE, Curve, Problem
from launch.studies.shared import classifier, plots
from launch.studies.shared.compare import in_parallel
from meta_train import samplers, trainer
from meta_train.estimators.hybrid import Noise, learned_features, replay
from meta_train.estimators.hybrid.compression import int8, top_k
from meta_train.estimators.hybrid.messages import traffic

NUM_STEPS = 300
RATE, REFRESH_EVERY, TUNED = 1.0, 10, 3.0
ADAPTIVE = Noise(1.0, relative=True, success_rate=0.5)
FACTORS = (0.1, 1.0, 10.0)  # of the tuned sigma
FRACTIONS = (0.1, 0.3, 1.0)
# Learned features: where the gradient turns slowly under its noise there is something to learn.
SLOW_RATE, INTERVALS = 0.03, (2, 5, 10, 20)
DIM, NUM_PAIRS = 16, 64
# Compression: the poster's kind of run, with many gradients.
FREQUENT: Any = {"refresh_every": 3, "rate": 3.0, "combine": "argmin", "antithetic": False}
KEPT = 0.1
SLOWER = (1, 2, 4, 8)


class Item(NamedTuple):
    """One future-work item: its claim, rows of the table, what to draw and how.

    A row is what was measured, its value and what was expected of it.
    """

    claim: Claim
    rows: list[tuple[str, Any, str]]
    data: dict[str, Any]
    draw: Callable[[Any, dict[str, Any]], None]


def trained(problem: Problem, sigmas, seeds: int, **how) -> Curve:
    """Final accuracies and losses, ``[sigmas, seeds]``."""
    settings: dict[str, Any] = {"mode": "select", "refresh_every": REFRESH_EVERY, "rate": RATE}
    train = training.trainer(problem, NUM_STEPS, every=NUM_STEPS, **(settings | how))
    return training.last(train, sigmas, seeds, "runs")


def adaptive_sigma(problem: Problem, seeds: int, quick: bool) -> Item:
    """1: the success rule, started at a tenth and at ten times the tuned sigma."""
    sigmas = [TUNED * factor for factor in FACTORS]
    fixed = trained(problem, sigmas, seeds).loss.mean(axis=1)
    adapted = trained(problem, sigmas, seeds, noise=ADAPTIVE).loss.mean(axis=1)
    layers = {} if quick else {"one sigma": (), "a sigma per layer": layer_sizes(problem)}
    r3 = {
        kind: float(
            trained(
                problem, (TUNED,), seeds, refresh_every=3, noise=RELATIVE._replace(layers=sizes)
            ).loss.mean()
        )
        for kind, sizes in layers.items()
    }
    tuned = float(fixed[1])
    worst = float(max(adapted[0], adapted[2]) / tuned)
    rows = [
        (f"loss over tuned, sigma x {factor:g}, {kind}", float(loss / tuned), limit)
        for kind, losses, limit in (("fixed", fixed, "-"), ("adapted", adapted, "<= 1.1"))
        for factor, loss in zip(FACTORS, losses, strict=True)
        if factor != 1
    ] + [(f"loss, r = 3, {kind}", loss, "-") for kind, loss in r3.items()]

    def draw(axes, data):
        axes.plot(sigmas, data["fixed"], "o--", color=plots.GRAY, label="fixed")
        axes.plot(sigmas, data["adapted"], "o-", color=plots.VERMILION, label="1/5th success rule")
        axes.set(xscale="log", ylim=(0, None))
        axes.set(xlabel="sigma at the start (deviations)", ylabel="training loss (nats)")
        axes.legend()

    claim = Claim(
        "Started at a tenth or ten times the tuned sigma, the adaptive sigma ends within 10% of "
        "the tuned loss (or below).",
        worst <= 1.1,
        f"at worst {worst:.2f} times the tuned loss of {tuned:.4f} nats; without adapting "
        f"{max(fixed[0], fixed[2]) / tuned:.1f} times"
        + "".join(f"; r = 3, {kind}: {loss:.4f}" for kind, loss in r3.items()),
    )
    data = {"fixed": fixed.tolist(), "adapted": adapted.tolist()}
    return Item(claim, rows, data | {"r3": r3}, draw)


def layer_sizes(problem: Problem) -> tuple[int, ...]:
    theta = jax.eval_shape(lambda: classifier.init(jax.random.key(0), problem.sizes))
    return tuple(leaf.size for leaf in jax.tree.leaves(theta))


def masks(problem: Problem, seeds: int, quick: bool) -> Item:
    """2: only a drawn part of the weights is perturbed."""

    def with_mask(**mask) -> float:
        return float(
            trained(problem, (TUNED,), seeds, noise=RELATIVE._replace(**mask)).train.mean()
        )

    fractions = FRACTIONS[:1] if quick else FRACTIONS
    accuracy = {share: with_mask(mask="random", fraction=share) for share in fractions}
    kinds: dict[str, dict[str, Any]] = {
        f"largest {FRACTIONS[0]:g}": {"mask": "largest", "fraction": FRACTIONS[0]},
        "layers 0.5": {"mask": "layers", "fraction": 0.5, "layers": layer_sizes(problem)},
    }
    others = {} if quick else {kind: with_mask(**mask) for kind, mask in kinds.items()}
    dense, stale = in_between(problem, RELATIVE)
    whole, _ = in_between(problem, RELATIVE._replace(mask="random", fraction=1.0))
    part, _ = in_between(problem, RELATIVE._replace(mask="random", fraction=FRACTIONS[0]))
    kept = float(np.mean(part == stale))
    expected = 1 - FRACTIONS[0]
    spread = np.sqrt(FRACTIONS[0] * expected / part.size)
    exact = bool(np.array_equal(dense, whole) and abs(kept - expected) < 5 * spread)
    rows = [
        ("share of entries equal to the stale step, bitwise", kept, f"{expected:.2f}"),
        ("fraction 1 is dense, bitwise", bool(np.array_equal(dense, whole)), "True"),
        *((f"train %, random {f:g}", value, "-") for f, value in accuracy.items()),
        *((f"train %, {what}", value, "-") for what, value in others.items()),
    ]

    def draw(axes, data):
        values = [data["accuracy"][str(f)] for f in fractions]
        axes.plot(fractions, values, "o-", color=plots.VERMILION)
        plots.steps_axis(axes, fractions)
        axes.set(xlabel="share of the weights perturbed", ylabel="training accuracy (%)")

    claim = Claim(
        "Masked entries are the stale step's to the bit, and a mask of everything changes nothing.",
        exact,
        f"{100 * kept:.1f}% of the entries are unperturbed at fraction {FRACTIONS[0]:g}; training "
        + ", ".join(f"{value:.2f}% at {f:g}" for f, value in accuracy.items()),
    )
    return Item(claim, rows, {"accuracy": {str(f): v for f, v in accuracy.items()} | others}, draw)


def in_between(problem: Problem, noise: Noise) -> tuple[np.ndarray, np.ndarray]:
    """The step after a gradient, and the stale gradient it started from, ``[P]``."""
    built = training.estimator(
        problem, TUNED, mode="select", refresh_every=2, rate=RATE, noise=noise
    )
    theta, state = training.init(problem, built, 0)
    estimate = jax.jit(built.estimate)
    first, state, _ = estimate(theta, state, training.key_of(0, 0))
    second, _, _ = estimate(theta, state, training.key_of(0, 1))
    flat = [np.asarray(ravel_pytree(grad)[0]) for grad in (second, first)]
    return flat[0], flat[1]


def learned(problem: Problem, seeds: int, quick: bool) -> Item:
    """3: a predictor of the gradient, against the stale one, on gradients it has not seen."""
    steps, intervals = (600, INTERVALS[1:2]) if quick else (1500, INTERVALS)

    def cosines(r: int, rate: float, num_steps: int) -> np.ndarray:
        """Mean cosine to the gradient of all data in between, ``[seeds, 2]``: stale, predicted."""
        predictor = learned_features()
        built = training.estimator(
            problem, 1.0, mode="stale", refresh_every=r, rate=rate, predictor=predictor
        )

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
    kinds = "stale", "predicted"
    means = () if quick else cosines(REFRESH_EVERY, RATE, NUM_STEPS).mean(axis=0)
    fast = dict(zip(kinds, map(float, means), strict=False))
    better = {r: float((c[:, 1] - c[:, 0]).min()) for r, c in found.items() if r >= 5}
    rows = [
        (f"cosine, r = {r}: {kind}", float(c[:, i].mean()), limit if r >= 5 else "-")
        for r, c in found.items()
        for i, (kind, limit) in enumerate(zip(kinds, ("-", "> stale"), strict=True))
    ]
    rows += [
        (f"cosine, r = {REFRESH_EVERY}, rate {RATE:g}: {kind}", value, "-")
        for kind, value in fast.items()
    ]

    def draw(axes, data):
        for i, (label, color) in enumerate(zip(kinds, (plots.GRAY, plots.VERMILION), strict=True)):
            values = [np.mean(data["cosine"][str(r)], axis=0)[i] for r in intervals]
            axes.plot(intervals, values, "o-", color=color, label=label)
        plots.steps_axis(axes, intervals)
        axes.set(ylim=(0, 1), xlabel="r: steps per gradient", ylabel="cosine to the true gradient")
        axes.legend()

    claim = Claim(
        "Where the gradient turns slowly (rate 0.03) the predicted gradient is closer to the true "
        "one than the stale gradient, from r = 5 on and on every seed.",
        min(better.values()) > 0,
        "mean cosines: "
        + "; ".join(
            f"r = {r}: stale {c[:, 0].mean():.3f}, predicted {c[:, 1].mean():.3f}"
            for r, c in found.items()
        )
        + "".join(
            f"; at rate {RATE:g}, r = {REFRESH_EVERY}, {kind}: {value:.3f}"
            for kind, value in fast.items()
        ),
    )
    data = {"cosine": {str(r): c.tolist() for r, c in found.items()}}
    return Item(claim, rows, data, draw)


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
    rows = [
        (
            f"squared error over |g|^2: {name}",
            value,
            {"normal": f"{expected:.2f}", "orthogonal": "< half", "sobol": "< half"}.get(name, "-"),
        )
        for name, value in found.items()
    ]

    def draw(axes, data):
        names = list(data)
        axes.barh(names, list(data.values()), color=plots.VERMILION)
        axes.axvline(expected, color="black", linestyle="--", linewidth=1)
        axes.invert_yaxis()
        axes.set_xlabel("squared error of the gradient / |g|²")

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
    codes: dict[str, Any] = {"float32": None, "int8": int8(), f"top {KEPT:.0%}": top_k(KEPT)}
    if quick:
        del codes[f"top {KEPT:.0%}"]
    accuracy, sent = {}, {}
    for name, code in codes.items():
        curve = trained(problem, (1.0,), seeds, compressor=code, **FREQUENT)
        accuracy[name] = float(curve.train.mean())
        each = traffic(
            problem.num_weights, num_workers=1, candidates_per_worker=32, compressor=code
        )
        r = FREQUENT["refresh_every"]
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

    def draw(axes, data):
        bars = axes.barh(list(data["bytes"]), list(data["bytes"].values()), color=plots.VERMILION)
        axes.bar_label(bars, [f" {value:.2f}%" for value in data["accuracy"].values()])
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
    built = training.estimator(
        problem, TUNED, mode="select", refresh_every=REFRESH_EVERY, rate=RATE, compressor=int8()
    )
    optimizer = optax.sgd(RATE)
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
    size, num, candidates = problem.num_weights, 16, 256
    link = {"speed": 1e9, "latency": 1e-3, "bandwidth": 1e5}
    work = sim.Work(
        candidates,
        (DRAW_FLOPS + 2.0 * training.BATCH) * size,
        sim.all_gather(4.0 * candidates),
        after_flops=(DRAW_FLOPS + 2.0) * size,  # Every worker draws the best candidate again.
    )
    equal = sim.homogeneous(num, **link)
    base = sim.simulate_step(equal, work).seconds
    closed = (candidates / num * work.unit_flops + work.after_flops) / link["speed"]
    closed += np.log2(num) * link["latency"]
    closed += (num - 1) / num * 4 * candidates / link["bandwidth"]

    def slowdown(factor, proportional):
        speed = equal.speed.copy()
        speed[0] /= factor
        slow = equal._replace(speed=speed)
        return sim.simulate_step(slow, work, proportional=proportional).seconds / base

    found = {
        kind: [slowdown(factor, kind == "by speed") for factor in SLOWER]
        for kind in ("equal shares", "by speed")
    }
    four = SLOWER.index(4)
    rows = [
        ("equal workers, time over closed form", base / closed, "1"),
        *(
            (f"a worker 4 times slower, {kind}", values[four], limit)
            for (kind, values), limit in zip(found.items(), ("-", "< 1.3"), strict=True)
        ),
    ]

    def draw(axes, data):
        for (kind, values), color in zip(data.items(), (plots.GRAY, plots.VERMILION), strict=True):
            axes.plot(SLOWER, values, "o-", color=color, label=kind)
        axes.set_xticks(SLOWER)
        axes.set(xlabel="one of 16 workers is slower (times)")
        axes.set(ylabel="time of a step / equal workers")
        axes.legend()

    claim = Claim(
        "Where computing takes the time, a worker four times slower costs less than 30% when "
        "shares go by speed, more when they are equal; equal workers take the closed form's time.",
        found["by speed"][four] < 1.3 < found["equal shares"][four]
        and abs(base / closed - 1) < 1e-9,
        f"{100 * (found['by speed'][four] - 1):.0f}% by speed, "
        f"{100 * (found['equal shares'][four] - 1):.0f}% with equal shares",
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
        item.draw(axes, item.data)
        axes.set_title(name)
    return Result(
        [item.claim for item in items.values()],
        [
            {"item": name, "measured": what, "value": value, "limit": limit}
            for name, item in items.items()
            for what, value, limit in item.rows
        ],
        figure,
        {name: item.data for name, item in items.items()},
        training.caption(data_dir, NUM_STEPS, f"points and bars: means of {seeds} seeds"),
    )


STUDY = Study("Hybrid-ES: sigma, masks, learned features, samplers, compression, cluster", 3.0, run)
