"""Gradients whose powers do not overflow."""

import jax
import jax.numpy as jnp


def limited(gradient: jax.Array, root: int) -> jax.Array:
    """``gradient``, of which at most a sixteenth of that root of the largest float counts.

    In float32 1.2e18 for ``root`` 2, 2.7e8 for ``root`` 4. An infinite gradient stays one: a
    diverged run must show.
    """
    limit = float(jnp.finfo(gradient.dtype).max) ** (1 / root) / 16
    return jnp.where(jnp.isinf(gradient), gradient, jnp.clip(gradient, -limit, limit))
