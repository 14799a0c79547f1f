"""Functions of every element, and sums over elements, in one pass over large tensors."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

# Stacks of up to so many elements are taken whole; of larger ones slabs of about so many, which
# stay in the second fastest cache.
_LARGEST_WHOLE = 32768
_SLAB = 8192

Lists = tuple[list[jax.Array], list[jax.Array]]


def map_and_sum(
    function: Callable[[Any, Sequence[jax.Array]], Lists], shared: Any, arrays: Sequence[jax.Array]
) -> Lists:
    """``(outputs, sums)``: the first list of ``function(shared, arrays)``, and sums of the second.

    XLA passes over all arrays again for every sum and keeps what several of them share. On a CPU
    large stacks are therefore taken slab by slab; derivatives are those of the whole.

    Args:
      function: to two lists of arrays ``[tensors, *shape]``, what is at one place of which depends
        on nothing but ``shared`` and what is there in ``arrays``. It holds no traced values.
      shared: a tree of scalars and arrays ``[tensors]``, which ``function`` gets with ones for the
        axes of ``shape``.
      arrays: ``[tensors, *shape]``, none empty.

    Returns:
      Outputs ``[tensors, *shape]`` and sums over ``shape``, ``[tensors]``.
    """
    spread = jax.tree.map(
        lambda x: x if jnp.ndim(x) == 0 else x.reshape(-1, *[1] * (arrays[0].ndim - 1)), shared
    )
    if arrays[0].size <= _LARGEST_WHOLE:
        return _whole(function, spread, tuple(arrays))
    return _large(function, spread, tuple(arrays))


def _whole(function, shared, arrays):
    outputs, summands = function(shared, arrays)
    return outputs, [jnp.sum(x, tuple(range(1, x.ndim))) for x in summands]


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _large(function, shared, arrays):
    return jax.lax.platform_dependent(
        shared, arrays, cpu=partial(_in_slabs, function), default=partial(_whole, function)
    )


@_large.defjvp
def _(function, primals, tangents):
    return jax.jvp(partial(_whole, function), primals, tangents)


def _in_slabs(function, shared, arrays):
    shape = arrays[0].shape
    arrays = [x.reshape(len(x), -1) for x in arrays]
    shared = jax.tree.map(lambda x: x if jnp.ndim(x) == 0 else x.reshape(-1, 1), shared)
    length = arrays[0].shape[1]
    size = min(length, math.ceil(_SLAB / shape[0]))

    def body(i, carry):
        outputs, totals = carry
        # A slab that would end beyond the tensors begins earlier: some of it is computed twice.
        at = jnp.minimum(i * size, length - size)
        own = [jax.lax.dynamic_slice_in_dim(x, at, size, 1) for x in arrays]
        new, summands = function(shared, own)
        once = at + jnp.arange(size) >= i * size
        for place, x in enumerate(new):
            outputs[place] = jax.lax.dynamic_update_slice_in_dim(outputs[place], x, at, 1)
        # Slab on slab, and summed in the end: XLA adds arrays faster than it sums one.
        totals = [t + jnp.where(once, x, 0) for t, x in zip(totals, summands, strict=True)]
        return outputs, totals

    outputs, summands = jax.eval_shape(function, shared, arrays)
    start = (
        [jnp.zeros(x.shape, x.dtype) for x in outputs],
        [jnp.zeros((shape[0], size), x.dtype) for x in summands],
    )
    outputs, totals = jax.lax.fori_loop(0, math.ceil(length / size), body, start)
    return [x.reshape(shape) for x in outputs], [jnp.sum(x, 1) for x in totals]
