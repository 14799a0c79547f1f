"""Metrics to ``metrics.jsonl`` and Weights & Biases, progress to the terminal."""

import json
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax

from meta_train import strict_json
from meta_train.journal import Journal, Salvage
from meta_train.progress import progress
from meta_train.wandb_run import WandbRun


class Tracker:
    """Where a job's metrics go. On processes other than the first it does nothing.

    ``metrics.jsonl`` has one row a logged step, each step once, on disk as soon as it is logged:
    on a resume it is cut back to the checkpoint. Offline W&B runs cannot be appended to, so a
    resume starts a new run folder with the same run id, and goes on counting: W&B's own step is
    the outer step, which is logged as ``step`` too.

    Args:
      options: more of ``wandb.init``, such as ``entity``, ``group``, ``tags`` and ``name``.
      mark: of ``metrics.jsonl``, from the checkpoint; see ``Journal``.
    """

    def __init__(
        self,
        workdir: Path,
        *,
        config: Mapping[str, Any],
        run_id: str,
        start_step: int,
        num_steps: int,
        project: str,
        mode: str,
        options: Mapping[str, Any] | None = None,
        mark: dict[str, int] | None = None,
    ):
        self._active = jax.process_index() == 0
        self._began = time.perf_counter()
        if not self._active:
            return
        path = workdir / "metrics.jsonl"
        self._file = Journal(path, mark, lambda data: whole_rows(data, start_step))
        # Of the job, not of this process.
        self._began = time.perf_counter() - (last_row(path).get("time/wall_seconds") or 0.0)
        self._run = None
        if mode != "disabled":
            self._run = WandbRun(
                workdir, mode, project=project, id=run_id, config=dict(config), **(options or {})
            )
        self._bar = progress(total=num_steps, initial=start_step, desc="meta-training", unit="step")

    @property
    def wandb_dir(self) -> str | None:
        """Folder of the W&B run's files; None if disabled."""
        return self._run.folder if self._active and self._run else None

    def log(self, row: Mapping[str, Any]) -> None:
        """Logs one outer step; ``row`` holds ``step``, scalars and ``NAME_histogram``."""
        if not self._active:
            return
        self._file.append(strict_json.dumps(row).encode() + b"\n")
        if self._run:
            self._run.log(row)
        self._bar.set_postfix_str(_beside_the_bar(row), refresh=False)
        self._bar.update(row["step"] - self._bar.n)

    def send(self, what: Callable[[Any, Any], None]) -> None:
        """Has ``what(wandb, run)`` done to the W&B run, after all rows so far."""
        if self._active and self._run:
            self._run.send(what)

    def seconds(self) -> float:
        """Since the job began, without the time between its processes."""
        return time.perf_counter() - self._began

    def mark(self) -> dict[str, int] | None:
        """Of ``metrics.jsonl`` so far, for a checkpoint."""
        return self._file.mark() if self._active else None

    def flush(self) -> str:
        """Writes rows that a full disk kept in memory; says why some still are, or nothing."""
        return self._file.flush() if self._active else ""

    def close(self, seconds: float = 60.0) -> None:
        """Ends the W&B run, waiting for it at most this long."""
        if self._active:
            self._bar.close()
            self._file.close()
            if self._run:
                self._run.finish(seconds)


# Tasks whose losses stand beside the bar.
_TASKS_SHOWN = 4


def _beside_the_bar(row: Mapping[str, Any]) -> str:
    """The meta-loss; on a terminal also that of each task, and an accelerator's memory."""
    said = [f"meta-loss {row['meta_loss']:.4f}"]
    if sys.stderr.isatty():
        losses = {k.partition("/")[2]: v for k, v in row.items() if k.startswith("meta_loss/")}
        said += [f"{name} {loss:.3g}" for name, loss in list(losses.items())[:_TASKS_SHOWN]]
        said += ["..."] if len(losses) > _TASKS_SHOWN else []
        memory = jax.local_devices()[0].memory_stats()  # None on a CPU.
        if memory and "bytes_in_use" in memory:
            said.append(f"{memory['bytes_in_use'] / 2**30:.1f} GiB")
    return ", ".join(said)


def whole_rows(data: bytes, last_step: int) -> Salvage:
    """The rows of a ``metrics.jsonl`` up to a step; whether all before them were whole too."""
    kept: list[bytes] = []
    sound, step = True, 0
    lines = data.split(b"\n")
    for number, line in enumerate(lines):
        row = _row(line)
        if row is None:
            # A killed job tears the last line, and only that.
            sound = sound and number == len(lines) - 1
        elif step < row["step"] <= last_step:
            kept.append(line + b"\n")
            step = row["step"]
    return Salvage(b"".join(kept), sound)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The whole rows of a ``metrics.jsonl``; empty if there is none."""
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    return [row for row in map(_row, lines) if row]


def last_row(path: Path) -> dict[str, Any]:
    """The last whole row of a ``metrics.jsonl``; empty if there is none."""
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return {}
    return next((row for row in map(_row, reversed(lines)) if row), {})


def _row(line: bytes) -> dict[str, Any] | None:
    """A row that has its step and, where it has others, numbers, histograms or null; else None."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(row, dict) or type(row.get("step")) is not int:
        return None
    return row if all(map(_sound, row.values())) else None


def _sound(value: Any) -> bool:
    """Whether it is null, a number or a histogram (see ``launch.leaves``)."""
    if isinstance(value, dict):
        counts = value.get("counts")
        return (
            value.keys() == {"low", "high", "counts"}
            and _is_number(value["low"])
            and _is_number(value["high"])
            and isinstance(counts, list)
            and len(counts) > 0
            and all(type(count) is int for count in counts)
        )
    return value is None or _is_number(value)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)
