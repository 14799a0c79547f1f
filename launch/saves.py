"""Checkpoints of a running job: where the disk is full, training goes on, and that is said."""

import sys
from collections.abc import Callable, Sequence
from typing import Any

from launch.workdir import JobStart
from meta_train.checkpoint import Checkpoints
from meta_train.estimators.hybrid.replay import ReplayLog
from meta_train.tracking import Tracker


class Saves:
    """Saves, and says so once when saving begins to fail and once when it works again.

    A checkpoint is only written when all that was logged before it is on disk.

    Args:
      checkpoints: where to.
      files: what is logged, ``flush()`` of which says why a part is not on disk yet.
      start: where the job began or continues.

    Attributes:
      newest: outer step of the newest checkpoint that is known to be on disk; None if none is.
    """

    def __init__(
        self, checkpoints: Checkpoints, files: Sequence[Tracker | ReplayLog], start: JobStart
    ):
        self._checkpoints, self._files = checkpoints, files
        self.newest = start.step if start.record else None
        self._last: int | None = None  # The step that was saved last, or was to be.
        self._problem = ""

    def save(self, step: int, host_state: Any, record: Callable[[], dict[str, Any]]) -> None:
        """Starts a save; ``record`` makes the checkpoint's record once all files are written."""
        self.wait()
        self._last = step
        behind = next((problem for file in self._files if (problem := file.flush())), "")
        if behind:
            self._report(behind)
        else:
            self._checkpoints.save(step, host_state, record())
            if self._checkpoints.problem:
                self._report(self._checkpoints.problem)

    def wait(self) -> str:
        """Until the last save is on disk; returns why it is not, empty if it is."""
        problem = self._checkpoints.wait()
        if self._last is not None and (problem or self._checkpoints.latest_step == self._last):
            self._report(problem)
        return self._problem

    def close(self) -> str:
        """The same, and ends."""
        self.wait()
        self._checkpoints.close()
        return self._problem

    def _report(self, problem: str) -> None:
        if problem and not self._problem:
            kept = "there is none" if self.newest is None else f"it is of outer step {self.newest}"
            line = (
                f"warning: outer step {self._last} could not be saved ({problem}). Training goes "
                f"on; the newest checkpoint stays ({kept}), and every next one is tried."
            )
            print(line, file=sys.stderr, flush=True)
        elif self._problem and not problem:
            print(f"note: saved again, at outer step {self._last}.", file=sys.stderr, flush=True)
        if not problem:
            self.newest = self._last
        self._problem = problem
