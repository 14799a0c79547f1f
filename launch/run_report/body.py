"""The page of ``launch.report``: tables and figures of one job, or of several over each other."""

import html
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from launch.config import flattened
from launch.evaluation.page import document
from launch.run_report import figures
from launch.run_report.behaviour import Behaviour
from launch.run_report.folder import JobFolder

# Per-task and per-leaf figures that are shown at once; more are folded.
SHOWN = 6
# Metrics with a figure of their own, and what their axes say: title, names, axis, legend.
FIGURES: tuple[tuple[str, tuple[str, ...], str, tuple[str, ...]], ...] = (
    ("Meta-loss", ("meta_loss",), "meta-loss, mean of particles", ()),
    (
        "Evaluation of theta",
        ("eval/final_loss", "eval/mean_loss"),
        "loss under theta itself",
        ("last tenth of the steps", "all steps"),
    ),
    ("Evaluation on the validation suite", ("eval/validation",), "log-loss", ()),
    (
        "Meta-gradient",
        ("meta_grad_norm", "meta_grad_spread"),
        "loss per theta",
        ("norm", "spread of particles"),
    ),
    ("Particles not finite", ("nonfinite_count",), "particles in a step", ()),
    ("Learning rate", ("meta_learning_rate",), "meta-optimizer's learning rate", ()),
    ("Speed", ("time/inner_steps_per_second",), "inner steps a second", ()),
    ("Size of theta", ("theta_norm",), "norm of theta", ()),
    ("Size of its steps", ("update_norm",), "norm of an outer step", ()),
)
HISTOGRAMS = (
    ("Entries of theta", "theta_histogram", "value"),
    ("Entries of the meta-gradient", "meta_grad_histogram", "loss per theta"),
)
# Of metrics that say the same of each leaf of theta.
PER_LEAF = {
    "theta_rms": ("Theta, leaf by leaf", "root mean square"),
    "update_rms": ("Outer steps, leaf by leaf", "root mean square of a step"),
    "meta_grad_rms": ("Meta-gradient, leaf by leaf", "loss per theta, root mean square"),
}
# Shown as numbers, or elsewhere.
_NO_FIGURE = {"step", "total_inner_steps", "time/wall_seconds"}


def page(
    jobs: Sequence[JobFolder],
    behaviours: dict[str, Behaviour | str],
    comparisons: dict[str, str],
    written: str,
) -> str:
    """The whole page.

    Args:
      behaviours: job -> what its theta does, or why that is not known.
      comparisons: heading -> table in plain text of a suite's evaluation.
      written: when, in words.
    """
    names = " and ".join(job.name for job in jobs)
    of = "a job" if len(jobs) == 1 else f"{len(jobs)} jobs"
    parts = [
        f"<h1>{_text(names)}</h1>",
        f'<p class="note">{_text(f"Of {of}; written {written}.")}</p>',
        _overview(jobs),
    ]
    with matplotlib.rc_context(figures.style()):
        parts += ["<h2>Meta-training</h2>", _training(jobs)]
        parts += _families(jobs)
        if behaviours and any(job.config.get("trains") == "optimizer" for job in jobs):
            parts += ["<h2>What the learned optimizer does</h2>", *_behaviours(behaviours)]
        parts += ["<h2>Comparison</h2>", *_comparisons(jobs, comparisons)]
    parts += ["<h2>Checkpoints</h2>", _checkpoints(jobs)]
    parts += ["<h2>Configuration</h2>", _configuration([job.config for job in jobs], jobs)]
    parts += ["<h2>Environment</h2>", _configuration([job.environment for job in jobs], jobs)]
    return document(names, "\n".join(parts))


def _overview(jobs: Sequence[JobFolder]) -> str:
    def last(job: JobFolder, name: str) -> str:
        values = job.series(name)[1]
        return _number(values[-1]) if len(values) else "–"

    def final_loss(job: JobFolder) -> str:
        of_tasks = any(name.startswith("eval/final_loss/") for name in job.metric_names())
        return "task by task, below" if of_tasks else last(job, "eval/final_loss")

    def mean_of_late(job: JobFolder) -> str:
        steps, losses = job.series("meta_loss")
        late = losses[steps > 0.9 * job.step]
        return _number(late.mean()) if len(late) else "–"

    def state(job: JobFolder) -> str:
        total = job.config.get("num_steps")
        if not job.rows:
            return "no rows yet"
        if total and job.step >= total:
            return "finished"
        if job.has_ended:
            return "stopped; the same command continues it"
        left, ago = job.seconds_left(), _duration(job.seconds_since_row or 0)
        return f"last row {ago} ago" + (f"; {_duration(left)} left" if left is not None else "")

    def total_nonfinite(job: JobFolder) -> str:
        return f"{np.nansum(job.series('nonfinite_count')[1]):,.0f}" if job.rows else "–"

    def steps(job: JobFolder) -> str:
        return f"{job.step:,} of {job.config.get('num_steps', 0):,}"

    def seconds(job: JobFolder) -> str:
        return _duration(job.last("time/wall_seconds") or 0) if job.rows else "–"

    def inner_steps(job: JobFolder) -> str:
        found = job.last("total_inner_steps")
        return "–" if found is None else f"{found:,.0f}"

    columns = {
        "outer steps": steps,
        "state": state,
        "meta-loss, mean of the last tenth": mean_of_late,
        "final loss under theta": final_loss,
        "validation": lambda job: last(job, "eval/validation"),
        "not finite, in logged steps": total_nonfinite,
        "inner steps a second": lambda job: last(job, "time/inner_steps_per_second"),
        "inner steps": inner_steps,
        "time": seconds,
    }
    rows = [[name, *(show(job) for job in jobs)] for name, show in columns.items()]
    return _table(["job", *(job.name for job in jobs)], rows)


def _training(jobs: Sequence[JobFolder]) -> str:
    drawn = [
        (title, figures.curves(jobs, names, ylabel, legend))
        for title, names, ylabel, legend in FIGURES
    ]
    drawn += [(title, figures.histograms(jobs, *rest)) for title, *rest in HISTOGRAMS]
    return _grid(drawn)


def images(job: JobFolder, folder: Path) -> dict[str, Path]:
    """The figures of meta-training as PNG files in ``folder``: their names to their paths."""
    found: dict[str, Path] = {}
    with matplotlib.rc_context(figures.style()):
        drawn = [
            (title, figures.curves([job], names, ylabel, legend))
            for title, names, ylabel, legend in FIGURES
        ]
        for title, figure in drawn:
            if figure:
                name = f"curves/{title.lower().replace(' ', '_')}"
                found[name] = folder / f"{len(found)}.png"
                figure.savefig(found[name], dpi=150)
    return found


def _families(jobs: Sequence[JobFolder]) -> list[str]:
    """Of metrics of tasks and of leaves, and of those that an estimator adds."""
    known = {name for _, names, *_ in FIGURES for name in names} | _NO_FIGURE
    known |= {name for _, name, _ in HISTOGRAMS}
    names = [n for job in jobs for n in job.metric_names() if n not in known]
    names = [name for name in dict.fromkeys(names) if _is_number(jobs, name)]
    families: dict[str, list[str]] = {}
    for name in names:
        base, slash, _ = name.rpartition("/") if name.startswith("eval/") else name.partition("/")
        families.setdefault(base if slash else "", []).append(name)
    found = []
    for base, members in families.items():
        if base in PER_LEAF:
            title, ylabel = PER_LEAF[base]
            legend = [name.partition("/")[2] for name in members]
            drawn = [
                (title if len(jobs) == 1 else f"{title}: {job.name}",
                 figures.curves([job], members, ylabel, legend))
                for job in jobs
            ]  # fmt: skip
            found.append(_grid(drawn))
            continue
        drawn = [(name, figures.curves(jobs, [name], name.partition("/")[0])) for name in members]
        heading = {"": "Other metrics", "eval": "Other evaluations"}.get(base, f"{base}, by task")
        found.append(_folded(heading, _grid(drawn), len(members) > SHOWN or not base))
    return found


def _is_number(jobs: Sequence[JobFolder], name: str) -> bool:
    values = [row[name] for job in jobs for row in job.rows if name in row]
    return any(isinstance(value, int | float) for value in values)


def _behaviours(behaviours: dict[str, Behaviour | str]) -> Iterable[str]:
    yield (
        '<p class="note">One inner run of theta at the newest checkpoint: the root mean square of '
        "each layer's gradient and update, before each step.</p>"
    )
    for name, found in behaviours.items():
        heading = f"<h3>{_text(name)}</h3>" if len(behaviours) > 1 else ""
        if isinstance(found, str):
            yield f'{heading}<p class="note">{_text(found)}</p>'
            continue
        said = (
            f"Outer step {found.step:,}; task {found.task}; {len(found.losses):,} inner steps; "
            f"training loss {_number(found.losses[0])} to {_number(found.losses[-1])}."
        )
        pictures = figures.behaviour(found)
        yield f'{heading}<p class="note">{_text(said)}</p>{_grid(list(pictures.items()))}'


def _comparisons(jobs: Sequence[JobFolder], suites: dict[str, str]) -> Iterable[str]:
    if not any(job.evaluations for job in jobs):
        yield (
            '<p class="note">Not evaluated yet: python -m launch.evaluate writes into a folder '
            "of the job, and the next report shows it.</p>"
        )
    for job in jobs:
        for path, found in job.evaluations.items():
            if "results" not in found:
                continue
            yield f"<h3>{_text(f'{job.name}/{path}')}</h3>"
            yield f'<p class="note">{_text(_facts(found))}</p>'
            drawn = [
                (f"{int(horizon):,} inner steps", figures.comparison(found, horizon))
                for horizon in found["results"]
            ]
            yield _grid(drawn) + _scores(found)
    for heading, text in suites.items():
        yield f'<h3>{_text(heading)}</h3><div class="scroll"><pre>{_text(text)}</pre></div>'


def _facts(found: dict[str, Any]) -> str:
    facts = ", ".join(f"{key} {value}" for key, value in found["task"].items())
    return (
        f"Task: {facts}; {found['seeds']} runs; lines are medians; mean +- standard error. "
        "Baselines at their best learning rate, chosen on other runs."
    )


def _scores(found: dict[str, Any]) -> str:
    rows = []
    for horizon, lines in found["results"].items():
        for line in lines:
            scores = {k: v for k, v in line.items() if isinstance(v, dict) and "mean" in v}
            cells = [
                f"{_number(v['mean'])} +- {_number(v['standard_error'])}" for v in scores.values()
            ]
            rows.append([line["name"], f"{int(horizon):,}", *cells])
            heads = ["optimizer", "inner steps", *scores]
    return _table(heads, rows)


def _checkpoints(jobs: Sequence[JobFolder]) -> str:
    rows = [
        [job.name, f"{found.step:,}", f"{found.size / 2**20:.2f} MiB", found.written]
        for job in jobs
        for found in job.checkpoints
    ]
    return _table(["job", "outer step", "size", "written"], rows) if rows else "<p>None yet.</p>"


def _configuration(trees: Sequence[dict[str, Any]], jobs: Sequence[JobFolder]) -> str:
    """What differs between the jobs, and all of it folded."""
    flat = [flattened(tree) for tree in trees]
    names = list(dict.fromkeys(name for tree in flat for name in tree))
    differing = [n for n in names if len({repr(tree.get(n)) for tree in flat}) > 1]
    heads = ["", *(job.name for job in jobs)]

    def rows(of: Sequence[str]) -> list[list[str]]:
        return [[name, *(str(tree.get(name, "–")) for tree in flat)] for name in of]

    whole = _folded("All of it", _table(heads, rows(names), "wrapped"), True)
    if len(trees) == 1:
        return whole
    differences = "<p>The same in all.</p>"
    if differing:
        differences = _table(heads, rows(differing), "wrapped")
    return f"{differences}{whole}"


def _folded(heading: str, inside: str, folded: bool) -> str:
    if not folded:
        return f"<h3>{_text(heading)}</h3>{inside}"
    return f"<details><summary>{_text(heading)}</summary>{inside}</details>"


def _grid(drawn: Sequence[tuple[str, Figure | None]]) -> str:
    shown = [
        f"<figure><figcaption>{_text(title)}</figcaption>{figures.svg(figure)}</figure>"
        for title, figure in drawn
        if figure
    ]
    return f'<div class="figures">{"".join(shown)}</div>'


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]], style: str = "") -> str:
    top = "".join(f"<th>{_text(head)}</th>" for head in heads)
    body = "".join(f"<tr>{''.join(f'<td>{_text(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return (
        f'<div class="scroll"><table class="plain {style}"><thead><tr>{top}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _text(words: Any) -> str:
    return html.escape(str(words))


def _number(value: float | None) -> str:
    return "–" if value is None or not math.isfinite(value) else f"{value:,.4g}"


def _duration(seconds: float) -> str:
    whole = round(max(0.0, seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
