"""From the runs of a suite to tables, claims and files."""

import csv
import json
import re
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from launch.choices import to_dict
from launch.evaluation.aggregates import (
    Interval,
    bootstrap,
    envelope,
    interquartile_mean,
    is_bound,
    paired,
    profile,
    profile_score,
    reached_by,
    smoothed,
    speed_up,
    steps_to,
)
from launch.evaluation.kept import whole
from launch.evaluation.runs import part_edges
from launch.evaluation.suite import COLUMNS, TUNED, Entry
from launch.normalization import normalized, record_of
from launch.zoo import markdown
from meta_train import strict_json
from meta_train.inner import CEILING, FLOOR
from tasks import SPLITS, Split, TaskConfig

# The baseline that speed-ups and targets refer to.
REFERENCE = "adam"
# Who reaches at the end of the horizon what Adam does misses it by the last digit, or does not, so
# the target of the score is where Adam was a little before, and a loss a little above it will do:
# by this share of it and of a hundredth of the constant predictor's, as in ``log_loss``.
TARGET_SHARE, TARGET_SLACK = 0.75, 0.02
# The share of runs from which on a speed-up is shown as a bound: more than the interquartile mean
# leaves out above.
BOUNDS = 0.25
# In log-loss, what counts as worse than the default.
CLEARLY = 0.05
# Characters of a line of text, and of the optimizer's name in a table.
LINE, LABEL = 120, 36
# Splits of tables to paste, and their names there.
SHOWN = {"train": "training", "test": "test"}
RATIOS = np.linspace(1.0, 4.0, 61)


def diverged(entry: Entry) -> np.ndarray:
    """Which runs ended above 3 times the constant predictor's loss, or not finite: ``[seeds]``."""
    loss = np.asarray(entry.scores["train"]["loss"], np.float64)
    with np.errstate(invalid="ignore"):
        return ~(np.isfinite(loss) & (loss <= CEILING * entry.constant))


def _steps(entry: Entry) -> np.ndarray:
    """The step at the end of each part of the curve."""
    return part_edges(entry.horizon)[1:]


def _curve(entry: Entry) -> np.ndarray:
    with np.errstate(invalid="ignore", over="ignore"):
        return np.asarray(entry.curve, np.float64).mean(axis=0)


def summarize(
    entries: Sequence[Entry], tasks: dict[str, TaskConfig], chosen_by: Split = "train"
) -> dict[str, Any]:
    """What the runs come to, as JSON: by horizon, rows of optimizers and paired differences.

    Args:
      entries: from ``SuiteEvaluation.run``.
      tasks: of the suite, by name.
      chosen_by: the split by whose loss settings were chosen.
    """
    # Of each run, so that it is compared with Adam on the same instance and batches.
    envelopes = {
        task: [
            envelope([(_steps(e), smoothed(e.curve[i])) for e in of])
            for i in range(len(of[0].final))
        ]
        for task in tasks
        if (of := [e for e in entries if (e.task, e.optimizer) == (task, REFERENCE) and e.column])
    }
    horizons = sorted({e.horizon for e in entries})
    found = {
        str(h): _at([e for e in entries if e.horizon == h], tasks, envelopes, chosen_by)
        for h in horizons
    }
    return {"tasks": {n: _about(n, c, entries) for n, c in tasks.items()}, "horizons": found}


def _about(name: str, config: TaskConfig, entries: Sequence[Entry]) -> dict[str, Any]:
    constant = next(e.constant for e in entries if e.task == name)
    record = record_of(config)
    return {
        "task": to_dict(config),
        "constant": float(np.mean(constant)),
        "tuned_adam": record and record["adam"],
        "never_finite": _never_finite([e for e in entries if e.task == name]),
    }


def _never_finite(entries: Sequence[Entry]) -> list[str]:
    """Of what no run at all has a finite loss: then it is the task that is broken."""
    found = {f"the {split} split": [e.scores[split]["loss"] for e in entries] for split in SPLITS}
    found["training batches"] = [e.final for e in entries]
    return [what for what, losses in found.items() if not np.isfinite(np.concatenate(losses)).any()]


def _at(entries, tasks: dict[str, TaskConfig], envelopes, chosen_by: Split) -> dict[str, Any]:
    """One horizon."""
    labels = list(dict.fromkeys(e.label for e in entries))
    labels.sort(key=lambda label: bool(_of(entries, label)[0].column))  # Learned ones first.
    times = np.array([_times(entries, label, tasks) for label in labels])
    scores = profile_score(times) if envelopes else np.full(len(labels), np.nan)
    curves = profile(times, RATIOS)
    rows = []
    for label, score, curve in zip(labels, scores, curves, strict=True):
        runs = _of(entries, label)
        row: dict[str, Any] = {"optimizer": runs[0].optimizer, "column": runs[0].column}
        row["label"] = label
        row["settings"] = {e.task: str(e.setting) for e in runs if e.setting}
        row["at_edge"] = [e.task for e in runs if e.edge]
        row["worse_than_less_tuned"] = _worse_than_less_tuned(entries, runs, chosen_by)
        row["below_zero"] = [e.task for e in runs if any(_ends_below_zero(e, s) for s in SPLITS)]
        row["log_loss"] = {s: _interval(_matrix(runs, s)) for s in SPLITS}
        row["normalized"] = {s: _normalized(runs, tasks, s) for s in SPLITS}
        row["diverged"] = int(sum(diverged(e).sum() for e in runs))
        row["runs"] = int(sum(len(e.constant) for e in runs))
        row["speed_up"] = _speed_up(runs, envelopes)
        row["profile"], row["profile_score"] = np.round(curve, 4), float(score)
        row["microseconds_per_step"] = 1e6 * float(np.mean([e.seconds for e in runs]))
        row["state_bytes"] = {e.task: e.state_bytes for e in runs}
        rows.append(row)
    differences = [
        {"ours": ours, "other": other}
        | {
            split: paired(_matrix(_of(entries, ours), split), _matrix(_of(entries, other), split))
            for split in SPLITS
        }
        for ours in labels
        if not _of(entries, ours)[0].column
        for other in labels
        if other != ours
    ]
    return {
        "rows": rows,
        "differences": [
            {k: v._asdict() if isinstance(v, Interval) else v for k, v in d.items()}
            for d in differences
        ],
        "runs": [_runs(e) for e in entries],
    }


def _of(entries: Sequence[Entry], label: str) -> list[Entry]:
    """Of one optimizer, task by task."""
    return [e for e in entries if e.label == label]


def _worse_than_less_tuned(
    entries: Sequence[Entry], runs: Sequence[Entry], split: Split
) -> list[str]:
    """Where a chosen setting does clearly worse than one less chosen, in words.

    Less chosen than what is tuned for a task are the setting for the suite and the default; less
    chosen than the setting for the suite is the default.
    """
    column = runs[0].column
    less = COLUMNS[COLUMNS.index(column) + 1 :] if column else ()
    gaps: dict[str, list[np.ndarray]] = {}
    for e in runs:
        beside = [x for x in entries if (x.task, x.optimizer) == (e.task, e.optimizer)]
        for other in (x for x in beside if x.column in less):
            of = e.task if column == TUNED else "the suite"
            gap = e.log_loss(split) - other.log_loss(split)
            gaps.setdefault(f"on {of} than at its {other.column}", []).append(gap)
    mean = np.mean if column == TUNED else interquartile_mean
    return [words for words, found in gaps.items() if mean(np.stack(found)) > CLEARLY]


def _ends_below_zero(entry: Entry, split: str) -> bool:
    return bool((entry.scores[split]["loss"] < 0).any())


def _matrix(runs: Sequence[Entry], split: str) -> np.ndarray:
    return np.stack([e.log_loss(split) for e in runs])


def _interval(values: np.ndarray) -> dict[str, float]:
    return bootstrap(values)._asdict()


def _normalized(runs, tasks: dict[str, TaskConfig], split: Split) -> dict[str, Any] | None:
    """On the tasks for which tuned Adam's loss is known; None if it is for none."""
    found = []
    for e in runs:
        if (record := record_of(tasks[e.task])) is not None:
            loss = np.asarray(e.scores[split]["loss"], np.float64)
            # Where instances differ, in the units of those that Adam was tuned on.
            loss = loss * (record["constant"] / e.constant)
            scaled = np.asarray(normalized(loss, tasks[e.task], split))
            found.append(np.where(np.isfinite(scaled), np.minimum(scaled, CEILING), CEILING))
    return {**_interval(np.stack(found)), "tasks": len(found)} if found else None


def _speed_up(runs: Sequence[Entry], envelopes) -> dict[str, float] | None:
    """Of each run, from the loss of its last tenth, 0 if it diverged.

    ``bounds`` is the share of runs of which it is only a bound.
    """
    if not envelopes:
        return None
    found, bounds = [], []
    for e in runs:
        # Some diverge past a batch's notice.
        losses = np.where(diverged(e), np.nan, [smoothed(curve)[-1] for curve in e.curve])
        ends = [(loss, *envelopes[e.task][i]) for i, loss in enumerate(losses)]
        found.append([speed_up(loss, e.horizon, *adam) for loss, *adam in ends])
        bounds.append([is_bound(loss, adam) for loss, _, adam in ends])
    return _interval(np.array(found)) | {"bounds": float(np.mean(bounds))}


def _times(entries: Sequence[Entry], label: str, tasks: dict[str, TaskConfig]) -> list[float]:
    """Steps to the target on each task: about what tuned Adam's mean run reaches in
    ``TARGET_SHARE``.

    Infinite where it is missed, or a run diverged.
    """
    found = []
    for task in tasks:
        mine = {e.label: e for e in entries if e.task == task}
        reference = mine.get(f"{REFERENCE} ({TUNED})")
        if reference is None:
            found.append(float("inf"))
            continue
        target = reached_by(TARGET_SHARE * reference.horizon, *_mean_envelope(reference))
        target += TARGET_SLACK * (max(0.0, target) + FLOOR * float(np.mean(reference.constant)))
        missed = diverged(mine[label]).any() or not np.isfinite(target)
        found.append(np.inf if missed else steps_to(target, *_mean_envelope(mine[label])))
    return found


def _mean_envelope(entry: Entry) -> tuple[np.ndarray, np.ndarray]:
    return envelope([(_steps(entry), smoothed(_curve(entry)))])


def _runs(e: Entry) -> dict[str, Any]:
    """What the page and the JSON have of each task and optimizer."""
    thin = max(1, e.curve.shape[1] // 100)
    with np.errstate(invalid="ignore", over="ignore"):
        return {
            "task": e.task,
            "label": e.label,
            "setting": str(e.setting) if e.setting else None,
            "final": [float(f"{x:.6g}") for x in e.final],
            "scores": {
                f"{split} {name}": [float(f"{x:.6g}") for x in values]
                for split, scores in e.scores.items()
                for name, values in scores.items()
            },
            "steps": _steps(e)[thin - 1 :: thin],
            "curve": [float(f"{x:.5g}") for x in _curve(e)[thin - 1 :: thin]],
        }


def claims(summary: dict[str, Any], split: str = "train") -> list[str]:
    """A sentence for every optimizer without a rate and horizon: no claim without its interval.

    It is compared with Adam and with the best baseline of each column; the page has all pairs.
    """
    said = []
    for horizon, found in summary["horizons"].items():
        others = _compared_with(found["rows"], split)
        of_few = any(Interval(**d[split]).of_few for d in found["differences"])
        untold = "differs, on too few tasks for a claim, from" if of_few else "cannot be told from"
        for ours in dict.fromkeys(d["ours"] for d in found["differences"]):
            words: dict[int, list[str]] = {-1: [], 0: [], 1: []}
            for d in found["differences"]:
                if d["ours"] == ours and d["other"] in others:
                    interval = Interval(**d[split])
                    words[interval.sign].append(f"{d['other']} {interval}")
            parts = [
                f"{verb} {', '.join(words[sign])}"
                for sign, verb in ((-1, "is below"), (1, "is above"), (0, untold))
                if words[sign]
            ]
            row = next(row for row in found["rows"] if row["label"] == ours)
            if parts:
                said.append(
                    f"At {horizon} steps, in {split} log-loss, {ours} {'; it '.join(parts)}."
                )
                if row["diverged"]:
                    said[-1] += f" Of its {row['runs']} runs {row['diverged']} diverged."
    return said


def _compared_with(rows: list[dict[str, Any]], split: str) -> set[str]:
    """Adam's rows and the best baseline of each column."""
    ranked = sorted(rows, key=lambda row: row["log_loss"][split]["estimate"])
    best = {row["column"]: row["label"] for row in reversed(ranked) if row["column"]}
    return set(best.values()) | {f"{REFERENCE} ({column})" for column in COLUMNS}


def warnings(summary: dict[str, Any]) -> list[str]:
    """Of settings chosen at the edge of their sweep, where a better one may lie beyond; of settings
    that do worse where they are reported than ones less tuned; of losses below 0; and of tasks on
    which no loss is finite.
    """
    rows = [(h, row) for h, found in summary["horizons"].items() for row in found["rows"]]
    below = dict.fromkeys(task for _, row in rows for task in row["below_zero"])
    said = [
        f"warning: on {task} no run of any optimizer ends with a finite loss on "
        f"{' or '.join(about['never_finite'])}, so it tells nothing apart; mend the task."
        for task, about in summary["tasks"].items()
        if about["never_finite"]
    ]
    said += [
        f"warning: on {task} losses end below 0, where log-loss counts them as 0 and tells nothing "
        "apart; shift the task's loss."
        for task in below
    ]
    for field, words in _DOUBTS.items():
        for horizon, row in rows:
            if row[field]:
                of = words.format(", ".join(row[field]))
                said.append(f"warning: at {horizon} steps, {row['label']}{of}")
    return said


# What a row may say of its tasks, and what that means.
_DOUBTS = {
    "worse_than_less_tuned": " does worse {}; its setting was chosen on other seeds.",
    "at_edge": ": the value chosen is at the edge of its grid ({}); a better one may lie beyond.",
}


def table(summary: dict[str, Any]) -> str:
    """The rows of every horizon, the best first, as lines of at most ``LINE`` characters."""
    heads = ["train log-loss [95%]", "test log-loss [95%]", "speed-up", "score"]
    heads += ["diverged", "us/step", "state"]
    lines = []
    for horizon, found in summary["horizons"].items():
        rows = sorted(found["rows"], key=lambda row: row["log_loss"]["train"]["estimate"])
        lines.append(_line(f"{horizon} steps", heads))
        for row in rows:
            of = [Interval(**row["log_loss"][split]) for split in ("train", "test")]
            intervals = [f"{x.estimate:+.3f} [{x.low:+.2f}, {x.high:+.2f}]" for x in of]
            cells = [*intervals, _fast(row["speed_up"]), _score(row["profile_score"])]
            cells += [f"{row['diverged']}/{row['runs']}", _digits(row["microseconds_per_step"])]
            cells.append(f"{np.mean(list(row['state_bytes'].values())):.0f}")
            lines.append(_line(row["label"], cells))
        lines.append("")
    return "\n".join(lines)


def _fast(speed_up: dict[str, float] | None) -> str:
    if speed_up is None:
        return "-"
    return f"{'>=' if speed_up['bounds'] > BOUNDS else ''}{speed_up['estimate']:.2f}"


def _score(score: float) -> str:
    return f"{score:.2f}" if np.isfinite(score) else "-"


def _digits(number: float) -> str:
    """At least three of them, and no power of ten."""
    return f"{number:.0f}" if number >= 100 else f"{number:.3g}"


def _line(label: str, cells: Sequence[str]) -> str:
    columns = zip(cells, (22, 22, 9, 6, 9, 9, 0), strict=True)
    label = shortened(label, LABEL)
    return f"{label:<{LABEL}} {''.join(f'{cell:<{size}}' for cell, size in columns)}"


def shortened(label: str, width: int) -> str:
    """At most ``width`` characters: of what is longer, the end, which tells paths apart."""
    return label if len(label) <= width else f"…{label[1 - width :]}"


def wrapped(sentence: str) -> str:
    """Lines of at most ``LINE`` characters, all but the first indented, no interval torn apart."""
    whole_intervals = re.sub(r"(\S+) \[(\S+), (\S+)\]", "\\1\xa0[\\2,\xa0\\3]", sentence)
    lines = textwrap.wrap(
        whole_intervals,
        LINE,
        subsequent_indent="    ",
        break_long_words=False,
        break_on_hyphens=False,
    )
    return "\n".join(lines).replace("\xa0", " ")


def replaced(asked: dict[str, Any], path: Path) -> list[str]:
    """What to say if ``path``, a ``suite.json`` to be written anew, is of another evaluation.

    Args:
      asked: what decides this one, as it will be in the file.
    """
    try:
        before = json.loads(path.read_text()).get("asked", {})
    except FileNotFoundError:
        return []
    except (OSError, ValueError, AttributeError):
        before = None
    if not isinstance(before, dict):  # Somebody's own file, or a damaged one.
        before = {}
    if before == json.loads(strict_json.dumps(asked)):
        return []
    said = ", ".join(
        f"{k} {_words(before[k])}" for k in asked if k in before and before[k] != asked[k]
    )
    return [
        f"The suite.* files of another evaluation ({said or 'not known which'}) were replaced; "
        "its runs are kept, so its command writes them again in seconds."
    ]


def _words(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def write_csv(entries: Sequence[Entry], path: Path) -> None:
    """A line for every run."""
    names = sorted({f"{s} {n}" for e in entries for s, x in e.scores.items() for n in x})
    head = ["task", "optimizer", "column", "setting", "horizon", "run", "constant"]

    def write(file):
        writer = csv.writer(file)
        writer.writerow([*head, "final training loss", *names, "diverged"])
        for e in entries:
            broken = diverged(e)
            for i, final in enumerate(e.final):
                values = [e.scores[n.split(" ", 1)[0]].get(n.split(" ", 1)[1]) for n in names]
                known = ["" if v is None else f"{v[i]:.7g}" for v in values]
                about = [e.task, e.optimizer, e.column, e.setting or "", e.horizon, i]
                numbers = [f"{e.constant[i]:.7g}", f"{final:.7g}", *known]
                writer.writerow([*about, *numbers, int(broken[i])])

    whole(path, write, newline="")


def write_markdown(summary: dict[str, Any], path: Path) -> None:
    """A table for every optimizer without a rate, to paste: ``[baseline, horizon x split]``.

    Each entry is the paired difference of log-losses, this optimizer minus the other, and its
    interval.
    """
    heads = [f"{int(h):,} steps, {name}" for h in summary["horizons"] for name in SHOWN.values()]
    tables: dict[str, dict[str, list[str]]] = {}
    for d in (d for found in summary["horizons"].values() for d in found["differences"]):
        row = tables.setdefault(d["ours"], {}).setdefault(d["other"], [d["other"]])
        for split in SHOWN:
            estimate, low, high = map(_short, Interval(**d[split])[:3])
            # No interval is torn apart where a page is narrow.
            row.append(f"{estimate} [{low},\u00a0{high}]")
    texts = [
        markdown([[f"{ours} minus", *heads], *rows.values()]) + "\n"
        for ours, rows in tables.items()
    ]
    whole(path, lambda file: file.write("\n".join(texts)))


def _short(number: float) -> str:
    """With its sign and two decimals, without a zero before the point: ``-.25``."""
    return f"{number:+.2f}".replace("+0.", "+.").replace("-0.", "-.")


def write_json(summary: dict[str, Any], path: Path) -> None:
    """All of it; numbers that are not finite are null."""
    whole(path, lambda file: file.write(strict_json.dumps(summary)))
