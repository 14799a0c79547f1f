"""Memory and time of hypergradients through 1,000 training steps, by every method side by side.

    python -m launch.benchmarks.reversible [--steps=1000] [--figure=FILE.png]

A 64-32-10 tanh network on the bundled digits, batch 32, momentum 0.9, float32. Every
method computes the same thing: the derivatives of the final loss with respect to all
initial weights, the initial velocity, the momentum and the 1,000 learning rates. The
methods take turns, and each keeps its best time: processor time, of all threads together,
which other programs on the machine hardly lengthen, and wall time, of which other programs
may lengthen even the best, but of all methods about alike. Both have a limit.
"""

import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging
from jax.flatten_util import ravel_pytree
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sklearn.datasets import load_digits

from launch.benchmarks.checkpointing import binomial_schedule, binomial_vjp, nested_scan
from launch.path_flags import define_path
from meta_train import reversible
from meta_train.reversible import SINGLE, Setup
from meta_train.reversible.arithmetic import plan_spills, snap

SIZES = (64, 32, 10)
BATCH = 32
MOMENTUM = 0.9
LEARNING_RATE = 0.1
MIB = 2.0**20

MEMORY_GATE = 200
TIME_GATE = 1.2  # of processor time, and of wall time
ERROR_GATE = 1e-4
# States stored by binomial checkpointing; one alone restarts from the first for every step.
SLOTS = (1, 2, 3, 4, 5, 6, 8, 10, 15, 20, 40, 100)
SECONDS_EACH = 5.0  # A method that has been timed for so long is timed no more.
TAPE_GATES = {1000: 1.6, 10_000: 1.1}

Hypergradient = Callable[[Setup], Setup]


def temporary_bytes(program: jax.stages.Compiled) -> int:
    """What the compiled program allocates besides its arguments and results."""
    analysis: Any = program.memory_analysis()
    return analysis.temp_size_in_bytes


class Measurement(NamedTuple):
    """One method at one number of steps.

    Attributes:
      method: its name.
      steps: training steps ``T``.
      milliseconds: best processor time of one hypergradient.
      wall_milliseconds: best wall time of one.
      temporary_mib: temporary memory of the compiled program.
      error: relative difference of its gradient from that of plain backpropagation; NaN
        where that was not run.
    """

    method: str
    steps: int
    milliseconds: float
    wall_milliseconds: float
    temporary_mib: float
    error: float


def first_setup(num_steps: int) -> Setup:
    """The initial weights and a flat schedule."""
    rng = np.random.default_rng(0)
    params = [
        {
            "w": jnp.asarray(rng.normal(0, fan_in**-0.5, (fan_in, fan_out)), jnp.float32),
            "b": jnp.zeros(fan_out),
        }
        for fan_in, fan_out in pairwise(SIZES)
    ]
    return reversible.setup(params, jnp.full(num_steps, LEARNING_RATE), MOMENTUM)


def losses() -> tuple[Callable, Callable]:
    """``loss(params, theta, step)`` on the step's batch, and ``objective(params, theta)``."""
    images, labels = load_digits(return_X_y=True)
    images = jnp.asarray(images / 16, jnp.float32)
    targets = jax.nn.one_hot(jnp.asarray(labels), 10)
    num_train = 1500

    def cross_entropy(params, x, y):
        hidden = jnp.tanh(x @ params[0]["w"] + params[0]["b"])
        logits = hidden @ params[1]["w"] + params[1]["b"]
        return -jnp.mean(jnp.sum(jax.nn.log_softmax(logits) * y, axis=1))

    def loss(params, theta, step):
        del theta
        index = (step * BATCH + jnp.arange(BATCH, dtype=jnp.int32)) % num_train
        return cross_entropy(params, images[index], targets[index])

    def objective(params, theta):
        del theta
        return cross_entropy(params, images[num_train:], targets[num_train:])

    return loss, objective


def by_reversal(num_steps: int) -> Hypergradient:
    """Walks the run back exactly."""
    loss, objective = losses()

    def gradient(start):
        return reversible.hypergradients(
            loss, objective, start, num_steps=num_steps, momentum_floor=MOMENTUM - 1e-3
        )[1]

    return gradient


def by_backpropagation(num_steps: int, recompute: bool = False) -> Hypergradient:
    """Backpropagation through a scan, which stores every step or only every state."""
    step, final = _float_steps()

    def gradient(start):
        def value(start):
            body = jax.checkpoint(step) if recompute else step

            def scanned(state, xs):
                return body((start.learning_rates, start.momenta), state, *xs), None

            xs = jnp.arange(num_steps, dtype=jnp.int32), start.learning_rates
            return final(jax.lax.scan(scanned, (start.params, start.velocity), xs)[0])

        return jax.grad(value)(start)

    return gradient


def by_nested_recomputation(lengths: tuple[int, ...]) -> Hypergradient:
    """Backpropagation through nested scans, recomputed level by level."""
    step, final = _float_steps()

    def gradient(start):
        def value(start):
            hypers = start.learning_rates, start.momenta

            def at(state, t):
                return step(hypers, state, t, start.learning_rates[t])

            return final(nested_scan(at, (start.params, start.velocity), lengths))

        return jax.grad(value)(start)

    return gradient


def by_binomial_checkpointing(num_steps: int, num_slots: int) -> Hypergradient:
    """Backpropagation with an optimal choice of ``num_slots`` stored states."""
    step, final = _float_steps()
    schedule = binomial_schedule(num_steps, num_slots)

    def gradient(start):
        def at(hypers, state, t):
            return step(hypers, state, t, hypers[0][t])

        (rates, momenta), (params, velocity) = binomial_vjp(
            at,
            (start.learning_rates, start.momenta),
            (start.params, start.velocity),
            schedule,
            final,
        )
        return Setup(params, rates, momenta, velocity)

    return gradient


def _float_steps():
    loss, objective = losses()

    def step(hypers, state, t, rate):
        params, velocity = state
        momentum = snap(hypers[1], SINGLE.decay_bits)
        grads = jax.grad(loss)(params, (), t)
        velocity = jax.tree.map(lambda v, g: momentum * v - (1 - momentum) * g, velocity, grads)
        return jax.tree.map(lambda w, v: w + rate * v, params, velocity), velocity

    return step, lambda state: objective(state[0], ())


def methods(num_steps: int) -> dict[str, Hypergradient]:
    """The four of the comparison."""
    root = max(d for d in range(1, math.isqrt(num_steps) + 1) if num_steps % d == 0)
    return {
        "backpropagation": by_backpropagation(num_steps),
        "every step recomputed": by_backpropagation(num_steps, recompute=True),
        "two nested loops": by_nested_recomputation((num_steps // root, root)),
        "reversible": by_reversal(num_steps),
    }


def frontier(num_steps: int, slots: tuple[int, ...] = SLOTS) -> dict[str, Hypergradient]:
    """Binomial checkpointing from the least memory to little time."""
    return {f"binomial, {num} states": by_binomial_checkpointing(num_steps, num) for num in slots}


def measure(
    candidates: dict[str, Hypergradient], num_steps: int, repeats: int = 20
) -> list[Measurement]:
    """Compiles all, then times them in turn; gradients are compared with the first one's."""
    start = first_setup(num_steps)
    with ThreadPoolExecutor() as pool:  # Before anything is timed.
        compiled = pool.map(lambda fn: jax.jit(fn).lower(start).compile(), candidates.values())
        programs = dict(zip(candidates, compiled, strict=True))
    flat = {name: ravel_pytree(program(start))[0] for name, program in programs.items()}
    best = {name: np.full(2, math.inf) for name in programs}
    spent = dict.fromkeys(programs, 0.0)

    def clock():
        return np.array([time.process_time(), time.perf_counter()])

    for _ in range(repeats):
        for name, program in programs.items():
            if spent[name] < SECONDS_EACH:
                begin = clock()
                jax.block_until_ready(program(start))
                taken = clock() - begin
                best[name] = np.minimum(best[name], taken)
                spent[name] += float(taken[1])
    reference = next(iter(flat.values()))
    return [
        Measurement(
            name,
            num_steps,
            1e3 * float(best[name][0]),
            1e3 * float(best[name][1]),
            temporary_bytes(program) / MIB,
            float(jnp.linalg.norm(flat[name] - reference) / jnp.linalg.norm(reference)),
        )
        for name, program in programs.items()
    ]


def num_parameters() -> int:
    """Weights and biases of the network."""
    return sum((fan_in + 1) * fan_out for fan_in, fan_out in pairwise(SIZES))


def tape(num_steps: int) -> dict[str, Any]:
    """Bits per parameter of tape and buffer, against ``T log2(1 / momentum)``."""
    numerator = round(MOMENTUM * 2**SINGLE.decay_bits)
    plan = plan_spills(np.full((num_steps, 1), numerator), SINGLE.decay_bits)
    bound = num_steps * math.log2(1 / MOMENTUM)
    return {
        "steps": num_steps,
        "bits": plan.tape_bits,
        "bound": bound,
        "ratio": plan.tape_bits / bound,
    }


def gates(rows: list[Measurement]) -> list[dict[str, Any]]:
    """What is asked of exact reversal, with what was measured; ``rows`` are of 1,000 steps."""
    ours = next(row for row in rows if row.method == "reversible")
    plain = next(row for row in rows if row.method == "backpropagation")
    better = [
        row
        for row in rows
        if row.method.startswith("binomial")
        and row.temporary_mib <= ours.temporary_mib
        and row.milliseconds <= ours.milliseconds
    ]
    slower = {
        field: getattr(ours, field) / min(getattr(row, field) for row in rows)
        for field in ("milliseconds", "wall_milliseconds")
    }
    values = (
        (
            "temporary memory of backpropagation over ours, at least",
            plain.temporary_mib / ours.temporary_mib,
            MEMORY_GATE,
        ),
        ("our processor time over the least, at most", slower["milliseconds"], TIME_GATE),
        ("our wall time over the least, at most", slower["wall_milliseconds"], TIME_GATE),
        ("checkpointings no larger and no slower than ours, at most", len(better), 0),
        ("relative error against backpropagation, at most", ours.error, ERROR_GATE),
        *(
            (f"tape over its bound at T={steps}, at most", tape(steps)["ratio"], most)
            for steps, most in TAPE_GATES.items()
        ),
    )
    return [
        {
            "gate": gate,
            "value": float(f"{value:.4g}"),
            "limit": limit,
            "holds": bool(value >= limit if gate.endswith("least") else value <= limit),
        }
        for gate, value, limit in values
    ]


def lines() -> list[dict[str, Any]]:
    """The case of ``launch.benchmark``: every method at 1,000 steps, then every gate."""
    measured = measure(methods(1000) | frontier(1000), 1000, repeats=30)
    return [row._asdict() for row in measured] + gates(measured)


def draw_frontier(axes: Axes, rows: list[Measurement]) -> None:
    """Memory against time, log-log; the checkpointing frontier as a line."""
    line = [row for row in rows if row.method.startswith("binomial")]
    axes.plot(
        [row.temporary_mib for row in line],
        [row.milliseconds for row in line],
        "o-",
        color="0.45",
        ms=4,
        label="binomial checkpointing (states)",
    )
    for row in line:
        axes.annotate(
            row.method.split()[1],
            (row.temporary_mib, row.milliseconds),
            textcoords="offset points",
            xytext=(4, 4),
            fontsize=7,
            color="0.35",
        )
    for row, (colour, marker) in zip(
        (row for row in rows if row not in line),
        (("C0", "o"), ("C1", "s"), ("C2", "D"), ("C3", "*")),
        strict=True,
    ):
        axes.plot(
            row.temporary_mib,
            row.milliseconds,
            marker,
            color=colour,
            ms=14 if marker == "*" else 7,
            label=row.method,
        )
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="temporary memory (MiB)",
        ylabel="processor time of one hypergradient (ms)",
    )
    axes.legend(fontsize=8, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)


def main(argv: list[str]) -> None:
    del argv
    logging.set_verbosity(logging.WARNING)
    num_steps = flags.FLAGS.steps
    rows = measure(methods(num_steps) | frontier(num_steps), num_steps)
    for row in rows:
        print(
            f"{row.method:24} {row.milliseconds:9.1f} ms (wall {row.wall_milliseconds:9.1f}) "
            f"{row.temporary_mib:9.3f} MiB"
            f"   relative error {row.error:.1e}"
        )
    for steps in (100, 1000, 10_000):
        print(
            "T={steps}: tape {bits} bits a parameter, bound {bound:.0f}, ratio {ratio:.2f}".format(
                **tape(steps)
            )
        )
    if flags.FLAGS.figure:
        figure = Figure(figsize=(5.2, 3.8))
        draw_frontier(figure.add_subplot(), rows)
        figure.savefig(flags.FLAGS.figure, dpi=200, bbox_inches="tight")


if __name__ == "__main__":
    flags.DEFINE_integer("steps", 1000, "Training steps.")
    define_path("figure", "Where to save the frontier of memory against time.")
    app.run(main)
