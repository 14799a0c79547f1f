"""How the networks of the published learned optimizers begin."""

import jax
import jax.numpy as jnp


def fan_in_normal(key, shape, dtype=jnp.float32) -> jax.Array:
    """A normal of standard deviation ``fan_in ** -0.5``, cut off at two of them.

    ``fan_in`` is the last axis but one, so a stack of kernels may come before it. It is what
    Haiku's ``Linear`` begins with.
    """
    return shape[-2] ** -0.5 * jax.random.truncated_normal(key, -2, 2, shape, dtype)
