"""Compiled programs that are kept as long as the process has room for them."""

import gc
import threading
from collections.abc import Callable, Hashable
from pathlib import Path

from launch.evaluation.runs import Runner

# Of the mappings of memory that Linux gives a process, which programs may take.
SHARE = 0.8


class Pool:
    """Runners by key, made when first asked for and again after they had to go.

    A runner's programs take hundreds of the 65,530 mappings that a process has by default; those
    that are made again are read from where compiled programs are kept.
    """

    def __init__(self):
        self._runners: dict[Hashable, Runner] = {}  # The last one asked for is the last.
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._runners)

    def get(self, key: Hashable, make: Callable[[], Runner]) -> Runner:
        """The runner of that key."""
        with self._lock:
            runner = self._runners.pop(key, None)
            if runner is None:
                if crowded():
                    # All are asked for in turn, so the last one is needed last.
                    for last in list(self._runners)[-(len(self._runners) // 4 + 1) :]:
                        del self._runners[last]
                    gc.collect()
                runner = make()
            self._runners[key] = runner
            return runner


def crowded() -> bool:
    """Whether this process has taken most of the mappings of memory it may have."""
    try:
        taken = Path("/proc/self/maps").read_bytes().count(b"\n")
        return taken > SHARE * int(Path("/proc/sys/vm/max_map_count").read_text())
    except OSError:  # No Linux, and no such limit.
        return False
