"""A network on normalized inputs of a tensor, slab by slab: memory does not grow by its inputs."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from learned_opt.adafactor import normalized

# A tensor of up to so many parameters is taken whole; a larger one in slabs of about so many, for
# which all inputs fit in the second fastest cache.
_LARGEST_WHOLE = 32768
_SLAB = 8192


def on_normalized(
    inputs_of: Callable[[Any], Sequence[jax.Array]],
    outputs_of: Callable[[Any, Sequence[jax.Array], Any], jax.Array],
    axes: Sequence[int],
    eps: float,
    weights: Any,
    arrays: tuple,
) -> jax.Array:
    """``outputs_of(weights, inputs, arrays)``, ``[*shape]``: inputs over their root mean square.

    Args:
      inputs_of: from ``arrays`` to inputs ``[*shape]``; what is at one place of the tensor depends
        on nothing but what is there in ``arrays``.
      outputs_of: likewise; neither function holds traced values.
      axes: of the tensor, from its end, that the root mean square is over.
      eps: added to the mean square.
      weights: a tree of arrays.
      arrays: a tree of arrays whose last axes are the tensor's, of size 1 where constant; the
        first of the tuple is ``[*shape]``.
    """
    function = _by_slabs if arrays[0].size > _LARGEST_WHOLE else _whole
    return function(inputs_of, outputs_of, tuple(axes), eps, weights, arrays)


def _whole(inputs_of, outputs_of, axes, eps, weights, arrays):
    inputs = [normalized(x, axes, eps) for x in inputs_of(arrays)]
    return outputs_of(weights, inputs, arrays)


@partial(jax.custom_jvp, nondiff_argnums=(0, 1, 2, 3))
def _by_slabs(inputs_of, outputs_of, axes, eps, weights, arrays):
    shape = arrays[0].shape
    count = math.ceil(math.prod(shape) / _SLAB)
    # Slabs along the outermost axis are contiguous.
    axis = next((a for a in sorted(axes) if shape[a] >= count), max(axes, key=lambda a: shape[a]))
    size = math.ceil(shape[axis] / min(count, shape[axis]))
    count = math.ceil(shape[axis] / size)

    def slab(i):
        # One that would end beyond the tensor begins earlier: some of it is computed twice.
        at = jnp.minimum(i * size, shape[axis] - size)

        def cut(x):
            along = x.ndim + axis
            return x if x.shape[along] == 1 else jax.lax.dynamic_slice_in_dim(x, at, size, along)

        return at, jax.tree.map(cut, arrays)

    def add(i, sums):
        at, own = slab(i)
        once = (at + jnp.arange(size) >= i * size).reshape(size, *[1] * (-axis - 1))
        return [
            total + jnp.sum(jnp.where(once, x * x, 0), axes, keepdims=True)
            for total, x in zip(sums, inputs_of(own), strict=True)
        ]

    def write(i, outputs):
        at, own = slab(i)
        inputs = [x * scale for x, scale in zip(inputs_of(own), scales, strict=True)]
        new = outputs_of(weights, inputs, own)
        return jax.lax.dynamic_update_slice_in_dim(outputs, new, at, len(shape) + axis)

    of_size_1 = [1 if a - len(shape) in axes else size for a, size in enumerate(shape)]
    zeros = [jnp.zeros(of_size_1, x.dtype) for x in jax.eval_shape(inputs_of, arrays)]
    number = math.prod(shape[a] for a in axes)
    sums = jax.lax.fori_loop(0, count, add, zeros)
    scales = [jax.lax.rsqrt(eps + total / number) for total in sums]
    whole = jax.eval_shape(partial(_whole, inputs_of, outputs_of, axes, eps), weights, arrays)
    return jax.lax.fori_loop(0, count, write, jnp.zeros(whole.shape, whole.dtype))


@_by_slabs.defjvp
def _(inputs_of, outputs_of, axes, eps, primals, tangents):
    """Derivatives are those of the whole, without loops."""
    return jax.jvp(partial(_whole, inputs_of, outputs_of, axes, eps), primals, tangents)
