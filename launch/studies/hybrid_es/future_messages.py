"""What workers send and do: predicted gradients, compressed ones, unequal shares."""

import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree

from launch import cluster_sim as sim
from launch.studies.base import Claim
from launch.studies.hybrid_es import hybrid_training as training
from launch.studies.hybrid_es.cluster_clock import DRAW_FLOPS, LATENCY, SPEED
from launch.studies.hybrid_es.future_work import NUM_STEPS, OTHER, OURS, TUNED, Item
from launch.studies.hybrid_es.hybrid_training import Problem, Recipe
from launch.studies.shared import plots
from meta_train import trainer
from meta_train.estimators.hybrid import learned_features, replay
from meta_train.estimators.hybrid.compression import int8, top_k
from meta_train.estimators.hybrid.messages import traffic

# Learned features: where the gradient turns slowly under its noise there is something to learn.
SLOW_RATE, INTERVALS = 0.03, (2, 5, 10, 20)
# Compression: the poster's kind of run, with many gradients.
FREQUENT = Recipe("select", 3, 3.0, combine="argmin", antithetic=False)
KEPT = 0.1
NUM_WORKERS, NUM_CANDIDATES, SLOWER = 16, 256, (1, 2, 4, 8)


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


def compressed(problem: Problem, seeds: int, quick: bool) -> Item:
    """5: gradients in fewer bytes, and the weights from a log of messages."""
    codes = {"float32": None, "int8": int8()} | ({} if quick else {f"top {KEPT:.0%}": top_k(KEPT)})
    recipes = {name: FREQUENT._replace(compressor=code) for name, code in codes.items()}
    curves = training.train_all(problem, NUM_STEPS, recipes, seeds)
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
