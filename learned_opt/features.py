"""Inputs of the per-parameter learned optimizers, laid out features-first: ``[features, parameters]``.

All tensors of a network are flattened into one parameter axis, so the optimizer's
network is a few large matrix products instead of a few small ones per tensor, and the
parameter axis is last, where elementwise work vectorizes.
"""

import jax
import jax.numpy as jnp
import numpy as np

MOMENTUM_DECAYS = (0.1, 0.5, 0.9, 0.99, 0.999, 0.9999)
TIMESCALES = (1, 3, 10, 30, 100, 300, 1000, 3000, 10000, 30000, 100000)


def flatten(tree) -> jax.Array:
    """Concatenates the leaves of ``tree``, as float32 ``[parameters]``."""
    leaves = jax.tree.leaves(tree)
    return jnp.concatenate([jnp.ravel(leaf).astype(jnp.float32) for leaf in leaves])


def unflatten(flat: jax.Array, like):
    """Inverse of ``flatten``: leaves get the shapes and dtypes of ``like``."""
    leaves, treedef = jax.tree.flatten(like)
    ends = np.cumsum([leaf.size for leaf in leaves])[:-1]
    pieces = jnp.split(flat, ends)
    return jax.tree.unflatten(
        treedef,
        [p.reshape(leaf.shape).astype(leaf.dtype) for p, leaf in zip(pieces, leaves, strict=True)],
    )


def update_momenta(momenta: jax.Array, grad: jax.Array) -> jax.Array:
    """``m <- d m + (1 - d) g`` for each decay ``d``; ``momenta`` is ``[6, parameters]``."""
    decays = jnp.asarray(MOMENTUM_DECAYS, jnp.float32)[:, None]
    return decays * momenta + (1 - decays) * grad


def rms_normalize(features: jax.Array, sizes: tuple[int, ...], eps: float = 1e-5) -> jax.Array:
    """Divides each feature by its root mean square over each tensor.

    Args:
      features: ``[features, parameters]``.
      sizes: number of parameters of each tensor, in flattening order.
      eps: added to the mean square.
    """
    pieces = jnp.split(features, np.cumsum(sizes)[:-1], axis=1)
    return jnp.concatenate(
        [
            piece * jax.lax.rsqrt(eps + jnp.mean(jnp.square(piece), axis=1, keepdims=True))
            for piece in pieces
        ],
        axis=1,
    )


def time_embedding(count: jax.Array) -> jax.Array:
    """``tanh(count / timescale - 1)`` for the eleven timescales, ``[11]``."""
    return jnp.tanh(count / jnp.asarray(TIMESCALES, jnp.float32) - 1.0)
