"""Signals that ask a job to stop: it finishes its step, saves and ends, or ends without."""

import contextlib
import os
import select
import signal
import threading
import time
from collections.abc import Callable, Iterator

import launch

# A job that a signal stopped after saving; EX_TEMPFAIL, "try again", for schedulers that requeue.
EXIT_PREEMPTED = 75
# After a signal, until the job must have begun to save: schedulers wait 30 seconds or more.
GRACE_SECONDS = 25.0
# Those of schedulers (``--signal=USR1@120`` of SLURM is a warning ahead of time), and Ctrl-C.
_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class StopSignals:
    """Turns SIGTERM, SIGUSR1 and SIGINT into a request to stop after the running step.

    A second SIGINT does what it would without this. While a program compiles, or a step takes
    long, Python hears of no signal; a thread does, and ends the process if the job has not begun
    to save within ``GRACE_SECONDS``: with the exit code of a stopped job, since the newest
    checkpoint is what the same command goes on from.

    Attributes:
      requested: whether there was such a signal.
      newest: returns the outer step of the newest checkpoint on disk; None if there is none.
    """

    def __init__(self) -> None:
        self.requested = False
        self.newest: Callable[[], int | None] = lambda: None

    def __enter__(self) -> "StopSignals":
        self._heard = threading.Event()
        self._previous = {number: signal.signal(number, self._request) for number in _SIGNALS}
        read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._previous_fd = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._watch, args=(read,), daemon=True)
        self._thread.start()
        return self

    def heard(self) -> None:
        """The job has left its loop, and takes as long as it needs to save."""
        self._heard.set()

    def _request(self, number, frame):
        del frame
        if self.requested and number == signal.SIGINT:
            signal.signal(number, self._previous[number])
            signal.raise_signal(signal.SIGINT)
        self.requested = True

    def _watch(self, read: int) -> None:
        """Of the bytes that a signal writes, one each; 0 is the end."""
        deadline, name = None, ""
        while deadline is None or not self._heard.is_set():
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            if not select.select([read], [], [], left)[0]:
                if self._heard.is_set():
                    break
                self._end(name)
            for number in os.read(read, 64):
                if number == 0:
                    os.close(read)
                    return
                if deadline is None and number in _SIGNALS:
                    deadline = time.monotonic() + GRACE_SECONDS
                    name = signal.Signals(number).name
                    _say(f"{name}: the running step is finished, then all is saved.")
        os.close(read)

    def _end(self, name: str) -> None:
        newest = self.newest()
        saved = "Nothing is lost" if newest is None else f"Saved is outer step {newest}"
        _say(
            f"Ended {GRACE_SECONDS:.0f} s after {name}, still compiling or in one step. {saved}; "
            "run again to continue."
        )
        os._exit(EXIT_PREEMPTED)

    def __exit__(self, *exc):
        self._heard.set()
        signal.set_wakeup_fd(self._previous_fd)
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        with contextlib.suppress(OSError):
            os.write(self._write, b"\0")
        self._thread.join()
        os.close(self._write)


@contextlib.contextmanager
def heard_at_once() -> Iterator[None]:
    """Signals end the process, as a command's do, also within one long call into C++."""
    read, write = os.pipe()
    os.set_blocking(write, False)
    previous = signal.set_wakeup_fd(write, warn_on_full_buffer=False)

    def watch():
        while True:
            for number in os.read(read, 64):
                if number in _SIGNALS:
                    launch.end(number, None)
                if number == 0:
                    return

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(previous)
        os.write(write, b"\0")
        thread.join()
        os.close(read)
        os.close(write)


def _say(line: str) -> None:
    """On stderr, past what another thread may hold the lock of."""
    with contextlib.suppress(OSError):
        os.write(2, f"{line}\n".encode())
