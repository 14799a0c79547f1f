"""The controller of the package on networks far larger than any it was trained on.

    python -m launch.reproduce bigger_networks --workdir=DIR

A decoder of ten million parameters on English prose, and a convolutional network on MNIST digits
of 28 by 28 pixels, 2,000 steps each. Its training tasks have up to 9,440 parameters, those of the
suites up to 21,000. Beside it AdamW (decay 0.1) and Muon under a cosine, at rates half a decade
apart. The controller gets the length of the run, and nothing is tuned. On the Transformer, which is
24 times as wide as that of its training, it is tried under ``scale_by_width`` too. Run ``i`` of
every optimizer has the same start and batches. Every run is kept as it ends, so a study that was
stopped goes on.

Minutes on a GPU; on two cores hours, nearly all of them the Transformer's.
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
from learned_opt import LearnedOptimizer
from learned_opt.base import learned_optimizer
from meta_train.progress import progress
from tasks import TaskConfig

OURS, BY_WIDTH = "controller", "controller by width"
SEED = 4000


class Network(NamedTuple):
    """A task, how many runs, the rates that each baseline is tried at, and the task at the width
    of the controller's training, if it is to be scaled from there.
    """

    name: str
    task: TaskConfig
    runs: int
    rates: dict[str, tuple[float, ...]]
    base: TaskConfig | None = None


def rates(low: float, high: float) -> tuple[float, ...]:
    """Half a decade apart, from ten to the ``low`` to ten to the ``high``."""
    return tuple(10**power for power in np.arange(low, high + 0.1, 0.5).tolist())


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
            batch_size=8,
        ),
        3,
        {"AdamW": rates(-4, -2), "Muon": rates(-3.5, -1.5)},
        cfg.task("transformer_lm", dataset="prose", width=16, heads=1, layers=6, length=64),
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
        {"AdamW": rates(-3.5, -1.5), "Muon": rates(-3, -1)},
    ),
)
QUICK = (
    Network(
        "Transformer",
        cfg.task("transformer_lm", dataset="prose", width=64, layers=2, length=16, batch_size=4),
        1,
        {"AdamW": (1e-3, 1e-2), "Muon": (1e-2,)},
        cfg.task("transformer_lm", dataset="prose", width=16, heads=1, layers=2, length=16),
    ),
    Network(
        "conv net",
        cfg.task("conv", dataset="mnist5k", channels=(8, 16)),
        2,
        {"AdamW": (1e-3, 1e-2)},
    ),
)


class Curves(NamedTuple):
    """Of one optimizer at one rate on one network.

    Attributes:
      train: losses of the training batches in equal parts of the run, ``[runs, points]``.
      final: their mean over the last tenth of the steps, ``[runs]``.
      test: of the whole test split, after the last step, ``[runs]``.
      seconds: of a step, which depends on what else the machine does.
    """

    train: np.ndarray
    final: np.ndarray
    test: np.ndarray
    seconds: float


# An optimizer -> its rate -> its runs; the controller's rate is 0, for none.
Found = dict[str, dict[float, Curves]]


def run(quick: bool, data_dir: str | None, folder: Path | None = None) -> Result:
    del data_dir  # What is in the package.
    networks, steps = (QUICK, 60) if quick else (FULL, 2000)
    parts = folder / "parts" if folder else None
    found = {network.name: measure(network, steps, parts) for network in networks}
    sizes = {network.name: parameters(network) for network in networks}
    rows = [
        {
            "network": name,
            "parameters": sizes[name],
            "optimizer": f"{optimizer} {rate:.2g}" if rate else optimizer,
            "training loss": float(curves.final.mean()),
            "test loss": float(curves.test.mean()),
            "worst test loss": float(curves.test.max()),
            "ms a step": 1e3 * curves.seconds,
        }
        for name, optimizers in found.items()
        for optimizer, rates in optimizers.items()
        for rate, curves in rates.items()
    ]
    data = {
        name: {
            optimizer: {f"{rate:.3g}": curves._asdict() for rate, curves in rates.items()}
            for optimizer, rates in optimizers.items()
        }
        for name, optimizers in found.items()
    }
    caption = (
        f"{steps:,} steps; "
        + "; ".join(
            f"{n.name}: {sizes[n.name]:,} parameters, {n.runs} run{'s' * (n.runs > 1)}"
            for n in networks
        )
        + "; AdamW: decay .1; lines: means of runs, over two-hundredths of them; thick: the rate "
        "with the lowest training loss over the last tenth, thin: the others; "
        f"{jax.devices()[0].device_kind}"
    )
    return Result(claims(found), rows, draw(found, steps), data, caption)


def shapes(task: TaskConfig) -> Any:
    """Of the parameters of one run."""
    starts = Starts(task.make())
    params = jax.eval_shape(starts.begin, starts.keys(0, 1))[1]
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), params)


def parameters(network: Network) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(shapes(network.task)))


def by_width(optimizer: LearnedOptimizer, base: TaskConfig) -> LearnedOptimizer:
    """``optimizer``, with its steps scaled from the width of ``base``."""
    base_params = shapes(base)
    return learned_optimizer(
        optimizer.init,
        lambda theta, num_steps: learned_opt.scale_by_width(
            optimizer.bind(theta, num_steps), base_params
        ),
    )


def measure(network: Network, steps: int, folder: Path | None) -> Found:
    """By optimizer and rate, ours first; one run at a time, kept by what decides it."""
    starts = Starts(network.task.make())
    ours, theta = learned_opt.load(OURS)
    each = [(OURS, 0.0, Runner(starts, ours, 1, shared=True), theta)]
    if network.base:
        scaled = by_width(ours, network.base)
        each.append((BY_WIDTH, 0.0, Runner(starts, scaled, 1, shared=True), theta))
    for name, values in network.rates.items():
        runner = Runner(starts, BASELINES[name.lower()].optimizer(), 1, shared=True)
        each += [(name, value, runner, theta_of(Setting(value, COSINE))) for value in values]
    settings: dict[str, Any] = {"task": to_dict(network.task), "steps": steps}
    settings |= {"controller": jax.tree.map(lambda x: x.tolist(), theta)} | software()
    found: Found = {}
    for name, value, runner, theta in progress(each, desc=network.name, unit="optimizer"):
        runs = []
        for seed in range(SEED, SEED + network.runs):
            compute = partial(one_run, runner, theta, starts.keys(seed, 1), steps)
            of_it = settings | {"optimizer": name, "rate": value, "seed": seed}
            runs.append(kept(folder, of_it, compute) if folder else compute())
        train, final, test, seconds = (
            np.stack([run[field] for run in runs]) for field in Curves._fields
        )
        curves = Curves(train, final, test, float(seconds.mean()))
        found.setdefault(name, {})[value] = curves
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


def best(rates: dict[float, Curves], field: str) -> float:
    """The rate with the lowest mean of ``field``; one whose runs diverged is the last choice."""
    means = {rate: float(getattr(curves, field).mean()) for rate, curves in rates.items()}
    return min(means, key=lambda rate: (not np.isfinite(means[rate]), means[rate]))


def claims(found: dict[str, Found]) -> list[Claim]:
    made = []
    for network, optimizers in found.items():
        ours = BY_WIDTH if BY_WIDTH in optimizers else OURS
        for field, words in (("final", "training"), ("test", "test")):
            mine = float(getattr(optimizers[ours][0.0], field).mean())
            rate = best(optimizers["AdamW"], field)
            theirs = float(getattr(optimizers["AdamW"][rate], field).mean())
            made.append(
                Claim(
                    f"{network}: the {words} loss of the {ours} is at most that of AdamW at the "
                    "best rate.",
                    mine <= theirs,
                    f"{mine:.4f} against {theirs:.4f} at {rate:.2g}",
                )
            )
            if ours == BY_WIDTH:
                plain = float(getattr(optimizers[OURS][0.0], field).mean())
                made.append(
                    Claim(
                        f"{network}: it is below that of the {OURS} as it is.",
                        mine < plain,
                        f"{mine:.4f} against {plain:.4f}",
                    )
                )
    return made


def draw(found: dict[str, Found], steps: int) -> Figure:
    figure, panels = plots.panels(len(found), (4.6 * len(found), 3.6))
    colors = {OURS: plots.BLUE, BY_WIDTH: plots.SKY, "AdamW": plots.ORANGE, "Muon": plots.GREEN}
    for axes, (network, optimizers) in zip(panels, found.items(), strict=True):
        lowest = np.inf
        for name, rates in optimizers.items():
            chosen = best(rates, "final")
            for rate, curves in rates.items():
                mean = curves.train.mean(axis=0)
                x = (np.arange(len(mean)) + 0.5) * steps / len(mean)
                thick = rate == chosen
                label = f"{name} {rate:.2g}" if rate else f"{name}, no rate"
                axes.plot(x, mean, color=colors[name], label=label if thick else None,
                          linewidth=1.8 if thick else 0.5, zorder=3 if thick else 2)  # fmt: skip
                lowest = min(lowest, np.nanmin(mean))
        start = float(optimizers[OURS][0.0].train[:, 0].mean())
        axes.set(title=network, xlabel="steps", yscale="log", ylim=(0.9 * lowest, 1.2 * start))
        plots.log_ticks(axes)
        axes.legend()
    panels[0].set_ylabel("training loss (nats)")
    return figure


STUDY = Study(
    "the controller on a Transformer of ten million parameters, and a conv net on 28 pixels",
    400.0,
    run,
    keeps=True,
)
