"""The weights from a log of what the workers told each other, without evaluating a loss.

An in-between step of Hybrid-ES is a few seeds and costs, so a log of messages is a small
record of a whole run: from any saved state it gives the weights after every later step, bit
for bit. (The population is not rebuilt; a job continues from a checkpoint.)
"""

import contextlib
import io
import mmap
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from meta_train.estimators.base import GradientEstimator
from meta_train.estimators.hybrid.messages import Message
from meta_train.journal import Journal, Salvage
from meta_train.trainer import TrainState, meta_update


class ReplayLog:
    """Messages appended to a file, each in one write: a killed job tears the last at most.

    A record is a run of ``.npy`` arrays: int64 ``[format, step, refreshed, searched, arrays, size,
    crc32, own]``, then as many arrays: the leaves of ``Message.gradient`` if refreshed, of
    ``Message.costs`` if searched. They take ``size`` bytes with this ``crc32``; ``own`` is that of
    the numbers before it, so that a damaged size is no torn record. On a resume the log is cut
    back to the checkpoint.

    Args:
      mark: of the log, from the checkpoint; see ``Journal``.
    """

    def __init__(self, path: Path, start_step: int, mark: dict[str, int] | None = None):
        def salvage(data: bytes) -> Salvage:
            ends, sound = [(0, 0)], True
            try:
                ends += [(r.step, r.end) for r in _records(io.BytesIO(data))]
            except _DamagedError as damaged:
                ends += [(r.step, r.end) for r in _records(io.BytesIO(data[: damaged.args[0]]))]
                sound = False
            kept = max(end for step, end in ends if step <= start_step)
            # A killed job tears the last record, and only that, after the checkpoint.
            return Salvage(data[:kept], sound and (ends[-1][0] >= start_step or not data))

        self._file = Journal(path, mark, salvage)

    def append(self, step: int, message: Message) -> None:
        """Writes the message of outer step ``step``, counted from 1; a killed job keeps it."""
        parts = ((message.refreshed, message.gradient), (message.searched, message.costs))
        arrays = [np.asarray(x) for sent, part in parts if sent for x in jax.tree.leaves(part)]
        body = b"".join(map(_saved, arrays))
        numbers = [_FORMAT, step, int(message.refreshed), int(message.searched), len(arrays)]
        numbers += [len(body), zlib.crc32(body)]
        self._file.append(_saved(np.array([*numbers, _own(numbers)], np.int64)) + body)

    def flush(self) -> str:
        """Writes what a full disk kept in memory; says why a part still is, or nothing."""
        return self._file.flush()

    def mark(self) -> dict[str, int]:
        """Of the log so far, for a checkpoint."""
        return self._file.mark()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


class _Record(NamedTuple):
    step: int
    refreshed: bool
    searched: bool
    arrays: list[np.ndarray]
    end: int  # Position in the file after it, bytes.


def _records(file: Any) -> Iterator[_Record]:
    """The whole records; a torn last one is left out.

    Args:
      file: no real file, of which NumPy does not say whether it ended too early.

    Raises:
      _DamagedError: at the first record that is not as it was written.
    """
    read, start = _old_record, 0
    while head := file.read(_HEAD):
        if _begins(head, _BEGINNING):
            read = _new_record  # From here on; a version never writes what an older one did.
        elif read is _new_record or not any(_begins(head, older) for older in _OLDER):
            raise _DamagedError(start)
        record = read(file, head, start)
        if record is None:
            return
        yield record
        start = record.end


def _new_record(file: Any, head: bytes, start: int) -> _Record | None:
    """The record that begins with this; None if it is torn."""
    if len(head) < _HEAD:
        return None
    *numbers, own = map(int, np.frombuffer(head[len(_BEGINNING) :], np.int64))
    if own != _own(numbers) or numbers[0] != _FORMAT:
        raise _DamagedError(start)
    _, step, refreshed, searched, count, size, crc = numbers
    body = file.read(size)
    if len(body) < size:
        return None
    if zlib.crc32(body) != crc:
        raise _DamagedError(start)
    arrays = io.BytesIO(body)
    read = [np.load(arrays, allow_pickle=False) for _ in range(count)]
    return _Record(step, refreshed > 0, searched > 0, read, start + _HEAD + size)


def _begins(head: bytes, beginning: bytes) -> bool:
    """Whether a record that begins like this may begin so, be it torn there."""
    return head[: len(beginning)] == beginning[: len(head)]


def _old_record(file: Any, head: bytes, start: int) -> _Record | None:
    """Of older versions: ``[step, refreshed, searched, arrays, crc32]``, or without the last.

    Of those a damaged length may seem a torn end.
    """
    del head
    file.seek(start)
    try:
        header = np.load(file, allow_pickle=False)
        arrays = [np.load(file, allow_pickle=False) for _ in range(header[3])]
        step, refreshed, searched = (int(x) for x in header[:3])
    except Exception as error:  # NumPy raises many kinds on bytes that are no array.
        ended = str(error).startswith("EOF") or len(file.read()) < len(_BEGINNING)
        file.seek(start)
        # If another record begins after it, it is not a torn last one.
        rest = file.read()[1:]
        if not ended or any(beginning in rest for beginning in (_BEGINNING, *_OLDER)):
            raise _DamagedError(start) from error
        return None
    if len(header) > 4 and header[4] != _crc(header[:4], arrays):
        raise _DamagedError(start)
    return _Record(step, refreshed > 0, searched > 0, arrays, file.tell())


class _DamagedError(Exception):
    """A record that is not as it was written; its one argument is where it begins, bytes."""


def _saved(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=False)
    return file.getvalue()


def _own(numbers: list[int]) -> int:
    return zlib.crc32(np.array(numbers, np.int64).tobytes())


def _crc(header: Any, arrays: list[np.ndarray]) -> int:
    crc = zlib.crc32(np.asarray(header, np.int64).tobytes())
    for array in arrays:
        crc = zlib.crc32(f"{array.dtype.str}{array.shape}".encode() + array.tobytes(), crc)
    return crc


_FORMAT = 2
# What records begin with, those of older versions too: before the numbers.
_BEGINNING, *_OLDER = (_saved(np.zeros(n, np.int64))[: -n * 8] for n in (8, 5, 4))
_HEAD = len(_BEGINNING) + 8 * 8


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    if not path.stat().st_size:  # Cannot be mapped.
        yield io.BytesIO()
        return
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
        yield view


def read_log(path: Path, like: Message) -> Iterator[tuple[int, Message]]:
    """Outer steps and their messages, with zeros for what was not sent.

    Args:
      like: shapes and dtypes of a message, from ``jax.eval_shape``.

    Raises:
      ValueError: if the log is damaged, or of another job.
    """
    nothing = jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), like)
    with _opened(path) as file:
        records = _records(file)
        while True:
            try:
                record = next(records)
            except StopIteration:
                return
            except _DamagedError as damaged:
                raise ValueError(
                    f"`path` {str(path)!r} is damaged: the record at byte {damaged.args[0]} is not "
                    "as it was written, and nothing after it can be rebuilt."
                ) from None
            step, arrays, said = record.step, record.arrays, (record.refreshed, record.searched)
            parts = [part for sent, part in zip(said, nothing[1::2], strict=True) if sent]
            spec = [(x.shape, x.dtype) for x in jax.tree.leaves(parts)]
            if spec != [(x.shape, x.dtype) for x in arrays]:
                raise ValueError(
                    f"`path` {str(path)!r} does not fit the job: the record of step {step} is of "
                    "another shape; give the log that belongs to it."
                )
            gradient, costs = nothing.gradient, nothing.costs
            if said[0]:
                size = len(jax.tree.leaves(gradient))
                gradient = jax.tree.unflatten(jax.tree.structure(gradient), arrays[:size])
                arrays = arrays[size:]
            if said[1]:
                costs = jax.tree.unflatten(jax.tree.structure(costs), arrays)
            yield step, Message(np.array(said[0]), gradient, np.array(said[1]), costs)


def message_spec(estimator: GradientEstimator, state: TrainState) -> Message:
    """Shapes and dtypes of the estimator's messages; ``state`` may be ``jax.eval_shape``'s."""
    spec = jax.eval_shape(estimator.estimate, state.theta, state.estimator_state, state.key)
    return spec[2]["message"]


def rebuild_step(
    estimator: GradientEstimator, meta_optimizer: optax.GradientTransformation
) -> Callable[[TrainState, Message], TrainState]:
    """The train step from its message: same theta and meta-optimizer state, to the bit."""
    if estimator.rebuild is None:
        raise ValueError(
            "`estimator` must be one that exchanges messages, such as `hybrid_es`: "
            "the others leave nothing to rebuild a step from."
        )
    rebuild: Any = estimator.rebuild

    def step(state: TrainState, message: Message) -> TrainState:
        key = jax.random.fold_in(state.key, state.step + 1)
        grad, estimator_state = rebuild(state.theta, state.estimator_state, key, message)
        update = meta_update(meta_optimizer, state, grad)
        return state._replace(
            step=state.step + 1,
            theta=update.theta,
            meta_opt_state=update.meta_opt_state,
            estimator_state=estimator_state,
        )

    return step


def rebuild(
    estimator: GradientEstimator,
    meta_optimizer: optax.GradientTransformation,
    state: TrainState,
    path: Path,
) -> TrainState:
    """``state`` moved through every logged step after it, up to the last whole record.

    Raises:
      ValueError: if a step is missing from the log.
    """
    step = jax.jit(rebuild_step(estimator, meta_optimizer))
    done = int(state.step)
    for number, message in read_log(path, message_spec(estimator, state)):
        if number <= done:
            continue
        if number != done + 1:
            raise ValueError(
                f"`path` {str(path)!r} has no record of step {done + 1}, the next is {number}; "
                "rebuild from a later checkpoint."
            )
        state = step(state, message)
        done = number
    return state
