"""The rate over a run of known length: up for its first steps, then down a cosine."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

WARM_UP = 0.03  # Of the run.
LAST_RATE = 0.01  # Of the highest rate, at the end of the run and beyond it.


def annealed(steps: jax.Array, num_steps: jax.Array) -> jax.Array:
    """The share of the highest rate, ``[]``, when ``steps`` of ``num_steps`` updates are done."""
    done = jnp.minimum(steps / num_steps, 1)
    cosine = (1 + jnp.cos(jnp.pi * done)) / 2
    warm_up = jnp.minimum(1, (steps + 1) / (WARM_UP * num_steps + 1))
    return warm_up * (LAST_RATE + (1 - LAST_RATE) * cosine)


def annealing(num_steps: Any) -> optax.Schedule:
    """``annealed`` as an optax schedule: a function of the updates done."""

    def share(count):
        dtype = jnp.promote_types(jnp.float32, jnp.asarray(num_steps).dtype)
        return annealed(jnp.asarray(count, dtype), jnp.asarray(num_steps, dtype))

    return share
