"""Metrics to ``metrics.jsonl`` and Weights & Biases, progress to the terminal."""

import json
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import wandb

from meta_train import strict_json
from meta_train.journal import Journal, Salvage
from meta_train.progress import progress


def wandb_mode(requested: str) -> Any:
    """``online``, ``offline`` or ``disabled``; ``auto`` is online only for who is logged in."""
    if requested != "auto":
        return requested
    if os.environ.get("WANDB_MODE"):
        return os.environ["WANDB_MODE"]
    return "online" if wandb.login(prompt=False) else "offline"


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
        # A service of the job's own: one inherited from whoever started it outlives a killed
        # job, whose run id is then still in use when the job is started again.
        os.environ.pop("WANDB_SERVICE", None)
        self._run = wandb.init(
            project=project,
            id=run_id,
            dir=str(workdir.absolute()),
            config=dict(config),
            mode=wandb_mode(mode),
            resume="allow",
            settings=wandb.Settings(silent=True),
            **{"name": workdir.absolute().name} | dict(options or {}),
        )
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")
        self._bar = progress(total=num_steps, initial=start_step, desc="meta-training", unit="step")

    @property
    def wandb_dir(self) -> str | None:
        """Folder of the W&B run's files; None if disabled."""
        if not self._active or self._run.disabled:
            return None
        return str(Path(self._run.dir).parent)

    def log(self, row: Mapping[str, Any]) -> None:
        """Logs one outer step; ``row`` holds ``step``, scalars and ``NAME_histogram``."""
        if not self._active:
            return
        self._file.append(strict_json.dumps(row).encode() + b"\n")
        shown = {name: _for_wandb(name, value) for name, value in row.items()}
        self._run.log(shown, step=int(row["step"]))
        self._bar.set_postfix_str(_beside_the_bar(row), refresh=False)
        self._bar.update(row["step"] - self._bar.n)

    def media(
        self,
        step: int,
        images: Mapping[str, Path],
        tables: Mapping[str, tuple[list[Any], list[list[Any]]]],
    ) -> None:
        """Adds to the last row of the W&B run.

        Args:
          step: of that row.
          images: PNG files, which may go when this returns, by their names there.
          tables: columns and rows.
        """
        if self._active:
            found: dict[str, Any] = {name: wandb.Image(str(path)) for name, path in images.items()}
            found |= {name: wandb.Table(columns=c, data=rows) for name, (c, rows) in tables.items()}
            self._run.log(found, step=step)

    def artifact(
        self, folder: Path, *, name: str, kind: str, description: str, metadata: dict[str, Any]
    ) -> None:
        """A folder to the W&B run, as an artifact."""
        if not self._active:
            return
        found = wandb.Artifact(name, type=kind, description=description, metadata=metadata)
        for path in sorted(folder.iterdir()):  # Without the line that `add_dir` prints.
            found.add_file(str(path))
        self._run.log_artifact(found)

    def seconds(self) -> float:
        """Since the job began, without the time between its processes."""
        return time.perf_counter() - self._began

    def mark(self) -> dict[str, int] | None:
        """Of ``metrics.jsonl`` so far, for a checkpoint."""
        return self._file.mark() if self._active else None

    def close(self) -> None:
        """Ends the W&B run."""
        if self._active:
            self._bar.close()
            self._file.close()
            self._run.finish()


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


def _for_wandb(name: str, value: Any) -> Any:
    if value is None or not name.endswith("_histogram"):
        return value
    edges = np.linspace(value["low"], value["high"], len(value["counts"]) + 1)
    return wandb.Histogram(np_histogram=(value["counts"], edges))


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
    try:
        row = json.loads(line)
    except ValueError:
        return None
    if isinstance(row, dict) and isinstance(row.get("step"), int):
        return row
    return None
