"""Compares trained optimizers with optax baselines whose learning rates were swept.

  python -m launch.evaluate --optimizer=DIR [--optimizer=DIR ...] --task=NAME --workdir=DIR

Inner training-loss curves over several seeds, at the horizon the optimizer was trained for
and at 5 times it; writes `evaluation.json` and `evaluation.png`.
"""

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import matplotlib
import numpy as np
from absl import flags

matplotlib.use("agg")
from matplotlib import pyplot as plt

import learned_opt
from launch import command_line
from launch import config as cfg
from launch.command_line import DATA_DIR, WORKDIR
from launch.path_flags import define_paths
from learned_opt.paths import writable_folder
from meta_train.evaluate import (
    BASELINES,
    LEARNING_RATES,
    Curves,
    evaluate_baseline,
    evaluate_learned,
)
from meta_train.progress import progress
from tasks.base import Task

# Fixed, so that evaluations compare; no meta-training draws from it (their keys are folded).
SEED = 20_000


def evaluate(
    task: Task, optimizers: dict[str, Path], horizons: Sequence[int], num_seeds: int
) -> dict[int, list[Curves]]:
    """Curves of every optimizer and baseline at every horizon."""
    trained = {name: learned_opt.load(path) for name, path in optimizers.items()}
    results: dict[int, list[Curves]] = {}
    with progress(total=len(horizons) * (len(trained) + len(BASELINES)), desc="evaluation") as bar:
        for horizon in horizons:
            size: dict[str, Any] = {"num_steps": horizon, "num_seeds": num_seeds, "seed": SEED}
            results[horizon] = []
            for name, (optimizer, theta) in trained.items():
                results[horizon].append(evaluate_learned(name, task, optimizer, theta, **size))
                bar.update()
            for name in BASELINES:
                results[horizon].append(evaluate_baseline(name, task, **size))
                bar.update()
    return results


def table(results: dict[int, list[Curves]]) -> str:
    """The results as text: mean and final training loss of every optimizer at every horizon."""
    lines = []
    width = max(len(_label(c)) for curves in results.values() for c in curves)
    for horizon, curves in results.items():
        seeds = curves[0].losses.shape[0]
        lines.append(
            f"{horizon} inner steps, {seeds} seeds".ljust(width) + "  mean loss  final loss"
        )
        for c in curves:
            lines.append(f"{_label(c):<{width}}  {c.mean:9.4f}  {c.final:10.4f}")
        lines.append("")
    lines.append(
        f"Loss on training batches in nats; final: mean of the last tenth. Baselines: best of "
        f"{len(LEARNING_RATES)} learning rates by final loss on these seeds."
    )
    return "\n".join(lines)


def plot(results: dict[int, list[Curves]], path: Path) -> None:
    """Median curve of every optimizer with a band over the middle 80% of seeds."""
    figure, axes = plt.subplots(
        1, len(results), figsize=(5.5 * len(results), 4), squeeze=False, layout="constrained"
    )
    for axis, (horizon, curves) in zip(axes[0], results.items(), strict=True):
        smooth = max(1, horizon // 100)
        for c in curves:
            losses = np.where(np.isfinite(c.losses), c.losses, np.nan)
            kept = losses[:, : losses.shape[1] // smooth * smooth]
            losses = kept.reshape(len(losses), -1, smooth).mean(axis=2)
            steps = np.arange(losses.shape[1]) * smooth
            low, middle, high = np.nanquantile(losses, [0.1, 0.5, 0.9], axis=0)
            (line,) = axis.plot(steps, middle, label=_label(c))
            axis.fill_between(steps, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
        axis.set(
            yscale="log",
            xlabel="inner step",
            ylabel="training loss (nats)",
            title=f"horizon {horizon}",
        )
        axis.grid(alpha=0.3, which="both")
        axis.legend(frameon=False, fontsize="small")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def write(
    results: dict[int, list[Curves]],
    workdir: Path,
    task: cfg.TaskConfig,
    optimizers: dict[str, Path],
) -> None:
    """Writes ``evaluation.json``: what was compared, every curve, and what the table shows."""
    document = {
        "task": cfg.to_dict(task),
        "optimizers": {name: str(path) for name, path in optimizers.items()},
        "seeds": next(iter(results.values()))[0].losses.shape[0],
        "first_seed": SEED,
        "learning_rates_swept": list(LEARNING_RATES),
        "device": jax.devices()[0].device_kind,
        "results": {
            str(horizon): [
                {
                    "name": c.name,
                    "learning_rate": c.learning_rate,
                    "mean_loss": c.mean,
                    "final_loss": c.final,
                    "losses": np.round(c.losses, 6).tolist(),
                }
                for c in curves
            ]
            for horizon, curves in results.items()
        },
    }
    text = json.dumps(document, allow_nan=True)
    temporary = workdir / "evaluation.json.tmp"
    temporary.write_text(text)
    temporary.replace(workdir / "evaluation.json")


def _label(curves: Curves) -> str:
    if curves.learning_rate is None:
        return curves.name
    return f"{curves.name}, learning rate {curves.learning_rate:.2g}"


_OPTIMIZER = define_paths("optimizer", "Folder of a trained optimizer.")
_TASK = flags.DEFINE_string(
    "task", None, f"Task, one of {sorted(cfg.TASKS)} (default: that of training)."
)
_HORIZONS = flags.DEFINE_list(
    "horizons", None, "Inner steps (default: the training horizon and 5 times it)."
)
_SEEDS = flags.DEFINE_integer("seeds", 10, "Inner runs per curve.", lower_bound=1)


def main(config: cfg.Config) -> int:
    if not _OPTIMIZER.value or not WORKDIR.value:
        raise ValueError("--optimizer and --workdir are required.")
    names = [_short_name(path) for path in _OPTIMIZER.value]
    if len(set(names)) < len(names):
        names = [str(Path(path).absolute()) for path in _OPTIMIZER.value]
    paths = {name: Path(path) for name, path in zip(names, _OPTIMIZER.value, strict=True)}
    trained = [learned_opt.load_config(path)["training"] for path in paths.values()]
    horizons = _horizons(trained, config)
    task_config = _task_config(trained, config)
    task = cfg.make_task(task_config, DATA_DIR.value)
    workdir = writable_folder("--workdir", WORKDIR.value)
    workdir.mkdir(parents=True, exist_ok=True)
    results = evaluate(task, paths, horizons, _SEEDS.value)
    write(results, workdir, task_config, paths)
    plot(results, workdir / "evaluation.png")
    print(table(results))
    print(f"wrote {workdir / 'evaluation.json'} and {workdir / 'evaluation.png'}")
    return 0


def _horizons(trained: list[dict[str, Any]], config: cfg.Config) -> list[int]:
    """``--horizons``, or the one of training and 5 times it."""
    if not _HORIZONS.value:
        found = sorted({card.get("horizon", config.inner.horizon) for card in trained})
        if len(found) > 1:
            raise ValueError(f"The optimizers were trained at horizons {found}; give --horizons.")
        return [found[0], 5 * found[0]]
    if not all(h.isdecimal() and int(h) > 0 for h in _HORIZONS.value):
        raise ValueError(f"--horizons must be whole numbers above 0, got {_HORIZONS.value}.")
    return [int(h) for h in _HORIZONS.value]


def _task_config(trained: list[dict[str, Any]], config: cfg.Config) -> cfg.TaskConfig:
    """The task of training, unless flags name one."""
    given = [word.lstrip("-") for word in sys.argv[1:] if word.startswith("-")]
    task = config.task
    if not any(word.startswith(("cfg.task.", "preset")) for word in given):
        task = cfg.from_dict(cfg.TaskConfig, trained[0].get("task", cfg.to_dict(task)))
    if _TASK.value and _TASK.value != task.name:
        task = dataclasses.replace(config.task, name=_TASK.value)
    return task


def _short_name(path: str) -> str:
    """The last two parts of the path: the job and the folder inside it."""
    return "/".join(Path(path).absolute().parts[-2:])


if __name__ == "__main__":
    command_line.run(main)
