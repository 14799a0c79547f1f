"""Sizes of tensors of any numbers: nothing overflows, and there is a derivative at 0."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp


def over_norm(x: jax.Array, axes: Sequence[int], eps: float) -> jax.Array:
    """``x / (|x| + eps)``, with the norm over ``axes``; its derivative at 0 is that of ``x / eps``.

    Args:
      x: floats, not none along ``axes``.
      eps: above 0.
    """
    scale, length = _scaled_norm(x, axes)
    return (x / scale) / (length + eps / scale)


def norm(x: jax.Array, axes: Sequence[int]) -> jax.Array:
    """Over ``axes``, without them; its derivative at 0 is 0."""
    scale, length = _scaled_norm(x, axes)
    return jnp.squeeze(scale * length, tuple(axes))


def _scaled_norm(x, axes):
    """A scale, and the norm over that scale: both with ``axes``, of size 1."""
    # The product does not depend on the scale, so that has no part in the derivative.
    largest = jax.lax.stop_gradient(jnp.max(jnp.abs(x), axes, keepdims=True, initial=0))
    scale = jnp.where(largest > 0, largest, 1)
    squares = jnp.sum(jnp.square(x / scale), axes, keepdims=True)
    some = squares > 0
    return scale, jnp.where(some, jnp.sqrt(jnp.where(some, squares, 1)), 0)
