"""Estimates at a theta that is held."""

from typing import Any

import jax
import jax.numpy as jnp

from meta_train.estimators import GradientEstimator, synchronized


def start(estimator: GradientEstimator, theta: Any, key: jax.Array, windows: int) -> tuple:
    """Particles at the start of an episode, and its number of estimates.

    ``windows``, or 1 of an estimator that runs whole episodes.
    """
    state = estimator.init(theta, key)
    if hasattr(state, "position"):
        return synchronized(state), windows
    return state, 1


def estimates(estimator: GradientEstimator, theta: Any, state: Any, keys: jax.Array) -> tuple:
    """The state after one estimate for each key, and the estimates, leaves ``[keys, ...]``."""

    def body(state, key):
        grad, state, _ = estimator.estimate(theta, state, key)
        return state, grad

    return jax.lax.scan(body, state, keys)


def mean_estimate(estimator: GradientEstimator, theta: Any, key: jax.Array, windows: int) -> Any:
    """The mean estimate over one episode of particles of its own."""
    key_init, key_steps = jax.random.split(key)
    state, windows = start(estimator, theta, key_init, windows)
    found = estimates(estimator, theta, state, jax.random.split(key_steps, windows))[1]
    return jax.tree.map(lambda grads: jnp.mean(grads, axis=0), found)
