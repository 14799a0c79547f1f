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

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from launch.studies.base import Claim, Result, Study
from launch.studies.shared import classifier, plots
from launch.studies.shared.compare import (
    Descent,
    adam_descents,
    compare,
    final,
    held_out_losses,
    in_terms_of,
    ranges,
)
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
NAMES = ("PES", "NRES", "full ES", "truncated ES", "TBPTT")


class ScheduleSetting(NamedTuple):
    horizon: int
    truncations: tuple[int, ...]
    inner_steps: int  # of one run
    seeds: int
    records: int
    grid: int  # points on a side
    rates: dict[int, float]  # of Adam, by truncation


FULL = ScheduleSetting(5000, (10, 100), 400_000, 3, 8, 11, {10: 0.01, 100: 0.03})
QUICK = ScheduleSetting(500, (10,), 96_000, 2, 4, 9, {10: 0.02})
PAIRS = {10: 20, 100: 5}
HELD_OUT = 2  # inner runs of an evaluation


def inner_system(data_dir: str | None) -> UnrolledSystem:
    """Inner training as a function of (log of the first rate, log of the decay)."""
    data = load_images("mnist" if data_dir else "digits", data_dir)
    system = inner_training(
        mlp_classifier(data, hidden_sizes=HIDDEN, batch_size=BATCH),
        learnable_schedule(*START),
        meta_loss="fresh",
        loss_ceiling=CEILING,
    )
    return in_terms_of(lambda x: {"params": {"log_learning_rate": x[0], "log_decay": x[1]}}, system)


def estimators(system: UnrolledSystem, setting: ScheduleSetting) -> dict[str, Any]:
    """``"PES, K=10"`` and so on, with the forward inner steps of one outer step and Adam's rate.

    Full ES has no truncation.
    """
    horizons = est.fixed_horizon(setting.horizon)
    full = est.full_es(system, num_pairs=1, horizons=horizons, sigma=SIGMA)
    found = {}
    for truncation in setting.truncations:
        pairs, rate = PAIRS[truncation], setting.rates[truncation]
        window: dict[str, Any] = {"truncation": truncation, "horizons": horizons, "chunk": 4}
        es = {"num_pairs": pairs, "sigma": SIGMA} | window
        for name, estimator, runs in (
            ("PES", est.pes(system, **es), 2),
            ("NRES", est.nres(system, **es), 2),
            ("truncated ES", est.truncated_es(system, **es), 3),
            ("TBPTT", est.tbptt(system, num_particles=2 * pairs, **window), 2),
        ):
            found[f"{name}, K={truncation}"] = estimator, runs * pairs * truncation, rate
    return found | {"full ES": (full, 2 * setting.horizon, 0.2)}


def run(quick: bool, data_dir: str | None) -> Result:
    setting = QUICK if quick else FULL
    system = inner_system(data_dir)
    rates, decays = (np.log(10) * np.linspace(*ends, setting.grid) for ends in (RATES, DECAYS))
    grid = np.stack(np.meshgrid(rates, decays), axis=-1)
    methods = adam_descents(
        estimators(system, setting),
        jnp.log(jnp.asarray(START)),
        inner_steps=setting.inner_steps,
        num_records=setting.records,
        num_seeds=setting.seeds,
    )
    # The paths and the grid in one program.
    found = compare(
        {"grid": lambda: (np.array([0]), grid)} | methods,
        lambda thetas: held_out_losses(system, thetas, setting.horizon, HELD_OUT),
    )
    surface = found.pop("grid").loss
    row, column = np.unravel_index(np.argmin(surface), surface.shape)
    best = np.array([rates[column], decays[row]])
    lines = {name: (each.theta[:, -1], each.loss[:, -1]) for name, each in found.items()}
    lines["grid optimum"] = best[None], surface[row, column][None]
    table = [
        {
            "estimator": name,
            "first rate": float(np.exp(np.median(theta[:, 0]))),
            "decay": float(np.exp(np.median(theta[:, 1]))),
            "last rate": float(np.median(last_rate(theta))),
            "final loss": float(np.median(loss)),
            "best seed": float(loss.min()),
            "worst seed": float(loss.max()),
        }
        for name, (theta, loss) in lines.items()
    ]
    data = {
        "grid": {"log rate": rates, "log decay": decays, "loss": surface},
        "curves": {name: each._asdict() for name, each in found.items()},
    }
    figure = draw(setting, rates, decays, surface, best, found)
    caption = (
        f"{classifier.name(data_dir)} MLP, hidden {HIDDEN}, batch {BATCH}, T = "
        f"{setting.horizon:,}, mean training loss on fresh batches of {HELD_OUT} held-out runs; "
        f"line: median, band: range of {setting.seeds} seeds; paths: the seeds"
    )
    return Result(claims(found, rates, decays, surface), table, figure, data, caption)


def last_rate(theta: np.ndarray) -> np.ndarray:
    """The learning rate at the end of training, of theta ``[..., 2]``."""
    return np.exp(theta[..., 0]) / 2 ** np.exp(theta[..., 1])


def best_decay(theta: np.ndarray, rates, decays, surface) -> float:
    """The exponent of the lowest loss in the grid's column nearest to the first rate of theta."""
    column = np.argmin(np.abs(rates - theta[0]))
    return float(np.exp(decays[np.argmin(surface[:, column])]))


def claims(found: dict[str, Descent], rates, decays, surface) -> list[Claim]:
    best = float(surface.min())
    last = final(found)
    decay = {name: np.exp(np.median(each.theta[:, -1, 1])) for name, each in found.items()}
    start = float(found["full ES"].loss[0, 0])
    short = ["truncated ES, K=10", "TBPTT, K=10"]
    middle = {name: np.median(found[name].theta[:, -1], axis=0) for name in short}
    fit = {name: best_decay(theta, rates, decays, surface) for name, theta in middle.items()}
    unbiased = [name for name in last if name.startswith(("PES", "NRES"))]
    claims = [
        Claim(
            f"PES and NRES come within {NEAR - 1:.0%} of the loss of the grid's best schedule.",
            bool(max(last[name].max() for name in unbiased) < NEAR * best),
            f"{ranges(last, unbiased)}; grid optimum {best:.3f}; start {start:.3f}",
        ),
        Claim(
            "Truncated ES and TBPTT over 10 steps end at worse schedules than PES in every seed.",
            bool(min(last[name].min() for name in short) > last["PES, K=10"].max()),
            ranges(last, ["PES, K=10", *short]),
        ),
        Claim(
            "They decay too fast: by more than PES, and than is best at their own first rate.",
            all(bool(decay[name] > max(decay["PES, K=10"], fit[name])) for name in short),
            f"exponents: PES, K=10 {decay['PES, K=10']:.3g}, "
            + ", ".join(f"{name} {decay[name]:.3g} (best {fit[name]:.3g})" for name in short),
        ),
    ]
    if "truncated ES, K=100" in last:
        claims.append(
            Claim(
                "Ten times longer truncations lessen the bias of truncated ES and do not end it.",
                bool(
                    np.median(last["PES, K=100"])
                    < np.median(last["truncated ES, K=100"])
                    < np.median(last["truncated ES, K=10"])
                ),
                ranges(last, ["truncated ES, K=10", "truncated ES, K=100", "PES, K=100"]),
            )
        )
    return claims


def draw(
    setting: ScheduleSetting, rates, decays, surface, best, found: dict[str, Descent]
) -> Figure:
    count = len(setting.truncations)
    figure, (left, *panels) = plots.panels(
        1 + count, (5.2 + 3.6 * count, 3.8), width_ratios=(1.25, *[1] * count)
    )
    label = "mean training loss (nats), held-out runs"
    bar = plots.surface(figure, left, np.exp(rates), np.exp(decays), surface, label,
                        norm=LogNorm(), shading="gouraud")  # fmt: skip
    plots.log_ticks(bar.ax)
    shown = setting.truncations[0]
    for name in NAMES:
        for theta in found[name if name == "full ES" else f"{name}, K={shown}"].theta:
            plots.path(left, np.exp(theta), plots.COLORS[name])
    plots.start_and_optimum(left, START, np.exp(best))
    left.set(
        xscale="log",
        yscale="log",
        xlabel=r"$\theta_0$: learning rate of the first step",
        ylabel=r"$\theta_1$: exponent of the decay",
        title=f"Paths, K = {shown} (square: start, star: grid optimum)",
    )
    for axes in panels[1:]:
        axes.sharey(panels[0])
    for axes, truncation in zip(panels, setting.truncations, strict=True):
        for name in NAMES:
            whole = name == "full ES"
            each = found[name if whole else f"{name}, K={truncation}"]
            style = ":" if whole else "-"
            plots.band(axes, each.steps, each.loss, style, color=plots.COLORS[name], label=name)
        plots.level(axes, surface.min(), "grid optimum")
        plots.inner_steps_axis(axes, setting.inner_steps)
        axes.set(title=f"Truncations of K = {truncation} inner steps", yscale="log")
        plots.log_ticks(axes)
    panels[0].set_ylabel(label)
    panels[0].legend(loc="upper right", frameon=True, edgecolor="none")
    return figure


STUDY = Study("PES finds the schedule that truncated ES and TBPTT miss (Vicol 2021, 5.3)", 4.0, run)
