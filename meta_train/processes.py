"""Several processes that run one job. The only file that knows of ``jax.distributed``.

Every process runs the same command; the first has the job's folder and is the only one that reads
or writes there. What it finds goes to the others here, and what each has to say to all.
"""

import json
from collections.abc import Callable
from typing import Any, TypeVar, cast

import jax
import numpy as np
from jax.experimental import multihost_utils

from meta_train import strict_json

# Seconds after which a process that sends no sign of life is given up, and the others end.
HEARTBEAT_SECONDS = 60
# Seconds that the processes which are done wait for the last, which may be writing an export.
SHUTDOWN_SECONDS = 300
# Of what a process says to all, bytes; the rest of a longer message is cut off.
_WORDS = 2000
_POSTED = "learned_opt/posted/"

T = TypeVar("T")


class AgreedError(ValueError):
    """A refusal that every process raises, so that all of them end in order."""


def join(
    address: str, count: int, index: int, wait_seconds: int, local_device: int | None = None
) -> None:
    """Makes this process one of ``count``; before anything is computed with JAX.

    Args:
      address: ``host:port`` of the first process.
      count: how many processes there are.
      index: which of them this is, from 0.
      wait_seconds: how long to wait for the others.
      local_device: of an accelerator, the only device of this process; None: all it sees.
    """
    # Its handler would swallow SIGTERM; the train loop has one, and the processes agree there.
    jax.config.update("jax_enable_preemption_service", False)
    jax.distributed.initialize(
        address,
        count,
        index,
        local_device_ids=local_device,
        cluster_detection_method="deactivate",
        initialization_timeout=wait_seconds,
        heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
        shutdown_timeout_seconds=SHUTDOWN_SECONDS,
    )


def count() -> int:
    """How many processes run the job.

    Where none has joined, JAX is not asked: its answer would be its first computation, after which
    the number of CPU devices is fixed.
    """
    return jax.process_count() if jax.distributed.is_initialized() else 1


def several() -> bool:
    """Whether more than one does."""
    return count() > 1


def is_first() -> bool:
    """Whether this is the process with the job's folder; if there is one, it is."""
    return not several() or jax.process_index() == 0


def all_say(words: str) -> list[str]:
    """What each process says, in order; every process must call it."""
    if not several():
        return [words]
    # A letter of several bytes that is cut in two is left out.
    data = words.encode()[:_WORDS].ljust(_WORDS, b"\0")
    said = multihost_utils.process_allgather(np.frombuffer(data, np.uint8))
    return [bytes(row).rstrip(b"\0").decode(errors="ignore") for row in np.asarray(said)]


def post(words: str) -> None:
    """Leaves words where all processes find them, in place of its last ones; waits for none."""
    _board().key_value_set(f"{_POSTED}{jax.process_index()}", words, allow_overwrite=True)


def posted() -> dict[int, str]:
    """What each process posted last; of those that posted."""
    found = _board().key_value_dir_get(_POSTED)
    return dict(sorted((int(key.rpartition("/")[2]), words) for key, words in found))


def _board():
    """JAX's own store; it has no public name."""
    from jax._src import distributed

    return distributed.global_state.client


def together(fn: Callable[[], T]) -> T:
    """``fn()`` of every process, or the ``ValueError`` of those that failed, in all of them.

    Raises:
      ValueError: what one of the processes raised.
    """
    if not several():
        return fn()
    error, result = "", None
    try:
        result = fn()
    except ValueError as found:
        error = str(found) or "refused without a word"
    said = all_say(error)
    if error:
        raise AgreedError(error)
    for index, words in enumerate(said):
        if words:
            raise AgreedError(f"process {index} of {len(said)} refused: {words}")
    return cast(T, result)


def first_does(fn: Callable[[], T]) -> T | None:
    """``fn()`` of the first process, None in the others; what it refuses, all refuse."""
    return together(lambda: fn() if is_first() else None)


def same(**facts: str) -> None:
    """Refuses processes that differ.

    Args:
      facts: what this process has of each.

    Raises:
      AgreedError: naming the fact and the process.
    """
    said = [json.loads(words) for words in all_say(strict_json.dumps(facts))]
    for name, mine in said[0].items():
        for index, theirs in enumerate(said):
            if theirs[name] != mine:
                raise AgreedError(
                    f"process {index} has another {name} than process 0: {theirs[name]}, not "
                    f"{mine}; all must have the same."
                )


def first_says(value: Any) -> Any:
    """The first process's ``value``, anything JSON has; what the others give is ignored."""
    if not several():
        return value
    data = np.frombuffer(strict_json.dumps(value).encode(), np.uint8) if is_first() else None
    size = _from_first(np.array(0 if data is None else data.size, np.int64))
    return json.loads(bytes(_from_first(np.zeros(size, np.uint8) if data is None else data)))


def first_has(tree: Any) -> Any:
    """The first process's arrays to the bit; the others give some of the same shapes and dtypes."""
    if not several():
        return tree
    leaves, structure = jax.tree.flatten(tree)
    # As bytes, since what carries them is a sum, in which -0 is 0.
    found = (_from_first(np.frombuffer(np.ascontiguousarray(x), np.uint8)) for x in leaves)
    shaped = [
        np.frombuffer(bytes(data), x.dtype).reshape(x.shape)
        for data, x in zip(found, leaves, strict=True)
    ]
    return jax.tree.unflatten(structure, shaped)


def _from_first(x: np.ndarray) -> np.ndarray:
    return np.asarray(multihost_utils.broadcast_one_to_all(x))
