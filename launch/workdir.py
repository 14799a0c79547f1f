"""The folder of a job: what it holds, where the job continues."""

import os
import sys
from pathlib import Path
from typing import Any, NamedTuple

from launch import config as cfg
from launch import environment
from launch.choices import to_dict
from meta_train import strict_json
from meta_train.checkpoint import Checkpoints, UnreadableError
from meta_train.journal import unused
from meta_train.progress import remark
from meta_train.tracking import last_row


class JobStart(NamedTuple):
    """Where a job begins or continues.

    Attributes:
      step: outer steps done.
      record: the JSON record of the checkpoint, see ``describe``; empty at the beginning.
      host_state: the train state saved there; None at the beginning.
      unreadable: newer checkpoints that cannot be read, and why.
    """

    step: int
    record: dict[str, Any]
    host_state: Any
    unreadable: dict[int, str]


def describe(
    config: cfg.Config, surroundings: dict[str, Any], run_id: str, **more: Any
) -> dict[str, Any]:
    """The record of the job that every checkpoint holds."""
    return {
        "config": to_dict(config),
        "environment": surroundings,
        "wandb_run_id": run_id,
        **more,
    }


def find_start(workdir: Path, like: Any = None) -> JobStart:
    """The newest checkpoint that can be read; changes nothing.

    Args:
      like: the host state's structure and shapes; None if only the record is wanted.

    Raises:
      ValueError: if there are checkpoints but none that can be read, or none at all beside rows
        of metrics; if a folder is where a job has a file, or a file where it has a folder.
    """
    _check_kinds(workdir)
    beginning = JobStart(0, {}, None, {})
    if not (workdir / "checkpoints").is_dir():
        steps = []
    else:
        checkpoints = Checkpoints(workdir, read_only=True)
        steps = checkpoints.steps
        for step in reversed(steps):
            try:
                record = _checked(checkpoints.job(step), step)
                host_state = None if like is None else checkpoints.restore(step, like)
                _check_step(host_state, step)
            except UnreadableError as error:
                beginning.unreadable[step] = str(error)
                continue
            checkpoints.close()
            return JobStart(step, record, host_state, beginning.unreadable)
        checkpoints.close()
    if steps:
        raise ValueError(
            f"`workdir` {workdir} has no checkpoint that can be read ("
            + "; ".join(beginning.unreadable.values())
            + "). Nothing was changed; give another --workdir to start afresh."
        )
    row = last_row(workdir / "metrics.jsonl")
    if row.get("step", 0) > 0:
        raise ValueError(
            f"`workdir` {workdir} has metrics up to outer step {row['step']} but no checkpoint. "
            "Put its checkpoints/ back, or give another --workdir to start afresh."
        )
    return beginning


_FILES = ("metrics.jsonl", "replay.log", "config.json")
_TRAINED = ("optimizer", "network", "policy")
_FOLDERS = ("checkpoints", *(f"{x}{end}" for x in _TRAINED for end in ("", "_initial", "_best")))


def _check_kinds(workdir: Path) -> None:
    for name in (*_FILES, *_FOLDERS):
        path, kind, other = workdir / name, "file", "folder"
        if name in _FOLDERS:
            kind, other = other, kind
        if path.exists() and path.is_file() != (kind == "file"):
            raise ValueError(
                f"`workdir` {workdir} has a {other} {name}, where a job has a {kind}; move it "
                "away, or give another --workdir."
            )


def _check_step(host_state: Any, step: int) -> None:
    """Raises ``UnreadableError`` if the state is not of the outer step that its folder says."""
    found = getattr(host_state, "step", None)
    if found is not None and int(found) != step:
        raise UnreadableError(
            f"checkpoint {step} holds outer step {int(found)}: its folder was renamed or copied"
        )


def _checked(record: Any, step: int) -> dict[str, Any]:
    """The record of a checkpoint, if it is one: of this version, or of one that wrote less.

    Raises:
      UnreadableError: naming the entry that is of another type.
    """
    record = record if isinstance(record, dict) else {}
    marks = record.get("files", {})
    whole = isinstance(marks, dict) and all(
        isinstance(mark, dict) and all(type(mark.get(k)) is int for k in ("bytes", "crc32"))
        for mark in marks.values()
        if mark is not None  # Of a process that writes no metrics.
    )
    best, surroundings = record.get("best_validation"), record.get("environment")
    right = {
        "config": isinstance(record.get("config"), dict),
        "environment": surroundings is None
        or (
            isinstance(surroundings, dict)
            and all(isinstance(part, dict) for part in surroundings.values())
        ),
        "wandb_run_id": isinstance(record.get("wandb_run_id"), str),
        "nonfinite_steps": type(record.get("nonfinite_steps", 0)) is int,
        "best_validation": best is None or type(best) in (int, float),
        "files": whole,
    }
    for name, fits in right.items():
        if not fits:
            raise UnreadableError(f"checkpoint {step} is damaged: its record has a wrong `{name}`")
    return record


def refuse_contradictions(config: cfg.Config, surroundings: dict[str, Any], workdir: Path) -> None:
    """Raises ``ValueError`` if the job in ``workdir`` is another one; changes nothing."""
    start = find_start(workdir)
    if not start.record:
        return
    if start.step > config.num_steps:
        raise ValueError(
            f"`workdir` {workdir} is at outer step {start.step}, past --cfg.num_steps="
            f"{config.num_steps}. Ask for more steps, or give another --workdir."
        )
    differences = cfg.contradictions(config, start.record["config"])
    settings = environment.contradictions(surroundings, start.record.get("environment"))
    if not differences and not settings:
        return
    advice = []
    if settings:
        advice.append(
            "With those settings the same flags are another computation: set them as they were."
        )
    if any(line.startswith("--cfg.num_steps:") for line in differences):
        advice.append(
            f"The learning rate follows --cfg.meta.schedule={config.meta.schedule} over "
            "--cfg.num_steps, so a job of more steps takes other steps from the start: give "
            f"--cfg.num_steps={start.record['config']['num_steps']} to finish this one, another "
            "--workdir to train anew for as long as you want (from what this one has learned with "
            f"--cfg.init_from={workdir / 'optimizer'}), and --cfg.meta.schedule=constant for a job "
            "that can be extended."
        )
    advice.append("Give the same flags to continue it, or another --workdir to start afresh.")
    raise ValueError(
        f"`workdir` {workdir} holds a job with another configuration:\n  "
        + "\n  ".join([*differences, *settings, *advice])
    )


def begin(workdir: Path, like: Any, surroundings: dict[str, Any]) -> JobStart:
    """Where the job starts, for its owner: says so, and moves unreadable checkpoints aside.

    They are kept in ``workdir/damaged``, so that the job can save those steps again.
    """
    start = find_start(workdir, like)
    for step, problem in start.unreadable.items():
        aside = unused(workdir / "damaged" / str(step))
        aside.parent.mkdir(exist_ok=True)
        os.rename(workdir / "checkpoints" / str(step), aside)
        print(f"warning: {problem}; it is kept in {aside}.", file=sys.stderr)
    if start.record:
        remark(f"Continuing {workdir} at outer step {start.step}.")
        changed = environment.remarks(surroundings, start.record.get("environment"))
        if changed:
            print(
                f"note: since the checkpoint, {', '.join(changed)}; results may round otherwise.",
                file=sys.stderr,
            )
    return start


def checkpoint_steps(workdir: Path) -> list[int]:
    """Outer steps of the checkpoints there are, as the names of their folders say."""
    names = [path.name for path in (workdir / "checkpoints").glob("[0-9]*")]
    return sorted(int(name) for name in names if name.isdigit())


def write_config(workdir: Path, record: dict[str, Any]) -> None:
    """``config.json``, for people: the configuration, and the ``environment``."""
    document = record["config"] | {"environment": record["environment"]}
    temporary = workdir / "config.json.tmp"
    temporary.write_text(strict_json.dumps(document, indent=2) + "\n")
    os.replace(temporary, workdir / "config.json")
