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
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from launch.studies.base import Claim, Result, Study
from launch.studies.shared import cost, plots
from meta_train import estimators as est
from meta_train.progress import progress
from meta_train.unroll import UnrolledSystem, unroll

T, K = 12, 3
WORKERS = 4
GROUP = 8  # Pairs of reparam+ES that share weights; their variance has heavy tails with few.
STATE_SIZE, THETA_SIZE = 4, 3
SIGMA, TINY_SIGMA = 0.3, 1e-3
NO_NOISE = 1e-10  # Relative variances below it are rounding, and the variance floor of Reparam+ES.
Z = 5.0
COST_SIZES = {"K": (16, 32), "T": (32, 64), "S": (64, 128), "P": (8, 16), "N": (8, 16)}
COST_BASE = {"K": 4, "T": 32, "S": 64, "P": 8, "N": 8}
COST_WITH = {"K": {"T": 64}}  # A truncation as long as the episode compiles to another program.


class TableRow(NamedTuple):
    """An estimator, and what the table says of it.

    Attributes:
      build: ``(system, N, T, K, sigma) -> estimator``.
      unbiased, differentiates, smooths: what it should be found to be.
      compute, memory: the paper's (F, B: a forward and a backward step), but for RTRL and UORO:
        the paper forms the Jacobian of a step (``P S^2 + S (F + B)`` and ``S P + S^2``; ``S^2``
        more for UORO), here it is only multiplied with.
      flops, bytes: the exponents of the symbols in them; an absent symbol has exponent 0.
      final: whether it estimates the gradient of the last loss, instead of the mean one.
    """

    build: Callable
    unbiased: bool
    differentiates: bool
    smooths: bool
    compute: str
    memory: str
    flops: dict[str, int]
    bytes: dict[str, int]
    final: bool = False


def _build(make, count="num_particles", online=True, perturbs=False, **extra):
    """``build`` of an estimator that runs truncations, or else whole episodes."""

    def build(system, num, horizon, truncation, sigma):
        kwargs = {count: num, "horizons": est.fixed_horizon(horizon), **extra}
        kwargs |= {"truncation": truncation} if online else {}
        return make(system, **kwargs, **({"sigma": sigma} if perturbs else {}))

    return build


def _gpes(system, num, horizon, truncation, sigma):
    build = _online_es(est.gpes, noise_period=2 * truncation)
    return build(system, num, horizon, truncation, sigma)


def _grouped(system, num, horizon, truncation, sigma):
    build = whole(est.reparam_es, pairs_per_particle=GROUP, perturbs=True)
    return build(system, num // GROUP, horizon, truncation, sigma)


def _telescoped(system, num, horizon, truncation, sigma):
    last = est.telescoped(system, est.fixed_horizon(horizon))
    return _online_es(est.pes)(last, num, horizon, truncation, sigma)


_online = _build
whole = partial(_build, online=False)
_online_es = partial(_build, count="num_pairs", perturbs=True)
_full_es = partial(_online_es, online=False)
_STEP = {"S": 2, "N": 1}

ROWS = {
    "BPTT": TableRow(whole(est.bptt), True, True, False, "T(F+B)", "TS",
                {"T": 1, **_STEP}, {"T": 1, "S": 1, "N": 1}),
    "TBPTT": TableRow(_online(est.tbptt), False, True, False, "K(F+B)", "KS",
                 {"K": 1, **_STEP}, {"K": 1, "S": 1, "N": 1}),
    "ARTBP": TableRow(whole(est.artbp, mean_truncation=4.0), True, True, False,
                 "T(F+B); K(F+B) if dynamic", "TS; KS if dynamic",
                 {"T": 1, **_STEP}, {"T": 1, "S": 1, "N": 1}),
    "RTRL": TableRow(_online(est.rtrl), True, True, False, "K P F", "SP",
                {"K": 1, "P": 1, **_STEP}, {"S": 1, "P": 1, "N": 1}),
    "UORO": TableRow(_online(est.uoro), True, True, False, "K(F+B)", "S+P",
                {"K": 1, **_STEP}, {"S": 1, "N": 1}),
    "forward gradient": TableRow(_online(est.forward_gradient), True, True, False, "K F", "S+P",
                            {"K": 1, **_STEP}, {"S": 1, "N": 1}),
    "Reparam": TableRow(_full_es(est.reparam), True, True, True, "N T(F+B)", "N TS",
                   {"T": 1, **_STEP}, {"T": 1, "S": 1, "N": 1}),
    "Reparam+ES": TableRow(_grouped, True, True, True, "N T(F+B)", "N TS",
                      {"T": 1, **_STEP}, {"T": 1, "S": 1, "N": 1}),
    "ES": TableRow(_full_es(est.full_es), True, False, True, "N T F", "N S",
              {"T": 1, **_STEP}, {"S": 1, "N": 1}),
    "truncated ES": TableRow(_online_es(est.truncated_es), False, False, True, "N K F", "N S",
                        {"K": 1, **_STEP}, {"S": 1, "N": 1}),
    "PES": TableRow(_online_es(est.pes), True, False, True, "N K F", "N(S+P)",
               {"K": 1, **_STEP}, {"S": 1, "N": 1}),
    "PES+Analytic": TableRow(_online_es(est.pes_analytic), True, True, True, "N K(F+B)", "N(KS+P)",
                        {"K": 1, **_STEP}, {"K": 1, "S": 1, "N": 1}),
    "telescoped PES": TableRow(_telescoped, True, False, True, "N K F", "N(S+P)",
                          {"K": 1, **_STEP}, {"S": 1, "N": 1}, final=True),
    "GPES": TableRow(_gpes, True, False, True, "N K F", "N(S+P)",
                {"K": 1, **_STEP}, {"S": 1, "N": 1}),
    "NRES": TableRow(_online_es(est.nres), True, False, True, "N K F", "N(S+P)",
                {"K": 1, **_STEP}, {"S": 1, "N": 1}),
    "guided ES": TableRow(_online_es(est.guided_es, num_surrogates=1), False, True, True,
                     "N T(F+B)", "N(TS+P)", {"T": 1, **_STEP}, {"T": 1, "S": 1, "N": 1}),
}  # fmt: skip


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
        state = estimator.init(theta, key_init)
        num_steps = 1
        if hasattr(state, "position"):
            state, num_steps = est.synchronized(state), T // K

        def body(state, key):
            grad, state, _ = estimator.estimate(theta, state, key)
            return state, grad

        @jax.vmap
        def worker(state):
            if hasattr(state, "surrogates"):  # There are none before the first episode.
                state, _ = body(state, key_init)
            grads = jax.lax.scan(body, state, jax.random.split(key_steps, num_steps))[1]
            return jnp.mean(grads, axis=0)

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


def cost_exponents(row: TableRow, symbols=tuple(COST_SIZES)) -> dict[str, tuple[float, float]]:
    """Of each symbol, the exponents of the operations and of the bytes of an outer step."""

    @cache
    def at(sizes):
        size = dict(sizes)
        system = cost.dense_system(size["S"])
        estimator = row.build(system, size["N"], size["T"], size["K"], SIGMA)
        return cost.measure(estimator, jnp.zeros(size["P"]))

    found = {}
    for symbol in symbols:
        base = COST_BASE | COST_WITH.get(symbol, {})
        costs = [at(tuple((base | {symbol: size}).items())) for size in COST_SIZES[symbol]]
        found[symbol] = (
            cost.exponent(COST_SIZES[symbol], [c.flops for c in costs]),
            cost.exponent(COST_SIZES[symbol], [c.bytes for c in costs]),
        )
    return found


def run(quick: bool, data_dir: str | None) -> Result:
    del data_dir
    num, replicates = (64, 200) if quick else (384, 500)  # Multiples of WORKERS * GROUP.
    rows, exponents = [], {}
    for name, row in progress(ROWS.items(), desc="table1"):
        with jax.enable_x64(True):
            system, theta = linear_system()
            gradient = exact_gradient(system, theta, row.final)
            scale = float(np.linalg.norm(gradient))
            workers = sampler(row, system, theta, num, replicates)(SIGMA)
            found = workers.mean(axis=1)
            one, all_of_them = (x.var(axis=0).sum() / scale**2 for x in (workers[:, 0], found))
            quartic = sampler(row, quartic_system(), jnp.array([0.3]), num, replicates)
            smoothing = (quartic(SIGMA) - quartic(TINY_SIGMA)).mean(axis=1)
            rows.append({
                "estimator": name,
                "bias": float(np.linalg.norm(found.mean(axis=0) - gradient)) / scale,
                "+-": float(np.sqrt(found.var(axis=0).sum() / replicates)) / scale,
                "unbiased": not differs(found, gradient, scale),
                "variance": float(all_of_them) * num,
                "parallel": float(one / all_of_them) if one > NO_NOISE else "-",
                "smoothed": differs(smoothing, np.zeros(()), 1.0),
                "any loss": accepts_any_loss(row, system, theta),
                "compute": row.compute,
                "memory": row.memory,
            })  # fmt: skip
        if not quick:
            exponents[name] = cost_exponents(row)
            for symbol, (flops, held) in exponents[name].items():
                rows[-1][symbol] = (
                    f"{flops:.2f}/{row.flops.get(symbol, 0)} {held:.2f}/{row.bytes.get(symbol, 0)}"
                )
    return Result(
        claims=claims(rows, exponents),
        table=rows,
        figure=draw(rows),
        data={"rows": rows, "exponents": exponents},
        caption=f"linear system, {STATE_SIZE} states, {THETA_SIZE} parameters, T = {T}, K = {K}; "
        f"{num} particles, {replicates} replicates of one seed; bars: measured bias and "
        "variance, lines: 2 standard errors; blue: unbiased, vermilion: biased",
    )


def claims(rows: list[dict], exponents: dict) -> list[Claim]:
    def agree(column: str, expected: Callable[[TableRow], bool]) -> tuple[bool, str]:
        wrong = [r["estimator"] for r in rows if r[column] != expected(ROWS[r["estimator"]])]
        return not wrong, f"{len(rows) - len(wrong)} of {len(rows)} estimators as expected" + (
            f"; not {', '.join(wrong)}" if wrong else ""
        )

    found = [
        Claim(
            "Only TBPTT and truncated ES, blind across truncations, and guided ES are biased.",
            *agree("unbiased", lambda r: r.unbiased),
        ),
        Claim(
            "Those that perturb theta estimate the gradient of a smoothed loss, the rest do not.",
            *agree("smoothed", lambda r: r.smooths),
        ),
        Claim(
            "ES, truncated ES, PES, GPES and NRES need no derivative of the loss, the rest do.",
            *agree("any loss", lambda r: not r.differentiates),
        ),
        parallel_claim({r["estimator"]: r["parallel"] for r in rows}),
    ]
    if exponents:
        worst = max(
            (abs(measured - expected.get(symbol, 0)), f"{name}, {what} in {symbol}: {measured:.2f}")
            for name, symbols in exponents.items()
            for symbol, pair in symbols.items()
            for what, measured, expected in (
                ("compute", pair[0], ROWS[name].flops),
                ("memory", pair[1], ROWS[name].bytes),
            )
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


def parallel_claim(ratios: dict[str, float | str]) -> Claim:
    exact = [name for name, ratio in ratios.items() if isinstance(ratio, str)]
    drawn = {name: ratio for name, ratio in ratios.items() if not isinstance(ratio, str)}
    low, high = min(drawn, key=drawn.__getitem__), max(drawn, key=drawn.__getitem__)
    return Claim(
        "Workers that share only theta average out the noise of every estimator that has any.",
        all(abs(ratio / WORKERS - 1) < 0.3 for ratio in drawn.values()),
        f"variance of one over that of the mean of {WORKERS}: from {drawn[low]:.2f} ({low}) to "
        f"{drawn[high]:.2f} ({high}); no noise: {', '.join(exact)}",
    )


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
    )
    right.set(
        xscale="log",
        xlim=(floor, None),
        xlabel=r"variance of one particle, one episode $/\, \|\nabla F\|^2$",
    )
    for axes in (left, right):
        axes.grid(False, axis="y")
    return figure


STUDY = Study(
    "bias, variance, cost, smoothing of every estimator, measured (Vicol 2021, Table 1)", 4.0, run
)
