"""Gradients and losses whose powers do not overflow."""

from typing import Any

import jax
import jax.numpy as jnp


def limited(gradient: jax.Array, root: int) -> jax.Array:
    """``gradient``, of which at most a sixteenth of that root of the largest float counts.

    In float32 1.2e18 for ``root`` 2, 2.7e8 for ``root`` 4. An infinite gradient stays one: a
    diverged run must show.
    """
    limit = _limit(gradient.dtype, root)
    return jnp.where(jnp.isinf(gradient), gradient, jnp.clip(gradient, -limit, limit))


def finite_loss(loss: Any, dtype: Any) -> jax.Array:
    """``loss`` in that type; one that is not finite counts as very bad: as the limit of ``root`` 2.

    A loss may diverge for a step (an infinite value of few examples) whose gradients are finite.
    """
    loss = jnp.asarray(loss, dtype)
    return jnp.where(jnp.isfinite(loss), loss, _limit(dtype, 2))


def _limit(dtype: Any, root: int) -> float:
    return float(jnp.finfo(dtype).max) ** (1 / root) / 16
