"""Losses of different tasks on one scale: 1 is a constant prediction, 0 is tuned Adam.

Adam's losses are in ``tuned_adam.json``, found by ``python -m launch.tuned_adam``.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.choices import to_dict

if TYPE_CHECKING:
    from tasks import Split, TaskConfig

FILE = Path(__file__).with_name("tuned_adam.json")


@functools.cache
def records() -> dict[str, dict[str, Any]]:
    """By the task's name in the zoo: what ``launch.tuned_adam`` found, with its settings."""
    return json.loads(FILE.read_text()) if FILE.is_file() else {}


def record_of(config: TaskConfig) -> dict[str, Any] | None:
    """What was found for exactly this task; None if it was not run, or has changed since.

    A task in other units (``reparametrized``) or with smaller batches has the scale of its base.
    """
    wanted = json.loads(json.dumps(to_dict(config.unwrapped), allow_nan=False))
    return next((found for found in records().values() if found["task"] == wanted), None)


def normalized(loss: Any, config: TaskConfig, split: Split = "train") -> Any:
    """``(loss - Adam's) / (constant's - Adam's)``: below 0 is better than tuned Adam.

    Args:
      loss: on the split, a number or an array.
      config: the task.
      split: Adam's rate is the best for it.

    Raises:
      ValueError: if Adam was not run on the task, with the command that does.
    """
    found = record_of(config)
    if found is None:
        raise ValueError(
            "`config` must be a task of the zoo for which tuned Adam's loss is in "
            f"{FILE.name}, got {config}; find it with `python -m launch.tuned_adam NAME`."
        )
    adam = found["adam"][split]["loss"]
    return (loss - adam) / (found["constant"] - adam)
