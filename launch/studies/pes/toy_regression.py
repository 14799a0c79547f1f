"""The two-dimensional learning-rate problem of the PES paper: paths on the meta-loss surface.

python -m launch.reproduce toy_regression --workdir=DIR
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from launch.studies.base import Claim, Result, Study
from launch.studies.shared import plots
from launch.studies.shared.compare import Descent, by_name, compare, descend, each, final
from meta_train import estimators as est
from meta_train.unroll import UnrolledSystem, unroll
from tasks.dynamics.toy_regression import HORIZON, THETA_INIT, toy_regression

SYSTEM = UnrolledSystem(*toy_regression())
TRUNCATION = 10
NUM_PAIRS = 50
SIGMA, WIDE_SIGMA = 0.3, 1.0
RECORDS = 100
LIMITS = (-8.0, 8.0)

STYLES = {
    "PES": "-",
    "NRES": "--",
    "truncated ES, sigma=1": "-",
    "truncated ES, sigma=0.3": "--",
    "TBPTT": ":",
}


def total_loss(theta: jax.Array) -> jax.Array:
    """The summed loss of an episode; it is deterministic."""
    key = jax.random.key(0)
    return jnp.sum(unroll(SYSTEM, theta, SYSTEM.init(theta, key, HORIZON), key, HORIZON)[1])


def methods() -> dict[str, est.GradientEstimator]:
    shared: dict[str, Any] = {"truncation": TRUNCATION, "horizons": est.fixed_horizon(HORIZON)}
    es: dict[str, Any] = {"num_pairs": NUM_PAIRS, **shared}
    return {
        "PES": est.pes(SYSTEM, sigma=SIGMA, **es),
        "NRES": est.nres(SYSTEM, sigma=SIGMA, **es),
        "truncated ES, sigma=1": est.truncated_es(SYSTEM, sigma=WIDE_SIGMA, **es),
        "truncated ES, sigma=0.3": est.truncated_es(SYSTEM, sigma=SIGMA, **es),
        "TBPTT": est.tbptt(SYSTEM, num_particles=10, **shared),
    }


def run(quick: bool, data_dir: str | None) -> Result:
    del data_dir
    sizes: dict[str, Any] = {
        "num_steps": 1500 if quick else 20_000,
        "num_records": RECORDS,
        "num_seeds": 2 if quick else 5,
    }
    adam = optax.adam(1e-2, b1=0.99, b2=0.999)
    found = compare(
        {
            name: partial(descend, name, estimator, jnp.asarray(THETA_INIT), adam, **sizes)
            for name, estimator in methods().items()
        },
        each(total_loss),
    )
    ticks = np.linspace(*LIMITS, 161 if quick else 401)
    surface = each(total_loss)({"": jnp.stack(jnp.meshgrid(ticks, ticks), axis=-1)})[""]
    row, column = np.unravel_index(np.nanargmin(surface), surface.shape)
    optimum = (float(ticks[column]), float(ticks[row]))
    best = float(np.nanmin(surface))
    table = [
        {
            "estimator": name,
            "theta_0": float(np.median(found[name].theta[:, -1, 0])),
            "theta_1": float(np.median(found[name].theta[:, -1, 1])),
            "final loss": float(np.median(last)),
            "worst": float(last.max()),
            "best": float(last.min()),
        }
        for name, last in final(found).items()
    ]
    curves = {field: by_name(found, field) for field in Descent._fields}
    data = curves | {"optimum": optimum, "optimum_loss": best}
    caption = (
        f"two-dimensional regression, T = {HORIZON}, K = {TRUNCATION}, {NUM_PAIRS} pairs; line: "
        f"median, band: range of {sizes['num_seeds']} seeds; paths: the first seed"
    )
    return Result(claims(found, best), table, draw(ticks, surface, optimum, found), data, caption)


def claims(found: dict[str, Descent], best: float) -> list[Claim]:
    last = final(found)
    start = float(found["PES"].loss[0, 0])
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


def draw(ticks, surface, optimum, found: dict[str, Descent]) -> Figure:
    figure, (left, right) = plots.panels(2, (9.5, 3.9), width_ratios=(1.15, 1))
    label = "summed loss of an episode"
    plots.surface(figure, left, ticks, ticks, surface, label, norm=LogNorm(vmax=2e4))
    for name, style in STYLES.items():
        color = plots.COLORS[name.split(",")[0]]
        plots.path(left, found[name].theta[0], color, style)
        plots.band(right, found[name].steps, found[name].loss, style, color=color, label=name)
    plots.start_and_optimum(left, THETA_INIT, optimum)
    left.annotate("start", THETA_INIT, (6, -12), textcoords="offset points", color="white")
    left.annotate("grid optimum", optimum, (-8, 10), textcoords="offset points", color="white")
    left.set_xlabel(r"$\theta_0$: log of the first learning rate")
    left.set_ylabel(r"$\theta_1$: log of the last learning rate")
    plots.level(right, np.nanmin(surface), "grid optimum")
    left.set_title("Paths of the first seed")
    right.set(yscale="log", xlabel="outer steps", ylabel=label, title="Meta-loss")
    right.legend(loc="center right", bbox_to_anchor=(1, 0.33))
    return figure


STUDY = Study(
    "paths of PES, NRES, truncated ES and TBPTT on a 2-D surface (Vicol 2021, 5.2)", 3.0, run
)
