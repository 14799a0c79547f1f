"""The weights from a log of what the workers told each other, without evaluating a loss.

An in-between step of Hybrid-ES is a few seeds and costs, so a log of messages is a small
record of a whole run: from any saved state it gives the weights after every later step, bit
for bit. (The population is not rebuilt; a job continues from a checkpoint.)
"""

import io
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from meta_train.estimators.base import GradientEstimator
from meta_train.estimators.hybrid.messages import Message
from meta_train.trainer import TrainState, move


class ReplayLog:
    """Messages appended to a file, each in one write: a killed job tears the last at most.

    A record is a run of ``.npy`` arrays: int64 ``[step, refreshed, searched, arrays]``, then
    as many arrays: the leaves of ``Message.gradient`` if refreshed, of ``Message.costs`` if
    searched. On a resume the log is cut back to the checkpoint.
    """

    def __init__(self, path: Path, start_step: int):
        if path.exists():
            ends = [record.end for record in _records(path) if record.header[0] <= start_step]
            os.truncate(path, max(ends, default=0))
        self._file = path.open("ab")

    def append(self, step: int, message: Message) -> None:
        """Writes the message of outer step ``step``, counted from 1; a killed job keeps it."""
        parts = ((message.refreshed, message.gradient), (message.searched, message.costs))
        arrays = [np.asarray(x) for sent, part in parts if sent for x in jax.tree.leaves(part)]
        header = [step, int(message.refreshed), int(message.searched), len(arrays)]
        record = io.BytesIO()
        for array in [np.array(header, np.int64), *arrays]:
            np.save(record, array, allow_pickle=False)
        self._file.write(record.getvalue())
        self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


class _Record(NamedTuple):
    header: np.ndarray
    arrays: list[np.ndarray]
    end: int  # Position in the file after it, bytes.


def _records(path: Path) -> Iterator[_Record]:
    """The whole records; a torn last one is left out."""
    with path.open("rb") as file:
        try:
            while True:
                header = np.load(file, allow_pickle=False)
                arrays = [np.load(file, allow_pickle=False) for _ in range(header[3])]
                yield _Record(header, arrays, file.tell())
        except (EOFError, ValueError):
            return


def read_log(path: Path, like: Message) -> Iterator[tuple[int, Message]]:
    """Outer steps and their messages, with zeros for what was not sent.

    Args:
      like: shapes and dtypes of a message, from ``jax.eval_shape``.
    """
    nothing = jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), like)
    for (step, refreshed, searched, _), arrays, _ in _records(path):
        rest = iter(arrays)
        parts = []
        for sent, part in ((refreshed, nothing.gradient), (searched, nothing.costs)):
            leaves, structure = jax.tree.flatten(part)
            parts.append(jax.tree.unflatten(structure, [next(rest) if sent else x for x in leaves]))
        yield (
            int(step),
            Message(np.array(refreshed > 0), parts[0], np.array(searched > 0), parts[1]),
        )


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
        moved = move(meta_optimizer, state, grad)
        return state._replace(
            step=state.step + 1,
            theta=moved.theta,
            meta_opt_state=moved.meta_opt_state,
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
