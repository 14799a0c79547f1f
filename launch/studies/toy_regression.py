"""The two-dimensional learning-rate problem of the PES paper: paths on the meta-loss surface.

python -m launch.reproduce toy_regression --workdir=DIR
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from launch.studies.base import Claim, Result, Study
from launch.studies.descent import descend
from meta_train import estimators as est
from meta_train.unroll import UnrolledSystem, unroll
from tasks.dynamics.toy_regression import HORIZON, THETA_INIT, toy_regression

TRUNCATION = 10
NUM_PAIRS = 50
SIGMA, WIDE_SIGMA = 0.3, 1.0
RECORDS = 100
LIMITS = (-8.0, 8.0)

STYLES = {
    "PES": ("#0072B2", "-"),
    "NRES": ("#009E73", "--"),
    "truncated ES, sigma=1": ("#E69F00", "-"),
    "truncated ES, sigma=0.3": ("#D55E00", "-"),
    "TBPTT": ("white", ":"),
}


def total_loss(theta: jax.Array) -> jax.Array:
    """The summed loss of an episode; it is deterministic."""
    system = UnrolledSystem(*toy_regression())
    key = jax.random.key(0)
    return jnp.sum(unroll(system, theta, system.init(theta, key), key, HORIZON)[1])


def methods() -> dict[str, est.GradientEstimator]:
    system = UnrolledSystem(*toy_regression())
    shared: dict[str, Any] = {"truncation": TRUNCATION, "horizons": est.fixed_horizon(HORIZON)}
    es: dict[str, Any] = {"num_pairs": NUM_PAIRS, **shared}
    return {
        "PES": est.pes(system, sigma=SIGMA, **es),
        "NRES": est.nres(system, sigma=SIGMA, **es),
        "truncated ES, sigma=1": est.truncated_es(system, sigma=WIDE_SIGMA, **es),
        "truncated ES, sigma=0.3": est.truncated_es(system, sigma=SIGMA, **es),
        "TBPTT": est.tbptt(system, num_particles=10, **shared),
    }


def run(quick: bool, data_dir: str | None) -> Result:
    del data_dir
    num_steps = 1500 if quick else 20_000
    thetas = {}
    for name, estimator in methods().items():
        steps, thetas[name] = descend(
            name,
            estimator,
            jnp.asarray(THETA_INIT),
            optax.adam(1e-2, b1=0.99, b2=0.999),
            num_steps=num_steps,
            num_records=RECORDS,
            num_seeds=2 if quick else 5,
        )
    losses = {
        name: np.asarray(jax.jit(jax.vmap(jax.vmap(total_loss)))(theta))
        for name, theta in thetas.items()
    }
    ticks = np.linspace(*LIMITS, 161 if quick else 401)
    grid = jnp.stack(jnp.meshgrid(ticks, ticks), axis=-1)
    surface = np.asarray(jax.jit(jax.vmap(jax.vmap(total_loss)))(grid))
    row, column = np.unravel_index(np.nanargmin(surface), surface.shape)
    optimum = (float(ticks[column]), float(ticks[row]))
    table = [
        {
            "estimator": name,
            "theta_0": float(np.median(thetas[name][:, -1, 0])),
            "theta_1": float(np.median(thetas[name][:, -1, 1])),
            "final loss": float(np.median(loss[:, -1])),
            "worst": float(loss[:, -1].max()),
            "best": float(loss[:, -1].min()),
        }
        for name, loss in losses.items()
    ]
    return Result(
        claims=claims(losses, float(np.nanmin(surface))),
        table=table,
        figure=draw(ticks, surface, optimum, steps, thetas, losses),
        data={
            "steps": steps.tolist(),
            "theta": {name: theta.tolist() for name, theta in thetas.items()},
            "loss": {name: loss.tolist() for name, loss in losses.items()},
            "optimum": optimum,
            "optimum_loss": float(np.nanmin(surface)),
        },
        caption=f"two-dimensional regression, T = {HORIZON}, K = {TRUNCATION}, {NUM_PAIRS} pairs; "
        f"line: median, band: range of {len(losses['PES'])} seeds",
    )


def claims(losses: dict, best: float) -> list[Claim]:
    last = {name: loss[:, -1] for name, loss in losses.items()}
    start = float(losses["PES"][0, 0])
    unbiased = max(last["PES"].max(), last["NRES"].max())
    narrow = min(last["TBPTT"].min(), last["truncated ES, sigma=0.3"].min())
    wide = last["truncated ES, sigma=1"]
    return [
        Claim(
            "PES and NRES reach the basin of the global optimum.",
            bool(unbiased <= 600),
            f"worst final loss {unbiased:.0f}; from {start:.0f}; grid minimum {best:.0f}",
        ),
        Claim(
            "TBPTT and truncated ES of the same sigma stop in front of the ridge, barely better.",
            bool(narrow > 2000),
            f"best final loss {narrow:.0f}; start {start:.0f}",
        ),
        Claim(
            "Truncated ES with a wider sigma moves, and stops at a short-horizon solution.",
            bool(wide.min() > 1000),
            f"final losses {wide.min():.0f} to {wide.max():.0f}",
        ),
    ]


def draw(ticks, surface, optimum, steps, thetas, losses) -> Figure:
    figure = Figure(figsize=(9.5, 3.9), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1.15, 1))
    mesh = left.pcolormesh(
        ticks,
        ticks,
        surface,
        norm=LogNorm(vmax=2e4),
        cmap="magma",
        shading="nearest",
        rasterized=True,
    )
    figure.colorbar(mesh, ax=left, label="summed loss of an episode", extend="max")
    for name, (color, style) in STYLES.items():
        path = thetas[name][0]
        left.plot(path[:, 0], path[:, 1], color=color, linestyle=style, linewidth=1.8)
        left.plot(*path[-1], "o", color=color, markersize=5, markeredgecolor="black")
        shown = "dimgray" if color == "white" else color
        runs = losses[name]
        right.fill_between(
            steps, runs.min(axis=0), runs.max(axis=0), color=shown, alpha=0.2, linewidth=0
        )
        right.plot(
            steps, np.median(runs, axis=0), color=shown, linestyle=style, linewidth=1.8, label=name
        )
    left.plot(*THETA_INIT, "s", color="white", markeredgecolor="black", markersize=6)
    left.plot(*optimum, "*", color="#F0E442", markeredgecolor="black", markersize=13, clip_on=False)
    left.annotate("start", THETA_INIT, (6, -12), textcoords="offset points", color="white")
    left.annotate("grid optimum", optimum, (-8, 10), textcoords="offset points", color="white")
    left.set_xlabel(r"$\theta_0$: log of the first learning rate")
    left.set_ylabel(r"$\theta_1$: log of the last learning rate")
    left.set_xlim(LIMITS)
    left.set_ylim(LIMITS)
    right.axhline(np.nanmin(surface), color="black", linewidth=0.8, linestyle="--")
    right.annotate(
        "optimum",
        (steps[-1], np.nanmin(surface)),
        (-4, 4),
        textcoords="offset points",
        ha="right",
        fontsize=8,
    )
    right.set_yscale("log")
    right.set_xlabel("outer steps")
    right.set_ylabel("summed loss of an episode")
    right.grid(alpha=0.25, linewidth=0.5, which="both")
    right.legend(fontsize=8, frameon=False, loc="lower left", bbox_to_anchor=(0, 0.12))
    right.spines[["top", "right"]].set_visible(False)
    return figure


STUDY = Study(
    "paths of PES, NRES, truncated ES and TBPTT on a 2-D meta-loss surface (Vicol 2021, 5.2)",
    3.0,
    run,
)
