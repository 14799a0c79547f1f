"""Inputs of the per-parameter learned optimizers, features first: ``[features, parameters]``.

All tensors of a network are flattened into one parameter axis, so the optimizer's
network is a few large matrix products instead of a few small ones per tensor, and the
parameter axis is last, where elementwise work vectorizes.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

MOMENTUM_DECAYS = (0.1, 0.5, 0.9, 0.99, 0.999, 0.9999)
TIMESCALES = (1, 3, 10, 30, 100, 300, 1000, 3000, 10000, 30000, 100000)

LANES = 16  # float32 values in the widest CPU vector.
_UNROLLED_BLOCKS = 4


def init_momenta(params) -> jax.Array:
    """Zero momenta: ``[6, P]``, the leaves side by side in the order of ``jax.tree.leaves``."""
    leaves = jax.tree.leaves(params)
    size = sum(leaf.size for leaf in leaves)
    return jnp.zeros((len(MOMENTUM_DECAYS), size), jnp.result_type(jnp.float32, *leaves))


def update_momenta(momenta: jax.Array, grads) -> jax.Array:
    """``m <- d m + (1 - d) g`` for each of the six decays ``d``."""
    decays = jnp.asarray(MOMENTUM_DECAYS, momenta.dtype)[:, None]
    return decays * momenta + (1 - decays) * flat(grads)


def flat(tree) -> jax.Array:
    """``[P]``, the leaves side by side in the order of ``jax.tree.leaves``."""
    return jnp.concatenate([leaf.reshape(-1) for leaf in jax.tree.leaves(tree)])


def normalized_features(grads, params, momenta: jax.Array) -> jax.Array:
    """Gradient, parameter and momenta, each divided by its root mean square over the tensor.

    A square that overflows (in float32, a root mean square above 1.8e19) makes its feature 0.

    Args:
      grads, params: trees of the same shapes; not all leaves of size 0.
      momenta: ``[6, P]``, of ``init_momenta``.

    Returns:
      ``[8, columns]``: the tensors side by side in the order of ``jax.tree.leaves``, then zeros
      up to a multiple of the vector width, without which products are a tenth slower.
    """

    def normalize(x):
        return x * jax.lax.rsqrt(1e-5 + jnp.mean(x * x, axis=-1, keepdims=True))

    def features(grad, param, momenta):
        return normalize(jnp.concatenate([grad.reshape(1, -1), param.reshape(1, -1), momenta]))

    grads, params = jax.tree.leaves(grads), jax.tree.leaves(params)
    ends = np.cumsum([grad.size for grad in grads])
    leaves = zip(grads, params, jnp.split(momenta, ends[:-1], axis=1), strict=True)
    tensors = [features(*leaf) for leaf in leaves if leaf[0].size]  # The mean of none is NaN.
    padding = -momenta.shape[1] % LANES
    return jnp.concatenate([*tensors, jnp.zeros((8, padding), momenta.dtype)], axis=1)


def unflatten(flat: jax.Array, like):
    """Cuts ``[parameters or more]`` into leaves with the shapes of ``like``."""
    leaves, treedef = jax.tree.flatten(like)
    ends = np.cumsum([leaf.size for leaf in leaves])
    pieces = jnp.split(flat, ends)[:-1]
    return jax.tree.unflatten(
        treedef, [piece.reshape(leaf.shape) for piece, leaf in zip(pieces, leaves, strict=True)]
    )


def time_embedding(count: jax.Array, dtype: Any = jnp.float32) -> jax.Array:
    """``tanh(count / timescale - 1)`` for the eleven timescales, ``[11]``, in that type."""
    return jnp.tanh(count / jnp.asarray(TIMESCALES, dtype) - 1.0)


def map_blocks(fn, features: jax.Array, block: int) -> jax.Array:
    """``fn`` over blocks of columns of ``features``, concatenated.

    Intermediate values then have the size of a block, not of the whole network.

    Args:
      fn: ``[rows, n] -> [outputs, n]``, column by column.
      features: ``[rows, columns]``.
      block: largest number of columns given to ``fn``.
    """
    rows, columns = features.shape
    num_blocks = max(1, math.ceil(columns / block))
    size = math.ceil(columns / num_blocks / LANES) * LANES
    if num_blocks <= _UNROLLED_BLOCKS:
        # Static slices: no padding, and the compiler sees straight-line code.
        pieces = [fn(features[:, i : i + size]) for i in range(0, columns, size)]
        return jnp.concatenate(pieces, axis=1)
    padded = jnp.pad(features, ((0, 0), (0, num_blocks * size - columns)))
    blocks = padded.reshape(rows, num_blocks, size).swapaxes(0, 1)
    outputs = jax.lax.map(fn, blocks)
    return outputs.swapaxes(0, 1).reshape(outputs.shape[1], -1)[:, :columns]
