"""The controller of the package on networks far larger than any it was trained on.

    python -m launch.reproduce bigger_networks --workdir=DIR

A decoder of ten million parameters on English prose, and a convolutional network on MNIST digits
of 28 by 28 pixels, 2,000 steps each. Its training tasks have up to 9,440 parameters, those of the
suites up to 21,000. Beside it AdamW (decay 0.1) under a cosine, at rates half a decade apart.
The controller gets the length of the run, and nothing is tuned. Run ``i`` of every optimizer has
the same start and batches. Every run is kept as it ends, so a study that was stopped goes on.

Quick: networks of a hundredth of the size, for 60 steps.
"""

from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from matplotlib.figure import Figure

import learned_opt
from launch import config as cfg
from launch.choices import to_dict
from launch.evaluation.baselines import BASELINES, COSINE, Setting, theta_of
from launch.evaluation.kept import kept, software
from launch.evaluation.runs import Runner, Starts
from launch.studies.base import Claim, Result, Study
from launch.studies.shared import plots
from meta_train.progress import progress
from tasks import TaskConfig

OURS = "controller"
SEED = 4000


class Network(NamedTuple):
    """A task, the seeds of its runs, and the rates that AdamW is tried at."""

    name: str
    task: TaskConfig
    seeds: int
    rates: tuple[float, ...]


FULL = (
    Network(
        "Transformer",
        cfg.task(
            "transformer_lm",
            dataset="prose",
            width=384,
            heads=6,
            layers=6,
            length=64,
            batch_size=2,
        ),
        1,
        (1e-4, 10**-3.5, 1e-3, 10**-2.5, 1e-2),
    ),
    Network(
        "conv net",
        cfg.task(
            "conv",
            dataset="mnist5k",
            channels=(16, 32, 64),
            normalization="layer",
            batch_size=32,
        ),
        3,
        (1e-3, 10**-2.5, 1e-2, 10**-1.5, 1e-1),
    ),
)
QUICK = (
    Network(
        "Transformer",
        cfg.task("transformer_lm", dataset="prose", width=64, layers=2, length=16, batch_size=4),
        1,
        (1e-3, 1e-2),
    ),
    Network("conv net", cfg.task("conv", dataset="mnist5k", channels=(8,)), 2, (1e-3, 1e-2)),
)


class Curves(NamedTuple):
    """Of one optimizer on one network.

    Attributes:
      train: losses of the training batches in equal parts of the run, ``[seeds, points]``.
      final: their mean over the last tenth of the steps, ``[seeds]``.
      test: of the whole test split, after the last step, ``[seeds]``.
      seconds: of a step, which depends on what else the machine does.
    """

    train: np.ndarray
    final: np.ndarray
    test: np.ndarray
    seconds: float


def run(quick: bool, data_dir: str | None, folder: Path | None = None) -> Result:
    del data_dir  # What is in the package.
    networks, steps = (QUICK, 60) if quick else (FULL, 2000)
    found = {network.name: measure(network, steps, folder) for network in networks}
    sizes = {network.name: parameters(network) for network in networks}
    rows = [
        {
            "network": name,
            "parameters": sizes[name],
            "optimizer": label,
            "training loss": float(curves.final.mean()),
            "test loss": float(curves.test.mean()),
            "worst test loss": float(curves.test.max()),
            "ms a step": 1e3 * curves.seconds,
        }
        for name, optimizers in found.items()
        for label, curves in optimizers.items()
    ]
    data = {
        name: {label: curves._asdict() for label, curves in optimizers.items()}
        for name, optimizers in found.items()
    }
    caption = (
        f"{steps:,} steps; losses in nats; "
        + "; ".join(
            f"{n.name}: {sizes[n.name]:,} parameters, {n.seeds} run{'s' * (n.seeds > 1)}"
            for n in networks
        )
        + "; AdamW: decay .1, cosine, by its rate; lines: means of batches over a two-hundredth "
        "of the run, thin: single runs"
    )
    return Result(claims(found), rows, draw(found, steps), data, caption)


def parameters(network: Network) -> int:
    starts = Starts(network.task.make())
    params = jax.eval_shape(starts.begin, starts.keys(0, 1))[1]
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def measure(network: Network, steps: int, folder: Path | None) -> dict[str, Curves]:
    """By optimizer, ours first; one run at a time, kept by what decides it."""
    starts = Starts(network.task.make())
    ours, theta = learned_opt.load(OURS)
    baseline = Runner(starts, BASELINES["adamw"].optimizer(), 1, shared=True)
    decides: dict[str, Any] = {"theta": jax.tree.map(lambda x: x.tolist(), theta)}
    each = {OURS: (Runner(starts, ours, 1, shared=True), theta, decides)} | {
        f"AdamW {rate:.2g}": (baseline, theta_of(Setting(rate, COSINE)), {"rate": rate})
        for rate in network.rates
    }
    settings = {
        "task": to_dict(network.task),
        "steps": steps,
        "seeds": [SEED, network.seeds],
    } | software()
    keys, found = starts.keys(SEED, network.seeds), {}
    for label, (runner, theta, decides) in progress(
        each.items(), desc=network.name, unit="optimizer"
    ):
        runs = []
        for index in range(network.seeds):
            compute = partial(one_run, runner, theta, keys[index : index + 1], steps)
            of_it = settings | {"optimizer": label, "run": index} | decides
            runs.append(kept(folder, of_it, compute) if folder else compute())
        train, final, test, seconds = (
            np.stack([run[name] for run in runs]) for name in Curves._fields
        )
        found[label] = Curves(train, final, test, float(seconds.mean()))
    return found


def one_run(runner: Runner, theta: Any, key: jax.Array, steps: int) -> dict[str, np.ndarray]:
    """The fields of ``Curves`` of one run; ``key [1]``."""
    runs = runner(theta, key, steps, ("test",))
    return {
        "train": runs.curve[0],
        "final": runs.final[0],
        "test": np.asarray(runs.scores["test"]["loss"][0]),
        "seconds": np.asarray(runs.seconds),
    }


def best(optimizers: dict[str, Curves], field: str) -> tuple[str, Curves]:
    """AdamW at the rate with the lowest mean of ``field``."""
    rates = {label: curves for label, curves in optimizers.items() if label != OURS}
    means = {label: float(getattr(curves, field).mean()) for label, curves in rates.items()}
    label = min(means, key=lambda each: (np.isnan(means[each]), means[each]))
    return label, rates[label]


def claims(found: dict[str, dict[str, Curves]]) -> list[Claim]:
    made = []
    for name, optimizers in found.items():
        ours = optimizers[OURS]
        for field, words in (("final", "training"), ("test", "test")):
            label, curves = best(optimizers, field)
            mine, theirs = getattr(ours, field), getattr(curves, field)
            made.append(
                Claim(
                    f"{name}: its {words} loss is at most that of AdamW at the best of its rates.",
                    bool(mine.mean() <= theirs.mean()),
                    f"{mine.mean():.4f} against {theirs.mean():.4f} of {label}",
                )
            )
    return made


def draw(found: dict[str, dict[str, Curves]], steps: int) -> Figure:
    figure, panels = plots.panels(len(found), (4.6 * len(found), 3.6))
    for axes, (name, optimizers) in zip(panels, found.items(), strict=True):
        colors = iter((plots.ORANGE, plots.GREEN, plots.SKY, plots.PINK, plots.GRAY))
        for label, curves in optimizers.items():
            ours = label == OURS
            color = plots.BLUE if ours else next(colors)
            points = curves.train.shape[1]
            x = (np.arange(points) + 0.5) * steps / points
            for single in curves.train:
                axes.plot(x, single, color=color, linewidth=0.4, alpha=0.5)
            axes.plot(x, curves.train.mean(axis=0), color=color, label=label,
                      linewidth=2.2 if ours else 1.2, zorder=3 if ours else 2)  # fmt: skip
        start = float(optimizers[OURS].train[:, 0].mean())
        low = min(float(np.nanmin(c.train.mean(axis=0))) for c in optimizers.values())
        axes.set(title=name, xlabel="steps", yscale="log", ylim=(0.8 * low, 1.3 * start))
        plots.log_ticks(axes)
    panels[0].set_ylabel("training loss (nats)")
    panels[-1].legend()
    return figure


STUDY = Study(
    "the controller on a Transformer of ten million parameters, and a conv net on 28 pixels",
    60.0,
    run,
    keeps=True,
)
