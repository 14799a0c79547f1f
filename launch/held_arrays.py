"""The arrays that functions hold: the data of a job, whatever its tasks are made of."""

import functools
import hashlib
import types
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np


def digest_of_arrays(thing: Any) -> str:
    """A digest of every array that ``thing`` refers to, in order, with its shape and dtype.

    Args:
      thing: functions, or trees of them: what they close over, are bound to or wrap is searched.
    """
    found = hashlib.sha256()
    for array in _arrays(thing, set()):
        found.update(f"{array.dtype}{array.shape}".encode())
        found.update(np.ascontiguousarray(array).tobytes())
    return found.hexdigest()[:16]


def _arrays(thing: Any, seen: set[int]) -> Iterator[np.ndarray]:
    if id(thing) in seen or isinstance(thing, (type, types.ModuleType, str, bytes)):
        return
    seen.add(id(thing))
    if isinstance(thing, jax.Array) and jax.dtypes.issubdtype(thing.dtype, jax.dtypes.prng_key):
        thing = jax.random.key_data(thing)
    if isinstance(thing, (np.ndarray, jax.Array)):
        yield np.asarray(thing)
        return
    for part in _parts(thing):
        yield from _arrays(part, seen)


def _parts(thing: Any) -> list[Any]:
    if isinstance(thing, dict):
        return list(thing.values())
    if isinstance(thing, (list, tuple)):
        return list(thing)
    if isinstance(thing, functools.partial):
        return [thing.func, thing.args, thing.keywords]
    parts = [getattr(thing, "__wrapped__", None), getattr(thing, "__self__", None)]
    if isinstance(thing, types.FunctionType):
        parts += [cell.cell_contents for cell in thing.__closure__ or () if _filled(cell)]
        parts += [thing.__defaults__, thing.__kwdefaults__]
    return [*parts, getattr(thing, "__dict__", None)]


def _filled(cell: types.CellType) -> bool:
    try:
        return cell.cell_contents is not cell
    except ValueError:
        return False
