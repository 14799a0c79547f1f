"""Steps whose metrics the devices may still be computing, and the time they took."""

import collections
import contextlib
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax


class Finished(NamedTuple):
    """A step that is done: its metrics, and when it was, in seconds of the loop's own clock."""

    step: int
    metrics: dict[str, Any]
    seconds: float


class Pending:
    """Steps in the order they were started.

    The clock starts at 0 and stands still in ``apart``, so that differences of ``seconds`` are
    the time of steps alone, without evaluations and checkpoints.

    Args:
      limit: unfinished steps there may be when another is started; ``devices.max_in_flight``.
    """

    def __init__(self, limit: int):
        self._limit = limit
        self._began = time.perf_counter()
        self._working: collections.deque = collections.deque()
        self._finished: collections.deque = collections.deque()

    def wait_for_room(self) -> None:
        """Waits for the oldest step if there are too many."""
        if len(self._working) > self._limit:
            self._wait()

    def add(self, step: int, metrics: dict[str, Any]) -> None:
        """A step that was started."""
        self._working.append((step, metrics))

    @contextlib.contextmanager
    def apart(self) -> Iterator[None]:
        """Waits for all steps; what is done inside does not count as their time."""
        while self._working:
            self._wait()
        stopped = time.perf_counter()
        try:
            yield
        finally:
            self._began += time.perf_counter() - stopped

    def take(self) -> Iterator[Finished]:
        """Those that were waited for, oldest first, once each."""
        while self._finished:
            yield self._finished.popleft()

    def _wait(self) -> None:
        step, metrics = self._working.popleft()
        jax.block_until_ready(metrics)
        self._finished.append(Finished(step, metrics, time.perf_counter() - self._began))
