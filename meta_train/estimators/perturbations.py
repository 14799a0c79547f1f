"""Perturbations of theta.

``optax.tree`` adds and scales too, in the promoted type: a float32 factor would make float32 of a
bfloat16 theta. Here theta keeps its types.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from meta_train.samplers import BLOCK, sampler_named

Theta = Any


def perturbation_sampler(sampler: str, num: int, sigma) -> Callable:
    """The perturbations of ``num`` particles: zero mean, covariance ``sigma^2 I``.

    Args:
      sampler: a name of ``samplers.SAMPLERS``; ``normal`` is the Gaussian of the papers. With
        others estimates are unbiased as stated for losses quadratic in theta; beyond that only
        ``normal`` and ``sobol`` smooth the loss as the papers do.
      num: particles (or pairs) that draw together, on all devices.

    Returns:
      ``(theta, key) -> perturb`` with the ``key`` all particles share, which gives
      ``perturb(particle_key, particle_id) -> eps``, shaped like theta. What the rows of a block
      have in common is computed by the first call, once for all particles.

    Raises:
      ValueError: on an unknown sampler.
    """
    block, row = sampler_named(sampler)

    def at_step(theta, key):
        flat, unravel = ravel_pytree(theta)
        shared = block(jax.random.fold_in(key, BLOCK), num, flat.size, flat.dtype)

        def perturb(particle_key, particle_id):
            eps = sigma * row(shared, particle_key, particle_id, flat.size, flat.dtype)
            return unravel(eps.astype(flat.dtype))

        return perturb

    return at_step


def normal_perturbation(key: jax.Array, theta: Theta, sigma) -> Theta:
    """``eps ~ N(0, sigma^2 I)``, shaped like ``theta``; one draw whatever the number of leaves."""
    flat, unravel = ravel_pytree(theta)
    return unravel(sigma * jax.random.normal(key, flat.shape, flat.dtype))


def add_scaled(theta: Theta, scale, direction: Theta) -> Theta:
    """``theta + scale * direction``, in the dtypes of theta."""
    return jax.tree.map(lambda t, d: (t + scale * d).astype(t.dtype), theta, direction)


def scaled(scale, tree: Theta) -> Theta:
    """``scale * tree``, in its dtypes."""
    return jax.tree.map(lambda x: (scale * x).astype(x.dtype), tree)


def orthonormal(columns: jax.Array) -> jax.Array:
    """A basis of the span of the columns, ``[P, k]``; in float32 where they are narrower."""
    wide = jnp.promote_types(columns.dtype, jnp.float32)
    return jnp.linalg.qr(columns.astype(wide))[0].astype(columns.dtype)
