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


def scores(
    runs: Sequence[Run], folder: Path, metric: str, codes: dict[str, int | None]
) -> list[float]:
    """Of each run; NaN where it is not done or diverged."""
    return [score(folder / r.name, metric) if codes[r.name] == 0 else math.nan for r in runs]


def _setting(values, runs, folder, metric, codes) -> Setting:
    found = scores(runs, folder, metric, codes)
    mean, low, high = interval(np.array(found))
    done, diverged = (sum(codes[run.name] == code for run in runs) for code in (0, 3))
    return Setting(values, found, mean, low, high, diverged, len(runs) - done - diverged)


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
    every = [x for setting in settings for x in setting.scores]

    def lines(file):
        writer = csv.writer(file)
        writer.writerow(["index", "run", *runs[0].values, "seed", metric])
        for run, found in zip(runs, every, strict=True):
            cell = found if math.isfinite(found) else ""
            writer.writerow([run.number, run.name, *run.values.values(), run.seed, cell])

    whole(folder / "sweep.csv", lines, newline="")
    found: dict[str, Any] = {"metric": metric, "settings": [s._asdict() for s in settings]}
    whole(folder / "sweep.json", lambda file: file.write(strict_json.dumps(found, indent=1) + "\n"))


def plot(settings: Sequence[Setting], metric: str, path: Path) -> None:
    """Means with intervals, and all runs.

    Of a grid over the first field, a line a setting of the others; of settings that were drawn or
    searched for over each field beside each other.
    """
    import matplotlib

    matplotlib.use("agg")
    from matplotlib.figure import Figure

    from launch.studies.shared.plots import STYLE

    names = list(settings[0].values)
    grid = len(settings) == math.prod(len({s.values[name] for s in settings}) for name in names)
    shown = names[:1] if grid else names
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(6 if grid else max(6, 3.5 * len(shown)), 4))
        axes = figure.subplots(1, len(shown), sharey=True, squeeze=False)[0]
        for axis, name in zip(axes, shown, strict=True):
            others = [other for other in names if other != name] if grid else []
            _panel(axis, settings, name, others, joined=grid)
        axes[0].set_ylabel(metric)
        if grid:
            axes[0].legend()
        seeds = max(len(s.scores) for s in settings)
        figure.suptitle(
            f"{len(settings)} settings, {seeds} runs of each (dots); mean and 95%", fontsize=9
        )
        temporary = path.with_name(f".{path.name}")
        figure.savefig(temporary, dpi=150, format="png")
        temporary.replace(path)


def _panel(
    axis: Any, settings: Sequence[Setting], name: str, others: Sequence[str], joined: bool
) -> None:
    """Scores over the values of a field; a line, or just a colour, a setting of the others."""
    from launch.run_report.figures import COLORS
    from launch.studies.shared.plots import plain

    values = list(dict.fromkeys(s.values[name] for s in settings))
    numbers = [_float(value) for value in values]
    numeric = all(map(math.isfinite, numbers)) and len(values) > 1
    places = {v: _float(v) if numeric else i for i, v in enumerate(values)}
    lines: dict[str, list[Setting]] = {}
    for setting in settings:
        label = ", ".join(f"{_short(other)} {setting.values[other]}" for other in others)
        lines.setdefault(label, []).append(setting)
    for i, (label, members) in enumerate(lines.items()):
        color = COLORS[i % len(COLORS)]
        members = sorted(members, key=lambda s: places[s.values[name]])
        x = np.array([places[s.values[name]] for s in members], float)
        means = np.array([s.mean for s in members])
        errors = np.array([[s.mean - s.low, s.high - s.mean] for s in members]).T
        style = {"color": color, "marker": "o", "linestyle": "-" if joined else "none"}
        label = plain(label) or "mean and 95%"
        axis.errorbar(x, means, np.nan_to_num(errors), capsize=3, label=label, **style)
        for place, s in zip(x, members, strict=True):
            axis.plot([place] * len(s.scores), s.scores, ".", color=color, alpha=0.4)
    if numeric and min(numbers) > 0 and max(numbers) > 5 * min(numbers):
        axis.set_xscale("log")
    if not numeric:
        axis.set_xticks(list(places.values()), [plain(str(value)) for value in places])
    axis.set_xlabel(_short(name))


def _short(name: str) -> str:
    return name.removeprefix("cfg.")


def _float(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def _number(value: float) -> str:
    return f"{value:.4g}" if math.isfinite(value) else "–"
