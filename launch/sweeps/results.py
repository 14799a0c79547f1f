"""What came of a sweep: a score a run, mean and interval a setting; table, CSV and figure."""

import csv
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from launch.evaluation.kept import whole
from launch.sweeps.plan import Run
from meta_train import strict_json
from meta_train.tracking import last_row, read_rows

CONFIDENCE = 0.95


class Setting(NamedTuple):
    """The runs of one setting.

    Attributes:
      values: of the fields that are varied.
      scores: of its runs, NaN where one has none.
      mean: of the runs that have a score; NaN if none has.
      low, high: Student's 95% interval of the mean; NaN for one run.
      diverged: runs that stopped since nothing was finite.
      unfinished: runs that are not done.
    """

    values: dict[str, str]
    scores: list[float]
    mean: float
    low: float
    high: float
    diverged: int
    unfinished: int


def score(folder: Path, metric: str) -> float:
    """Of a run: the last value of ``metric``; of ``meta_loss`` the mean of the last tenth.

    NaN without any.
    """
    rows = [row for row in read_rows(folder / "metrics.jsonl") if row.get(metric) is not None]
    if not rows:
        return math.nan
    if metric != "meta_loss":
        return float(rows[-1][metric])
    late = [row[metric] for row in rows if row["step"] > 0.9 * rows[-1]["step"]]
    return float(np.mean(late))


def metrics(folders: Iterable[Path]) -> list[str]:
    """What may be compared: names of numbers in the last rows of runs."""
    rows = [row for folder in folders if (row := last_row(folder / "metrics.jsonl"))]
    names = {name for row in rows for name, x in row.items() if not isinstance(x, dict)}
    return sorted(names - {"step"})


def summarize(runs: Sequence[Run], folder: Path, metric: str, codes: dict[str, int | None]):
    """The settings in the order of the plan.

    Args:
      codes: run -> exit code, None where it has not ended.
    """
    groups: dict[tuple, list[Run]] = {}
    for run in runs:
        groups.setdefault(tuple(run.values.items()), []).append(run)
    return [_setting(dict(key), group, folder, metric, codes) for key, group in groups.items()]


def _setting(values, runs, folder, metric, codes) -> Setting:
    done = [codes[run.name] == 0 for run in runs]
    scores = [
        score(folder / run.name, metric) if ended else math.nan
        for run, ended in zip(runs, done, strict=True)
    ]
    mean, low, high = interval(np.array(scores))
    diverged = sum(codes[run.name] == 3 for run in runs)
    return Setting(values, scores, mean, low, high, diverged, len(runs) - sum(done) - diverged)


def interval(scores: np.ndarray) -> tuple[float, float, float]:
    """Mean of the finite scores, and Student's interval of it."""
    known = scores[np.isfinite(scores)]
    if not len(known):
        return (math.nan,) * 3
    mean = float(known.mean())
    if len(known) < 2:
        return mean, math.nan, math.nan
    half = stats.t.ppf((1 + CONFIDENCE) / 2, len(known) - 1) * known.std(ddof=1) / len(known) ** 0.5
    return mean, mean - float(half), mean + float(half)


def table(settings: Sequence[Setting], metric: str) -> str:
    """Aligned text, the lowest mean first."""
    names = list(settings[0].values)
    heads = [*(_short(name) for name in names), metric, "95%", "runs", "diverged", "unfinished"]
    ranked = sorted(settings, key=lambda s: math.inf if math.isnan(s.mean) else s.mean)
    rows = [
        [
            *(s.values[name] for name in names),
            _number(s.mean),
            "–" if math.isnan(s.low) else f"[{_number(s.low)}, {_number(s.high)}]",
            str(sum(map(math.isfinite, s.scores))),
            str(s.diverged or ""),
            str(s.unfinished or ""),
        ]
        for s in ranked
    ]
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in [heads, *rows]
    )


def write(runs: Sequence[Run], settings: Sequence[Setting], metric: str, folder: Path) -> None:
    """``sweep.csv``, a line a run, and ``sweep.json``, an entry a setting."""
    scores = [x for setting in settings for x in setting.scores]

    def lines(file):
        writer = csv.writer(file)
        writer.writerow(["index", "run", *runs[0].values, "seed", metric])
        for run, found in zip(runs, scores, strict=True):
            cell = found if math.isfinite(found) else ""
            writer.writerow([run.number, run.name, *run.values.values(), run.seed, cell])

    whole(folder / "sweep.csv", lines, newline="")
    found: dict[str, Any] = {"metric": metric, "settings": [s._asdict() for s in settings]}
    whole(folder / "sweep.json", lambda file: file.write(strict_json.dumps(found, indent=1) + "\n"))


def plot(settings: Sequence[Setting], metric: str, path: Path) -> None:
    """Means with intervals and all runs over the first field; a line a setting of the others."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib.figure import Figure

    from launch.run_report.figures import COLORS
    from launch.studies.shared.plots import STYLE

    first, *others = settings[0].values
    values = list(dict.fromkeys(s.values[first] for s in settings))
    numbers = [_float(value) for value in values]
    numeric = all(map(math.isfinite, numbers)) and len(values) > 1
    if numeric:
        values = [value for _, value in sorted(zip(numbers, values, strict=True))]
    places = {v: _float(v) if numeric else i for i, v in enumerate(values)}
    lines: dict[str, list[Setting]] = {}
    for setting in settings:
        label = ", ".join(f"{_short(name)} {setting.values[name]}" for name in others)
        lines.setdefault(label, []).append(setting)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(6, 4))
        axis = figure.subplots()
        for i, (label, members) in enumerate(lines.items()):
            color = COLORS[i % len(COLORS)]
            members = sorted(members, key=lambda s: places[s.values[first]])
            x = np.array([places[s.values[first]] for s in members], float)
            means = np.array([s.mean for s in members])
            errors = np.array([[s.mean - s.low, s.high - s.mean] for s in members]).T
            axis.errorbar(x, means, np.nan_to_num(errors), color=color, marker="o", capsize=3,
                          label=label or "mean and 95%")  # fmt: skip
            for place, s in zip(x, members, strict=True):
                axis.plot([place] * len(s.scores), s.scores, ".", color=color, alpha=0.4)
        if numeric and min(places.values()) > 0 and max(numbers) > 5 * min(numbers):
            axis.set_xscale("log")
        if not numeric:
            axis.set_xticks(list(places.values()), list(places))
        axis.set(xlabel=first.removeprefix("cfg."), ylabel=metric)
        axis.legend()
        seeds = max(len(s.scores) for s in settings)
        figure.suptitle(f"{len(settings)} settings, {seeds} seeds; dots: runs", fontsize=9)
        temporary = path.with_name(f".{path.name}")
        figure.savefig(temporary, dpi=150, format="png")
        temporary.replace(path)


def _short(name: str) -> str:
    return name.removeprefix("cfg.")


def _float(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def _number(value: float) -> str:
    return f"{value:.4g}" if math.isfinite(value) else "–"
