"""Metrics to ``metrics.jsonl`` and Weights & Biases, progress to the terminal."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import wandb
from tqdm import tqdm

from meta_train import strict_json


def wandb_mode(requested: str) -> Any:
    """``online``, ``offline`` or ``disabled``; ``auto`` is online only for who is logged in."""
    if requested != "auto":
        return requested
    if "WANDB_MODE" in os.environ:
        return os.environ["WANDB_MODE"]
    return "online" if wandb.login(prompt=False) else "offline"


class Tracker:
    """Where a job's metrics go. On processes other than the first it does nothing.

    ``metrics.jsonl`` has one row a logged step, each step once: on a resume it is cut back
    to the checkpoint. Offline W&B runs cannot be appended to, so a resume starts a new run
    folder with the same run id; the outer step is logged as ``step``, its x axis.

    Attributes:
      wall_seconds: the job's up to its last kept row.
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
        progress: bool = True,
    ):
        self._active = jax.process_index() == 0
        self.wall_seconds = 0.0
        if not self._active:
            return
        self._file, last_row = _open_cut_back(workdir / "metrics.jsonl", start_step)
        self.wall_seconds = last_row.get("time/wall_seconds", 0.0)
        self._run = wandb.init(
            project=project,
            id=run_id,
            name=workdir.absolute().name,
            dir=str(workdir.absolute()),
            config=dict(config),
            mode=wandb_mode(mode),
            resume="allow",
            settings=wandb.Settings(silent=True),
        )
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")
        self._bar = tqdm(
            total=num_steps,
            initial=start_step,
            desc="meta-training",
            unit="step",
            disable=not progress,
            mininterval=0.5,
            dynamic_ncols=True,
        )

    @property
    def wandb_dir(self) -> str | None:
        """Folder of the W&B run's files; None if disabled."""
        return str(Path(self._run.dir).parent) if self._active and self._run.dir else None

    def log(self, row: Mapping[str, float]) -> None:
        """Logs one outer step; ``row`` holds ``step`` and scalars."""
        if not self._active:
            return
        self._file.write(strict_json.dumps(row) + "\n")
        self._run.log(dict(row))
        self._bar.set_postfix_str(f"meta-loss {row['meta_loss']:.4f}", refresh=False)
        self._bar.update(row["step"] - self._bar.n)

    def flush(self) -> None:
        """Hands every row so far to the operating system, so a killed job keeps it."""
        if self._active:
            self._file.flush()

    def close(self) -> None:
        """Flushes and ends the W&B run."""
        if self._active:
            self._bar.close()
            self._file.close()
            self._run.finish()


def _open_cut_back(path: Path, start_step: int):
    """Opens ``path`` for appending, without rows past ``start_step`` or a torn last line."""
    last: dict[str, Any] = {}
    if path.exists():
        kept = []
        with path.open() as file:
            for line in file:
                try:
                    row = json.loads(line)
                except json.JSONDecodeError:  # The line a killed job was writing.
                    break
                if row["step"] > start_step:
                    break
                kept.append(line)
                last = row
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(kept))
        os.replace(temporary, path)
    return path.open("a"), last
