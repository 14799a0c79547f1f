"""Compiled programs that are kept as long as the process has room for them."""

import functools
import gc
import threading
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any

from meta_train.progress import remark

_LIMIT = Path("/proc/sys/vm/max_map_count")
# Of the mappings of memory that Linux gives a process, which programs may take.
SHARE = 0.8


class Pool:
    """What holds compiled programs, by key; made when first asked for, again after it had to go.

    A program takes hundreds or thousands of the 65,530 mappings that a process has by default
    (``vm.max_map_count``), and XLA ends a process that has none left. Those that are made again
    are read from where compiled programs are kept.
    """

    def __init__(self, forget: Callable[[], Any] = gc.collect):
        """Args:
        forget: called after some were dropped, so that nothing else holds them.
        """
        self._forget = forget
        self._held: dict[Hashable, Any] = {}  # The last one asked for is the last.
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._held)

    def get(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """What is held under that key."""
        with self._lock:
            one = self._held.pop(key, None)
            if one is None:
                if crowded() and self._held:
                    _say_crowded()
                    # All are asked for in turn, so the last one is needed last.
                    for last in list(self._held)[-(len(self._held) // 4 + 1) :]:
                        del self._held[last]
                    self._forget()
                one = make()
            self._held[key] = one
            return one


def crowded() -> bool:
    """Whether this process has taken most of the mappings of memory it may have."""
    try:
        taken = Path("/proc/self/maps").read_bytes().count(b"\n")
        return taken > SHARE * int(_LIMIT.read_text())
    except OSError:  # No Linux, and no such limit.
        return False


@functools.cache  # Once in a process.
def _say_crowded() -> None:
    remark(
        "note: the compiled programs do not all fit into the mappings of memory that Linux gives a "
        "process (vm.max_map_count), so some are dropped, and read again when they are needed. "
        "As root, `sysctl -w vm.max_map_count=262144` makes room."
    )
