"""Schedules of learning rates and momenta: per step, per layer, per parameter, or constant.

A schedule is a pytree prefix of the parameters. Constant parts are kept apart from those
that vary by step, so that nothing is stored ``T`` times that is the same ``T`` times.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from meta_train.reversible.arithmetic import FixedPoint, snap


def check_schedule(name: str, schedule: Any, params: Any, num_steps: int) -> Any:
    """Raises ``ValueError`` unless ``schedule`` fits; returns it with leaves ``[T or 1, ...]``."""
    dtype = jnp.result_type(*jax.tree.leaves(params))

    def one(path, array, covered):
        array = jnp.asarray(array)
        if array.dtype != dtype:
            raise ValueError(
                f"`{name}`{jax.tree_util.keystr(path)} must be {dtype} like `params`, got "
                f"{array.dtype}; cast it (`reversible.setup` does)."
            )
        tensors = jax.tree.leaves(covered)
        shapes = {()} | ({jnp.shape(tensors[0])} if len(tensors) == 1 else set())
        fits = array.ndim == 0 or (array.shape[0] in (1, num_steps) and array.shape[1:] in shapes)
        if not fits:
            raise ValueError(
                f"`{name}`{jax.tree_util.keystr(path)} has shape {array.shape}, but must be [] "
                f"(constant), [{num_steps}] (one value per step), or [{num_steps}, *shape] or "
                "[1, *shape] with the shape of the tensor it belongs to."
            )
        return array[None] if array.ndim == 0 else array

    try:
        jax.tree.map(lambda *_: None, schedule, params)
    except ValueError as error:
        raise ValueError(
            f"`{name}` must be a pytree prefix of `params`, one array for all of them or one for "
            f"each part: {error}"
        ) from None
    return jax.tree_util.tree_map_with_path(one, schedule, params)


def smallest_numerators(
    momenta: Any, num_steps: int, fixed: FixedPoint, momentum_floor: float | None
) -> np.ndarray:
    """The least numerator of each step over all parameters, int64 ``[T, 1]``.

    From ``momentum_floor``, or else from the momenta themselves, which must be concrete then.
    Concrete ones outside [0, 1] are refused in either case.
    """
    denominator = 1 << fixed.decay_bits
    smallest = np.full(num_steps, denominator)
    for path, leaf in jax.tree_util.tree_leaves_with_path(momenta):
        if isinstance(leaf, jax.core.Tracer):
            if momentum_floor is not None:
                continue
            raise ValueError(
                f"`momenta`{jax.tree_util.keystr(path)} is traced, so the tape cannot be sized; "
                "pass `momentum_floor`, a number that no momentum is below."
            )
        values = np.asarray(leaf).reshape(leaf.shape[0], -1)
        inside = np.all((values >= 0) & (values <= 1), axis=1)
        if not np.all(inside):
            step = int(np.argmin(inside))
            raise ValueError(
                f"`momenta`{jax.tree_util.keystr(path)} must be in [0, 1], got a value outside at "
                f"step {step}: {values[step]}; clip the schedule."
            )
        with jax.ensure_compile_time_eval():
            lowest = np.asarray(snap(np.min(values, axis=1), fixed.decay_bits))
        smallest = np.minimum(smallest, (lowest * denominator).astype(np.int64))
    if momentum_floor is not None:
        if not 0.0 <= momentum_floor <= 1.0:
            raise ValueError(f"`momentum_floor` must be in [0, 1], got {momentum_floor}.")
        return np.full((num_steps, 1), max(1, math.floor(momentum_floor * denominator)))
    return smallest[:, None]


def split(schedules: Any) -> tuple[Any, Any]:
    """Schedules ``[1, ...]`` without that axis, and those ``[T, ...]``; ``None`` elsewhere."""
    constant = jax.tree.map(lambda x: x[0] if x.shape[0] == 1 else None, schedules)
    varying = jax.tree.map(lambda x: None if x.shape[0] == 1 else x, schedules)
    return constant, varying


def merge(constant: Any, varying: Any) -> Any:
    """Inverse of ``split``, at one step."""
    return jax.tree.map(
        lambda c, v: v if c is None else c, constant, varying, is_leaf=lambda x: x is None
    )


def expand(values: Any, params: Any) -> jax.Array:
    """One number per parameter ``[P]``, or ``[]`` if one number serves them all."""
    if isinstance(values, jax.Array) and values.ndim == 0:
        return values
    # A part without parameters has a schedule, too.
    pieces = jax.tree.map(
        lambda value, covered: [
            jnp.broadcast_to(value, leaf.shape).ravel() for leaf in jax.tree.leaves(covered)
        ],
        values,
        params,
    )
    return jnp.concatenate(jax.tree.leaves(pieces))
