"""The two-parameter learning-rate schedule of the PES paper, tuned by every kind of estimator.

python -m launch.reproduce lr_schedule --workdir=DIR

An MLP is trained for T = 5,000 steps of SGD with momentum 0.9 at the learning rate
``theta_0 / (1 + t / T)^theta_1``, both in logs, from the paper's start (0.003, 30), to the lowest
mean training loss on a fresh batch after each step; truncations of K = 10 and 100 steps,
sigma = 0.1, Adam. Smaller than the paper: bundled digits (``--data_dir``: MNIST) and two layers
of 16 units on batches of 16 instead of 100 on 100; 20 pairs (K = 100: 5, whole episodes: 1)
instead of 500; 400,000 inner steps a run instead of 50 million and more. Adam's rate is the
paper's 0.01 at K = 10, and 0.03 and 0.2 where the same inner steps buy fewer outer ones.
Losses above 1.5 ln 10 nats count as that: a diverged run would drown the rest of so few. Quick:
T = 500, K = 10 alone, at Adam 0.02, fewer inner steps.

Inner steps are forward steps of inner training, so truncated ES pays for the unperturbed run
too; the backward pass of TBPTT is not counted.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from launch.studies.base import Claim, Result, Study
from launch.studies.shared.compare import descend, held_out_losses, in_parallel
from launch.studies.shared.plots import band, log_ticks
from learned_opt import learnable_schedule
from meta_train import estimators as est
from meta_train.inner import inner_training
from meta_train.unroll import UnrolledSystem
from tasks import mlp_classifier
from tasks.data import load_images

START = (0.003, 30.0)
SIGMA = 0.1
CEILING = 1.5 * float(np.log(10))
HIDDEN, BATCH = (16, 16), 16
# The paper's grid: log10 of the first learning rate and of the decay.
RATES, DECAYS = (-3.0, -0.5), (-2.2, 2.2)
NEAR = 1.5

COLORS = {
    "PES": "#0072B2",
    "NRES": "#009E73",
    "full ES": "#CC79A7",
    "truncated ES": "#E69F00",
    "TBPTT": "#D55E00",
}


class Sizes(NamedTuple):
    horizon: int
    truncations: tuple[int, ...]
    inner_steps: int  # of one run
    seeds: int
    records: int
    grid: int  # points on a side
    rates: dict[int, float]  # of Adam, by truncation


FULL = Sizes(5000, (10, 100), 400_000, 3, 8, 11, {10: 0.01, 100: 0.03})
QUICK = Sizes(500, (10,), 128_000, 2, 8, 11, {10: 0.02})
PAIRS = {10: 20, 100: 5}
HELD_OUT = 2  # inner runs of an evaluation


class Method(NamedTuple):
    estimator: est.GradientEstimator
    cost: int  # forward inner steps of one outer step
    rate: float  # of Adam


def inner_system(data_dir: str | None, horizon: int) -> UnrolledSystem:
    """Inner training as a function of (log of the first rate, log of the decay)."""
    data = load_images("mnist" if data_dir else "digits", data_dir)
    optimizer = learnable_schedule(*START)
    system = inner_training(
        mlp_classifier(data, hidden_sizes=HIDDEN, batch_size=BATCH),
        optimizer,
        num_steps=horizon,
        meta_loss="fresh",
        loss_ceiling=CEILING,
    )
    named = UnrolledSystem(
        lambda theta, key: system.init(as_variables(theta), key),
        lambda theta, state, key: system.step(as_variables(theta), state, key),
    )
    return named


def as_variables(theta: jax.Array) -> dict:
    return {"params": {"log_learning_rate": theta[0], "log_decay": theta[1]}}


def methods(system: UnrolledSystem, sizes: Sizes) -> dict[str, Method]:
    """``"PES, K=10"`` and so on; full ES has no truncation."""
    horizons = est.fixed_horizon(sizes.horizon)
    found = {}
    for truncation in sizes.truncations:
        pairs, rate = PAIRS[truncation], sizes.rates[truncation]
        shared: dict[str, Any] = {"truncation": truncation, "horizons": horizons}
        builds: dict[str, tuple[Callable, int]] = {
            "PES": (est.pes, 2),
            "NRES": (est.nres, 2),
            "truncated ES": (est.truncated_es, 3),
        }
        for name, (build, runs) in builds.items():
            estimator = build(system, num_pairs=pairs, sigma=SIGMA, chunk=4, **shared)
            found[f"{name}, K={truncation}"] = Method(estimator, runs * pairs * truncation, rate)
        estimator = est.tbptt(system, num_particles=2 * pairs, chunk=4, **shared)
        found[f"TBPTT, K={truncation}"] = Method(estimator, 2 * pairs * truncation, rate)
    full = est.full_es(system, num_pairs=1, horizons=horizons, sigma=SIGMA)
    return found | {"full ES": Method(full, 2 * sizes.horizon, 0.2)}


def tune(name: str, method: Method, sizes: Sizes) -> tuple[np.ndarray, np.ndarray]:
    """Total inner steps ``[R]`` and theta ``[seeds, R, 2]``."""
    outer = sizes.inner_steps // method.cost // sizes.records * sizes.records
    steps, thetas = descend(
        name,
        method.estimator,
        jnp.log(jnp.asarray(START)),
        optax.adam(method.rate),
        num_steps=outer,
        num_records=sizes.records,
        num_seeds=sizes.seeds,
    )
    return steps * method.cost, thetas


def run(quick: bool, data_dir: str | None) -> Result:
    sizes = QUICK if quick else FULL
    system = inner_system(data_dir, sizes.horizon)
    tuned = in_parallel(
        {
            name: partial(tune, name, method, sizes)
            for name, method in methods(system, sizes).items()
        }
    )
    # The paths and the grid in one program.
    rates, decays = (np.log(10) * np.linspace(*ends, sizes.grid) for ends in (RATES, DECAYS))
    grid = np.stack(np.meshgrid(rates, decays), axis=-1)
    thetas = {"grid": grid} | {name: theta for name, (_, theta) in tuned.items()}
    losses = held_out_losses(system, thetas, sizes.horizon, HELD_OUT)
    surface = losses.pop("grid")
    found = {name: (steps, theta, losses[name]) for name, (steps, theta) in tuned.items()}
    row, column = np.unravel_index(np.argmin(surface), surface.shape)
    best = (float(rates[column]), float(decays[row]), float(surface[row, column]))
    table = [
        {
            "estimator": name,
            "first rate": float(np.exp(np.median(thetas[:, -1, 0]))),
            "decay": float(np.exp(np.median(thetas[:, -1, 1]))),
            "last rate": float(np.median(last_rate(thetas[:, -1]))),
            "final loss": float(np.median(losses[:, -1])),
            "best seed": float(losses[:, -1].min()),
            "worst seed": float(losses[:, -1].max()),
        }
        for name, (_, thetas, losses) in found.items()
    ]
    at_best = np.array(best[:2])
    table.append(
        {
            "estimator": "grid optimum",
            "first rate": float(np.exp(best[0])),
            "decay": float(np.exp(best[1])),
            "last rate": float(last_rate(at_best)),
            "final loss": best[2],
            "best seed": best[2],
            "worst seed": best[2],
        }
    )
    return Result(
        claims=claims(found, rates, decays, surface),
        table=table,
        figure=draw(sizes, rates, decays, surface, best, found),
        data={
            "grid": {"log rate": rates, "log decay": decays, "loss": surface},
            "curves": {
                name: {"inner steps": steps, "theta": thetas, "loss": losses}
                for name, (steps, thetas, losses) in found.items()
            },
        },
    )


def last_rate(theta: np.ndarray) -> np.ndarray:
    """The learning rate at the end of training, of theta ``[..., 2]``."""
    return np.exp(theta[..., 0]) / 2 ** np.exp(theta[..., 1])


def best_decay(theta: np.ndarray, rates, decays, surface) -> float:
    """The exponent of the lowest loss in the grid's column nearest to the first rate of theta."""
    column = np.argmin(np.abs(rates - theta[0]))
    return float(np.exp(decays[np.argmin(surface[:, column])]))


def claims(found: dict, rates, decays, surface) -> list[Claim]:
    best = float(surface.min())
    last = {name: losses[:, -1] for name, (_, _, losses) in found.items()}
    decay = {name: np.exp(np.median(thetas[:, -1, 1])) for name, (_, thetas, _) in found.items()}
    start = float(found["full ES"][2][0, 0])
    short = ["truncated ES, K=10", "TBPTT, K=10"]
    middle = {name: np.median(found[name][1][:, -1], axis=0) for name in short}
    fit = {name: best_decay(theta, rates, decays, surface) for name, theta in middle.items()}

    def of(names) -> str:
        return ", ".join(f"{n} {last[n].min():.3f} to {last[n].max():.3f}" for n in names)

    unbiased = [name for name in last if name.startswith(("PES", "NRES"))]
    found_claims = [
        Claim(
            f"PES and NRES come within {NEAR - 1:.0%} of the loss of the grid's best schedule.",
            bool(max(last[name].max() for name in unbiased) < NEAR * best),
            f"{of(unbiased)}; grid optimum {best:.3f}; start {start:.3f}",
        ),
        Claim(
            "Truncated ES and TBPTT over 10 steps end at worse schedules than PES in every seed.",
            bool(min(last[name].min() for name in short) > last["PES, K=10"].max()),
            of(["PES, K=10", *short]),
        ),
        Claim(
            "They decay too fast: by more than PES, and than is best at their own first rate.",
            all(bool(decay[name] > max(decay["PES, K=10"], fit[name])) for name in short),
            f"exponents: PES, K=10 {decay['PES, K=10']:.3g}, "
            + ", ".join(f"{name} {decay[name]:.3g} (best {fit[name]:.3g})" for name in short),
        ),
    ]
    if "truncated ES, K=100" in last:
        found_claims.append(
            Claim(
                "Ten times longer truncations lessen the bias of truncated ES and do not end it.",
                bool(
                    np.median(last["PES, K=100"])
                    < np.median(last["truncated ES, K=100"])
                    < np.median(last["truncated ES, K=10"])
                ),
                of(["truncated ES, K=10", "truncated ES, K=100", "PES, K=100"]),
            )
        )
    return found_claims


def draw(sizes: Sizes, rates, decays, surface, best, found) -> Figure:
    panels = len(sizes.truncations)
    figure = Figure(figsize=(5.2 + 3.6 * panels, 3.7), layout="constrained")
    axes = figure.subplots(1, 1 + panels, width_ratios=(1.25, *[1] * panels))
    if panels > 1:
        axes[2].sharey(axes[1])
    left = axes[0]
    mesh = left.pcolormesh(
        np.exp(rates),
        np.exp(decays),
        surface,
        norm=LogNorm(),
        cmap="magma",
        shading="gouraud",
        rasterized=True,
    )
    bar = figure.colorbar(mesh, ax=left, label="mean training loss (nats)")
    log_ticks(bar.ax)
    shown = sizes.truncations[0]
    for name, color in COLORS.items():
        theta = np.exp(found[name if name == "full ES" else f"{name}, K={shown}"][1])
        for path in theta:
            left.plot(path[:, 0], path[:, 1], color="white", linewidth=2.6)
            left.plot(path[:, 0], path[:, 1], color=color, linewidth=1.6)
            left.plot(*path[-1], "o", color=color, markersize=5, markeredgecolor="white")
    left.plot(*START, "s", color="white", markeredgecolor="black", markersize=6)
    left.plot(*np.exp(best[:2]), "*", color="#F0E442", markeredgecolor="black", markersize=13)
    left.set_xscale("log")
    left.set_yscale("log")
    left.set_xlim(np.exp(rates[[0, -1]]))
    left.set_ylim(np.exp(decays[[0, -1]]))
    left.set_xlabel(r"$\theta_0$: learning rate of the first step")
    left.set_ylabel(r"$\theta_1$: exponent of the decay")
    left.set_title(f"Paths, K = {shown} (square: start, star: grid optimum)", fontsize=9)
    for axis, truncation in zip(axes[1:], sizes.truncations, strict=True):
        for name, color in COLORS.items():
            whole = name == "full ES"
            steps, _, losses = found[name if whole else f"{name}, K={truncation}"]
            style = ":" if whole else "-"
            band(axis, steps, losses, color=color, label=name, linewidth=1.8, linestyle=style)
        axis.axhline(best[2], color="black", linewidth=0.9, linestyle="--", label="grid optimum")
        axis.set_yscale("log")
        log_ticks(axis)
        axis.set_xlim(0, sizes.inner_steps)
        axis.set_title(f"Truncations of K = {truncation} inner steps", fontsize=9)
        axis.set_xlabel("inner steps in total")
        axis.ticklabel_format(axis="x", style="sci", scilimits=(0, 0))
        axis.grid(alpha=0.25, linewidth=0.5, which="both")
        axis.spines[["top", "right"]].set_visible(False)
    axes[1].set_ylabel("mean training loss (nats), held-out runs")
    axes[1].legend(fontsize=8, loc="upper right", edgecolor="none", framealpha=0.9)
    return figure


STUDY = Study(
    "PES finds the learning-rate schedule that truncated ES and TBPTT miss (Vicol 2021, 5.3)",
    4.0,
    run,
)
