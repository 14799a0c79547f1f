"""A limit for a process of several that lives and does nothing: the others wait for it for ever."""

import contextlib
import os
import sys
import threading
import time
from pathlib import Path
from types import FrameType

import jax

from launch.hosts import this_host
from launch.stopping import EXIT_PREEMPTED
from meta_train import processes

# Seconds for all to say this: when one has ended, the others say that they lost it.
_LAST_WORDS = 5
_ROOT = Path(__file__).parent.parent
_JAX = str(Path(jax.__file__).parent)
_PACKAGES = tuple(str(_ROOT / name) + os.sep for name in ("launch", "learned_opt", "meta_train"))


class StallLimit:
    """Ends this process when the job has stood still for too long, saying where each process is.

    A process that dies is noticed by JAX. One that hangs (in a file system, a debugger, a lock)
    still sends its signs of life, and in the next step all others wait for it. Each of them has
    this limit, so all end, and what started them may start them again.

    Args:
      seconds: without a call of ``moved``; 0: no limit. One process alone waits for none.
    """

    def __init__(self, seconds: float):
        self._seconds = seconds if processes.several() else 0
        self._over = threading.Event()
        self.moved(None)

    def moved(self, step: int | None) -> None:
        """The job is at this outer step, None: not at one yet, and goes on."""
        self._at = step, time.monotonic()

    def __enter__(self) -> "StallLimit":
        if self._seconds:
            self._main = threading.get_ident()
            threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, *exc):
        self._over.set()

    def _watch(self) -> None:
        next_post = 0.0
        # Where the first process is gone there is no store, and JAX ends this one.
        with contextlib.suppress(RuntimeError):
            while not self._over.wait(1):
                now = time.monotonic()
                if now >= next_post:
                    # What the others have of this one when they end is to be recent.
                    processes.post(self._where())
                    next_post = now + min(self._seconds / 5, 10)
                if now - self._at[1] > self._seconds:
                    self._say()
                    # Without the first process JAX ends the others in its own words.
                    words = 2 * _LAST_WORDS if processes.is_first() else _LAST_WORDS
                    if not self._over.wait(words) and time.monotonic() - self._at[1] > words:
                        os._exit(EXIT_PREEMPTED)
                    os.write(2, b"note: the job goes on.\n")

    def _where(self) -> str:
        """The outer step, the line of this library that the job is in, and whether JAX has it."""
        innermost = sys._current_frames()[self._main]
        frame: FrameType | None = innermost
        while frame and not frame.f_code.co_filename.startswith(_PACKAGES):
            frame = frame.f_back
        place = "elsewhere"
        if frame:
            path = Path(frame.f_code.co_filename).relative_to(_ROOT)
            place = f"in {frame.f_code.co_name} ({path}:{frame.f_lineno})"
        if innermost.f_code.co_filename.startswith(_JAX):
            place += ", waiting for JAX"
        step = "before its first step" if self._at[0] is None else f"after outer step {self._at[0]}"
        return f"on {this_host()} is {step} {place}"

    def _say(self) -> None:
        lines = [
            f"error: the job has stood still for {self._seconds:g} s (--stall_seconds), so this "
            "process ends, as all others will. What each said last:",
            *(f"  process {index} {where}" for index, where in processes.posted().items()),
            "Those that wait for JAX may wait for the others: look at the rest. Run the same "
            "command in each again, and the job continues from its last checkpoint; if it was at "
            "work, as in a long evaluation, with a larger --stall_seconds.",
        ]
        os.write(2, "\n".join([*lines, ""]).encode())
