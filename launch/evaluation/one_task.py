"""Trained optimizers beside optax baselines with swept rates, as numbers and a figure."""

import shutil
import textwrap
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import matplotlib
import numpy as np

matplotlib.use("agg")
from matplotlib import pyplot as plt

import learned_opt
from launch.evaluation import SEED
from launch.evaluation.kept import (
    PARTS,
    Arrays,
    decided_by_task,
    digest_of_optimizer,
    digest_of_steps,
    kept,
    replacing,
    software,
    whole,
)
from launch.evaluation.runs import Starts, check_runs, check_score
from launch.studies.shared.plots import plain
from meta_train import strict_json
from meta_train.evaluate import (
    BASELINES,
    FINAL,
    LEARNING_RATES,
    SELECTION_OFFSET,
    Curves,
    Estimate,
    difference,
    estimate,
    evaluate_baseline,
    evaluate_learned,
    is_tie,
)
from meta_train.progress import progress
from tasks.base import Task

Results = dict[int, list[Curves]]


def evaluate(
    task: Task,
    facts: dict[str, Any],
    optimizers: dict[str, Path],
    horizons: Sequence[int],
    num_seeds: int,
    workdir: Path,
) -> Results:
    """The runs of every optimizer and baseline at every horizon.

    Args:
      task: what they train.
      facts: what the task is, from ``choices.to_dict``.
      optimizers: label -> folder of a trained optimizer.
      workdir: keeps each result in ``evaluation.parts``, from which a second call continues.
    """
    trained = {name: learned_opt.load(path) for name, path in optimizers.items()}
    for name, (optimizer, _) in trained.items():
        check_runs(name, task, optimizer)
    if task.score is not None:
        check_score("the task", Starts(task), ("test",))
    weights = {name: {"weights": digest_of_optimizer(path)} for name, path in optimizers.items()}

    def steps(name, horizon):
        if ":" not in learned_opt.load_config(optimizers[name])["name"]:
            return {}
        return {"steps": digest_of_steps(task, *trained[name], horizon)}

    shared = {
        **decided_by_task(facts, task, ("test",)),
        "seeds": num_seeds,
        "first_seed": SEED,
        **software(),
    }
    sweep = {"rates": LEARNING_RATES, "chosen_on_seed": SEED + SELECTION_OFFSET}
    results: Results = {}
    total = len(horizons) * (len(trained) + len(BASELINES))
    with progress(total=total, desc="evaluation") as bar:
        for horizon in horizons:
            size: dict[str, Any] = {"num_steps": horizon, "num_seeds": num_seeds, "seed": SEED}

            parts: list[tuple[dict[str, Any], Callable[..., Curves]]] = [
                (
                    weights[name] | steps(name, horizon),
                    partial(evaluate_learned, name, task, *pair),
                )
                for name, pair in trained.items()
            ] + [
                (sweep | {"baseline": name}, partial(evaluate_baseline, name, task))
                for name in BASELINES
            ]
            results[horizon] = []
            for (decides, compute), label in zip(parts, (*trained, *BASELINES), strict=True):
                settings = shared | {"horizon": horizon} | decides
                found = kept(
                    workdir / PARTS, settings, partial(_computed, partial(compute, **size))
                )
                results[horizon].append(_curves(label, found))
                bar.update()
    return results


def _computed(compute: Callable[[], Curves]) -> Arrays:
    """Curves as what ``kept`` keeps."""
    curves = compute()
    arrays: Arrays = {f"test.{name}": values for name, values in curves.test.items()}
    rate = np.nan if curves.learning_rate is None else curves.learning_rate
    return arrays | {"losses": curves.losses, "learning_rate": np.asarray(rate)}


def _curves(name: str, arrays: Arrays) -> Curves:
    rate = float(arrays["learning_rate"])
    test = {n.removeprefix("test."): x for n, x in arrays.items() if n[:5] == "test."}
    return Curves(name, arrays["losses"], None if np.isnan(rate) else rate, test)


def describe(facts: dict[str, Any]) -> str:
    """The task in a line, from ``choices.to_dict``, without what it does not have."""
    values = {k: _in_words(v) for k, v in facts.items() if k != "name" and v not in _NOTHING}
    return f"{facts['name']} ({', '.join(f'{k} {v}' for k, v in values.items())})"


_NOTHING: tuple[Any, ...] = (None, False, "", "none", [], ())


def _in_words(value: Any) -> str:
    if isinstance(value, dict) and "name" in value:
        return describe(value)
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def table(results: Results, facts: dict[str, Any], task: Task, beside: Sequence[str] = ()) -> str:
    """The results as text: means and standard errors of every optimizer at every horizon.

    Under each trained optimizer stand its differences to the baselines, paired by run, and to
    those named in ``beside``, which get none of their own.
    """
    labels = [_label(c) for curves in results.values() for c in curves]
    width = max(map(len, (*labels, *(f"  minus {label}" for label in labels))))
    lines = [f"Task: {describe(facts)}", ""]
    for horizon, curves in results.items():
        seeds = len(curves[0].losses)
        names = list(curves[0].runs)
        heads = "".join(f"  {name:<21}" for name in names)
        lines.append((f"{horizon} inner steps, {seeds} runs".ljust(width) + heads).rstrip())
        for c in curves:
            lines.append(_line(_label(c), width, {n: (estimate(c.runs[n]), False) for n in names}))
            for other in _compared(c, curves, beside):
                found = {n: (d, is_tie(d)) for n, d in difference(c, other).items()}
                lines.append(_line(f"  minus {_label(other)}", width, found))
        lines.append("")
    names = [name for curves in results.values() for c in curves for name in c.test]
    others = [name for name in dict.fromkeys(names) if name in task.score_units]
    said = "".join(f", {name} as {task.score_units[name]}" for name in others)
    tested = (
        "the whole test split after the last step" if names else "none, the task has no `score`"
    )
    note = (
        f"Losses in {task.unit}{said}; mean +- standard error over runs. Final training loss: mean "
        f"of the last tenth of the steps. Test: {tested}. "
        "Differences are paired by run (the same instance, initialization and batches); =: a tie, "
        f"within 2 standard errors. Baselines: best of {len(LEARNING_RATES)} learning rates by "
        "final training loss on as many other runs."
    )
    return "\n".join(lines + textwrap.wrap(note, 100))


def _line(label: str, width: int, values: dict[str, tuple[Estimate, bool]]) -> str:
    cells = []
    for found, tie in values.values():
        error = f" +- {found.error:.2g}" if np.isfinite(found.error) else ""
        cell = f"{found.mean:.4g}{error}{' =' if tie and error else ''}"
        cells.append(f"  {cell:<21}")
    return (label.ljust(width) + "".join(cells)).rstrip()


def _compared(ours: Curves, curves: list[Curves], beside: Sequence[str]) -> list[Curves]:
    """What a trained optimizer is compared with: the baselines, and those named."""
    if ours.learning_rate is not None or ours.name in beside:
        return []
    return [c for c in curves if c.learning_rate is not None or c.name in beside]


def verdict(ours: Curves, others: Sequence[Curves], num_steps: int) -> str:
    """How one optimizer did against others, in a sentence; ties are called ties."""
    broken = int(np.sum(~np.isfinite(ours.runs[FINAL])))
    if broken:
        return (
            f"At {num_steps} inner steps, {ours.name}: it diverges in {broken} of "
            f"{len(ours.losses)} runs."
        )
    said = []
    for measure in (m for m in (FINAL, "test loss") if m in ours.runs):
        words: dict[str, list[str]] = {}
        for other in others:
            words.setdefault(_word(difference(ours, other)[measure]), []).append(other.name)
        found = ", ".join(f"{word} {' and '.join(names)}" for word, names in words.items())
        said.append(f"in {measure} it {found}")
    return f"At {num_steps} inner steps, {ours.name}: {'; '.join(said)}."


def _word(found: Estimate) -> str:
    """Of a difference in loss, less is better."""
    if np.isinf(found.mean):
        return "beats, by not diverging," if found.mean < 0 else "diverges unlike"
    if np.isnan(found.error):
        return "cannot be told, from one run or diverged ones, from"
    return "ties with" if is_tie(found) else "beats" if found.mean < 0 else "loses to"


def verdicts(results: Results, beside: Sequence[str] = ()) -> list[str]:
    """A sentence for every trained optimizer and horizon, after what is wrong with the task."""
    scores = [curves.test for of in results.values() for curves in of]
    broken = [
        f"warning: the test {name} of the task is not finite in any run of any optimizer, so it "
        "tells nothing apart; mend its `score`."
        for name in (scores[0] if scores else ())
        if not any(np.isfinite(score[name]).any() for score in scores)
    ]
    return broken + [
        verdict(c, others, horizon)
        for horizon, curves in results.items()
        for c in curves
        if (others := _compared(c, curves, beside))
    ]


def plot(results: Results, path: Path, facts: dict[str, Any], task: Task) -> None:
    """Median training-loss curve of every optimizer with a band over the middle 80% of runs."""
    figure, axes = plt.subplots(
        1, len(results), figsize=(5.5 * len(results), 4.4), squeeze=False, layout="constrained"
    )
    for axis, (horizon, curves) in zip(axes[0], results.items(), strict=True):
        smooth = max(1, horizon // 100)
        for c in curves:
            losses = np.where(np.isfinite(c.losses), c.losses, np.nan)
            kept = losses[:, : losses.shape[1] // smooth * smooth]
            losses = kept.reshape(len(losses), -1, smooth).mean(axis=2)
            steps = np.arange(losses.shape[1]) * smooth
            low, middle, high = np.nanquantile(losses, [0.1, 0.5, 0.9], axis=0)
            (line,) = axis.plot(steps, middle, label=plain(_label(c)))
            axis.fill_between(steps, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
        axis.set(
            yscale="log",
            xlabel="inner step",
            ylabel=plain(f"training loss ({task.unit})"),
            title=f"horizon {horizon}",
        )
        axis.grid(alpha=0.3, which="both")
        axis.legend(frameon=False, fontsize="small")
    seeds = len(next(iter(results.values()))[0].losses)
    said = f"Task: {describe(facts)}; {seeds} inner runs; line: median, band: middle 80% of runs"
    figure.suptitle(plain("\n".join(textwrap.wrap(said, 75 * len(results)))), fontsize="small")
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=150, format="png")
    plt.close(figure)


def write(
    results: Results,
    workdir: Path,
    facts: dict[str, Any],
    task: Task,
    optimizers: dict[str, Path],
) -> None:
    """Writes ``evaluation.json``: what was compared, every run, and what the table shows.

    Numbers that are not finite are null, and so are units that the task does not say. The kept
    parts have done their service and go.
    """
    units = {f"test {name}": unit for name, unit in task.score_units.items()}
    units |= dict.fromkeys(("mean training loss", FINAL, "test loss"), task.unit)

    def numbers(found: dict[str, Estimate]) -> dict[str, Any]:
        return {
            name: {
                "mean": e.mean,
                "standard_error": e.error,
                "unit": units.get(name),
            }
            for name, e in found.items()
        }

    document = {
        "task": facts,
        "unit": task.unit,
        "optimizers": {name: str(path) for name, path in optimizers.items()},
        "seeds": len(next(iter(results.values()))[0].losses),
        "first_seed": SEED,
        "baselines": {
            "learning_rates_swept": LEARNING_RATES,
            "chosen_by": FINAL,
            "chosen_on_seed": SEED + SELECTION_OFFSET,
        },
        "device": jax.devices()[0].device_kind,
        "results": {
            str(horizon): [
                {
                    "name": c.name,
                    "learning_rate": c.learning_rate,
                    **numbers({name: estimate(runs) for name, runs in c.runs.items()}),
                    "minus": {
                        other.name: numbers(difference(c, other))
                        for other in curves
                        if other is not c
                    },
                    "runs": {name: np.round(runs, 6) for name, runs in c.runs.items()},
                    "losses": np.round(c.losses.astype(np.float64), 6),
                }
                for c in curves
            ]
            for horizon, curves in results.items()
        },
    }
    whole(workdir / "evaluation.json", lambda file: file.write(strict_json.dumps(document)))
    shutil.rmtree(workdir / PARTS, ignore_errors=True)


def _label(curves: Curves) -> str:
    if curves.learning_rate is None:
        return curves.name
    return f"{curves.name}, learning rate {curves.learning_rate:.2g}"
