"""Table 1 of the PES paper, measured: what each estimator costs and what it estimates.

    python -m launch.reproduce table1 --workdir=DIR

Its columns, and how each is found here:

- bias, variance: of the mean estimate over an episode, relative to the exact gradient.
- parallel: the variance of one worker over that of the mean of four, each with a quarter of
  the particles and nothing shared but theta: 4 where particles help in parallel, ``-`` where
  one particle is exact (or blind) already.
- smoothed: whether the mean depends on sigma where the loss is not quadratic.
- any loss: whether a loss with no derivative is accepted.
- K, T, S, P, N (full runs): for each symbol ``compute/published memory/published``, the
  exponents fitted to what the compiler counts for one outer step.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from launch.studies.base import Claim, Result, Study
from launch.studies.pes.table1_rows import GROUP, ROWS, TableRow
from launch.studies.shared import cost, episodes, plots
from launch.studies.shared.compare import in_parallel
from meta_train.progress import progress
from meta_train.unroll import UnrolledSystem, unroll

T, K = 12, 3
WORKERS = 4
STATE_SIZE, THETA_SIZE = 4, 3
SIGMA, TINY_SIGMA = 0.3, 1e-3
NO_NOISE = 1e-10  # Relative variances below it are rounding, and the variance floor of Reparam+ES.
Z = 5.0
COST_SIZES = {"K": (16, 32), "T": (32, 64), "S": (64, 128), "P": (8, 16), "N": (8, 16)}
COST_BASE = {"K": 4, "T": 32, "S": 64, "P": 8, "N": 8}
COST_WITH = {"K": {"T": 64}}  # A truncation as long as the episode compiles to another program.


def linear_system() -> tuple[UnrolledSystem, jax.Array]:
    """``s <- A s + B theta`` with a squared loss: quadratic, so smoothing does not bias."""
    rng = np.random.default_rng(0)
    a = rng.normal(size=(STATE_SIZE, STATE_SIZE))
    a *= 0.9 / np.abs(np.linalg.eigvals(a)).max()
    b = rng.normal(size=(STATE_SIZE, THETA_SIZE)) / THETA_SIZE**0.5
    target, start = rng.normal(size=(2, STATE_SIZE))

    def step(theta, state, key):
        del key
        state = a @ state + b @ theta
        return state, jnp.sum((state - target) ** 2) / 2

    theta = jnp.asarray(rng.normal(size=THETA_SIZE))
    return UnrolledSystem(lambda theta, key, horizon: jnp.asarray(start), step), theta


def quartic_system() -> UnrolledSystem:
    """``s <- s + theta`` with the loss ``s^4``: smoothing adds to its gradient."""

    def step(theta, state, key):
        del key
        state = state + theta
        return state, jnp.sum(state**4)

    return UnrolledSystem(lambda theta, key, horizon: jnp.zeros_like(theta), step)


def sampler(row: TableRow, system, theta, num: int, replicates: int):
    """``sigma -> estimates [replicates, WORKERS, P]``: independent, theta held.

    Each worker has its share of the ``num`` particles and runs one episode.
    """

    def one(sigma, key):
        estimator = row.build(system, num, T, K, sigma)
        key_init, key_steps = jax.random.split(key)
        state, windows = episodes.start(estimator, theta, key_init, T // K)
        keys = jax.random.split(key_steps, windows)

        @jax.vmap
        def worker(state):
            if hasattr(state, "surrogates"):  # There are none before the first episode.
                _, state, _ = estimator.estimate(theta, state, key_init)
            return jnp.mean(episodes.estimates(estimator, theta, state, keys)[1], axis=0)

        return worker(jax.tree.map(lambda x: x.reshape(WORKERS, -1, *x.shape[1:]), state))

    keys = jax.random.split(jax.random.key(0), replicates)
    quickly_compiled = {"xla_backend_optimization_level": 0}
    sample = jax.jit(jax.vmap(one, in_axes=(None, 0)), compiler_options=quickly_compiled)
    return lambda sigma: np.asarray(sample(sigma, keys))


def exact_gradient(system, theta, final: bool) -> np.ndarray:
    """Of the last or mean loss of an episode of a system without randomness."""
    key = jax.random.key(0)

    def loss(theta):
        losses = unroll(system, theta, system.init(theta, key, T), key, T)[1]
        return losses[-1] if final else jnp.mean(losses)

    return np.asarray(jax.grad(loss)(theta))


def differs(estimates: np.ndarray, other: np.ndarray, scale: float) -> bool:
    """Whether the mean is more than ``Z`` standard errors (and rounding) from ``other``."""
    error = estimates.std(axis=0) / len(estimates) ** 0.5
    gap = np.abs(estimates.mean(axis=0) - other)
    return bool(np.any(gap > Z * error + 1e-6 * scale))


def accepts_any_loss(row: TableRow, system, theta) -> bool:
    """Whether the estimator takes a loss whose derivative is zero."""

    def rounded(theta, state, key):
        state, loss = system.step(theta, state, key)
        return state, jnp.round(loss)

    estimator = row.build(UnrolledSystem(system.init, rounded), GROUP, T, K, SIGMA)
    try:
        estimator.init(theta, jax.random.key(0))
    except ValueError:
        return False
    return True


def cost_exponents(row: TableRow) -> dict[str, list[tuple[float, int]]]:
    """Of each symbol, the exponents of the operations and of the bytes of an outer step.

    Each as measured and as expected.
    """

    @cache
    def at(sizes):
        size = dict(sizes)
        system = cost.dense_system(size["S"])
        estimator = row.build(system, size["N"], size["T"], size["K"], SIGMA)
        return cost.measure(estimator, jnp.zeros(size["P"]))

    found = {}
    for symbol, sizes in COST_SIZES.items():
        base = COST_BASE | COST_WITH.get(symbol, {})
        costs = [at(tuple((base | {symbol: size}).items())) for size in sizes]
        found[symbol] = [
            (cost.exponent(sizes, list(measured)), expected.get(symbol, 0))
            for *measured, expected in zip(*costs, (row.flops, row.bytes), strict=True)
        ]
    return found


def run(quick: bool, data_dir: str | None) -> Result:
    del data_dir
    num, replicates = (64, 200) if quick else (384, 500)  # Multiples of WORKERS * GROUP.
    with jax.enable_x64(True):
        measure = {name: partial(statistics, row, num, replicates) for name, row in ROWS.items()}
        rows = [{"estimator": name} | found for name, found in in_parallel(measure).items()]
    exponents = {}
    for row in progress([] if quick else rows, desc="costs"):
        exponents[row["estimator"]] = found = cost_exponents(ROWS[row["estimator"]])
        for symbol, pairs in found.items():
            row[symbol] = " ".join(f"{measured:.2f}/{wanted}" for measured, wanted in pairs)
    return Result(
        claims(rows, exponents),
        rows,
        draw(rows),
        {"rows": rows, "exponents": exponents},
        f"linear system, {STATE_SIZE} states, {THETA_SIZE} parameters, T = {T}, K = {K}; "
        f"{num} particles, {replicates} replicates of one seed; bars: measured bias and "
        "variance, lines: 2 standard errors; blue: unbiased, vermilion: biased",
    )


def statistics(row: TableRow, num: int, replicates: int) -> dict[str, Any]:
    """What is measured of an estimator; in double precision."""
    system, theta = linear_system()
    gradient = exact_gradient(system, theta, row.final)
    scale = float(np.linalg.norm(gradient))
    workers = sampler(row, system, theta, num, replicates)(SIGMA)
    found = workers.mean(axis=1)
    one, all_of_them = (x.var(axis=0).sum() / scale**2 for x in (workers[:, 0], found))
    quartic = sampler(row, quartic_system(), jnp.array([0.3]), num, replicates)
    smoothing = (quartic(SIGMA) - quartic(TINY_SIGMA)).mean(axis=1)
    return {
        "bias": float(np.linalg.norm(found.mean(axis=0) - gradient)) / scale,
        "+-": float(np.sqrt(found.var(axis=0).sum() / replicates)) / scale,
        "unbiased": not differs(found, gradient, scale),
        "variance": float(all_of_them) * num,
        "parallel": float(one / all_of_them) if one > NO_NOISE else "-",
        "smoothed": differs(smoothing, np.zeros(()), 1.0),
        "any loss": accepts_any_loss(row, system, theta),
        "compute": row.compute,
        "memory": row.memory,
    }


def claims(rows: list[dict], exponents: dict) -> list[Claim]:
    def agree(sentence: str, column: str, expected: Callable[[TableRow], bool]) -> Claim:
        wrong = [r["estimator"] for r in rows if r[column] != expected(ROWS[r["estimator"]])]
        said = f"{len(rows) - len(wrong)} of {len(rows)} estimators as expected"
        return Claim(sentence, not wrong, said + (f"; not {', '.join(wrong)}" if wrong else ""))

    exact = [r["estimator"] for r in rows if r["parallel"] == "-"]
    noisy = sorted((r["parallel"], r["estimator"]) for r in rows if r["parallel"] != "-")
    (low, of_low), *_, (high, of_high) = noisy
    found = [
        agree(
            "Only TBPTT and truncated ES, blind across truncations, and guided ES are biased.",
            "unbiased",
            lambda r: r.unbiased,
        ),
        agree(
            "Those that perturb theta estimate the gradient of a smoothed loss, the rest do not.",
            "smoothed",
            lambda r: r.smooths,
        ),
        agree(
            "ES, truncated ES, PES, GPES and NRES need no derivative of the loss, the rest do.",
            "any loss",
            lambda r: not r.differentiates,
        ),
        Claim(
            "Workers that share only theta average out the noise of every estimator that has any.",
            all(abs(ratio / WORKERS - 1) < 0.3 for ratio, _ in noisy),
            f"variance of one over that of the mean of {WORKERS}: from {low:.2f} ({of_low}) to "
            f"{high:.2f} ({of_high}); no noise: {', '.join(exact)}",
        ),
    ]
    if exponents:
        worst = max(
            (abs(measured - expected), f"{name}, {what} in {symbol}: {measured:.2f}")
            for name, symbols in exponents.items()
            for symbol, pairs in symbols.items()
            for what, (measured, expected) in zip(("compute", "memory"), pairs, strict=True)
        )
        found.append(
            Claim(
                "Compute and memory grow with K, T, S, P and N as the formulas say, where S "
                "dominates.",
                worst[0] < 0.4,
                f"exponent furthest from its integer: {worst[1]}",
            )
        )
    return found


def draw(rows: list[dict]) -> Figure:
    figure, (left, right) = plots.panels(2, (8.4, 4.6), sharey=True)
    places = np.arange(len(rows))[::-1]
    colors = [plots.BLUE if row["unbiased"] else plots.VERMILION for row in rows]
    bias, error = ([row[column] for row in rows] for column in ("bias", "+-"))
    left.barh(places, bias, color=colors, height=0.6)
    left.errorbar(bias, places, xerr=2 * np.array(error), fmt="none", ecolor="black", capsize=2)
    left.set_yticks(places, [row["estimator"] for row in rows])
    floor = 1e-4
    right.barh(places, [max(row["variance"], floor) for row in rows], color=colors, height=0.6)
    for place, row in zip(places, rows, strict=True):
        if row["variance"] < floor:
            right.annotate("0", (floor, place), (3, -3), textcoords="offset points", fontsize=8)
    left.set(
        xlim=(0, None),
        xlabel=r"bias $\|E g - \nabla F\|\, /\, \|\nabla F\|$   ($\pm$ 2 standard errors)",
        title="Blue: unbiased, vermilion: biased",
    )
    right.set(
        xscale="log",
        xlim=(floor, None),
        xlabel=r"variance of one particle, one episode $/\, \|\nabla F\|^2$",
        title="Noise",
    )
    for axes in (left, right):
        axes.grid(False, axis="y")
    return figure


STUDY = Study(
    "bias, variance, cost, smoothing of every estimator, measured (Vicol 2021, Table 1)", 4.0, run
)
