"""What the folder of a job says of it, read while another process may be writing there."""

import datetime
import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np


class CheckpointFile(NamedTuple):
    """A whole checkpoint: its outer step, bytes on disk and when it was written."""

    step: int
    size: int
    written: str


class JobFolder(NamedTuple):
    """A job, as its folder has it.

    Attributes:
      name: what the page calls it.
      path: the folder.
      rows: of ``metrics.jsonl``, oldest first.
      damaged_lines: of ``metrics.jsonl``, not among ``rows``; a last one may be being written.
      config: the resolved configuration, as JSON; empty if the job has not written it yet.
      environment: what the numbers follow from besides.
      checkpoints: oldest first.
      evaluations: ``evaluation.json`` and ``suite.json`` found below the folder, by their path.
      seconds_since_row: how long ago the last row was written; None without one.
      has_ended: whether the process that wrote it last has ended by itself, as its lock says.
    """

    name: str
    path: Path
    rows: list[dict[str, Any]]
    damaged_lines: int
    config: dict[str, Any]
    environment: dict[str, Any]
    checkpoints: list[CheckpointFile]
    evaluations: dict[str, dict[str, Any]]
    seconds_since_row: float | None
    has_ended: bool = False

    @property
    def step(self) -> int:
        """Outer steps done, by the last row."""
        return self.rows[-1]["step"] if self.rows else 0

    def metric_names(self) -> list[str]:
        """Of all rows, in the order they come up."""
        return list(dict.fromkeys(name for row in self.rows for name in row))

    def series(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Outer steps and values of a metric, ``[points]`` each; null is NaN."""
        found = [(row["step"], row[name]) for row in self.rows if name in row]
        pairs = np.array([(step, _number(value)) for step, value in found], np.float64)
        return (pairs[:, 0], pairs[:, 1]) if len(pairs) else (np.zeros(0), np.zeros(0))

    def last(self, name: str) -> float | None:
        """The last value of a metric that is a number."""
        values = self.series(name)[1]
        numbers = values[np.isfinite(values)]
        return float(numbers[-1]) if len(numbers) else None

    def seconds_left(self) -> float | None:
        """Until the last outer step, at the pace of the last quarter of the rows."""
        steps, seconds = self.series("time/wall_seconds")
        known = np.isfinite(seconds)
        late = slice(-max(2, len(self.rows) // 4), None)
        steps, seconds = steps[known][late], seconds[known][late]
        if len(steps) < 2 or steps[-1] <= steps[0] or "num_steps" not in self.config:
            return None
        pace = (seconds[-1] - seconds[0]) / (steps[-1] - steps[0])
        return (self.config["num_steps"] - self.step) * float(pace)


def check(path: Path) -> None:
    """Looks whether there is a job; imports nothing slow.

    Raises:
      ValueError: if there is none.
    """
    if path.exists() and not path.is_dir():
        raise ValueError(f"--workdir must be the folder of a job, got {str(path)!r}, a file.")
    if (path / "metrics.jsonl").exists():
        return
    if (path / "sweep.csv").exists():
        raise ValueError(
            f"--workdir={path} is the folder of a sweep, which has its own sweep.png; give folders "
            "of runs inside it."
        )
    if not (path / "config.json").exists():
        raise ValueError(
            f"--workdir must be the folder of a job, got {str(path)!r}, which has neither "
            "config.json nor metrics.jsonl; give the --workdir that launch.train was given."
        )


def read(path: Path, name: str, now: float) -> JobFolder:
    """Reads the folder; changes nothing.

    Args:
      now: seconds since the epoch.

    Raises:
      ValueError: as ``check``.
    """
    from meta_train.tracking import read_rows

    check(path)
    metrics, config_file = path / "metrics.jsonl", path / "config.json"
    config = _json(config_file) or {}
    environment = config.pop("environment", {})
    age = now - metrics.stat().st_mtime if metrics.exists() else None
    rows = read_rows(metrics)
    lines = metrics.read_bytes().count(b"\n") if metrics.exists() else 0
    return JobFolder(
        name, path, rows, max(0, lines - len(rows)), config, environment,
        _checkpoints(path), _evaluations(path),
        age if rows else None, bool((_json(path / "lock") or {}).get("released")),
    )  # fmt: skip


def _number(value: Any) -> float:
    """NaN of what is none, as in a row that somebody wrote."""
    return float(value) if type(value) in (int, float) else math.nan


def _checkpoints(path: Path) -> list[CheckpointFile]:
    found = []
    for folder in (path / "checkpoints").glob("[0-9]*"):
        if not folder.name.isdecimal():
            continue  # Being written.
        try:
            size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
            written = datetime.datetime.fromtimestamp(folder.stat().st_mtime)
        except FileNotFoundError:
            continue  # Just deleted, as newer ones came.
        found.append(CheckpointFile(int(folder.name), size, f"{written:%Y-%m-%d %H:%M:%S}"))
    return sorted(found)


def _evaluations(path: Path) -> dict[str, dict[str, Any]]:
    files = [
        file
        for name in ("evaluation.json", "suite.json")
        for pattern in (name, f"*/{name}")
        for file in sorted(path.glob(pattern))
    ]
    found = {file.relative_to(path).as_posix(): _json(file) for file in files}
    return {name: document for name, document in found.items() if document}


def _json(path: Path) -> dict[str, Any] | None:
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return None  # Not there, or not yet.
