"""Gradient descent with an estimator, recorded: what the figures of the studies are drawn from."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

from meta_train.estimators import GradientEstimator, synchronized


def descend(
    name: str,
    estimator: GradientEstimator,
    theta: Any,
    optimizer: optax.GradientTransformation,
    *,
    num_steps: int,
    num_records: int,
    num_seeds: int,
    together: bool = False,
) -> tuple[np.ndarray, Any]:
    """Descends from ``theta`` once for each seed and records theta at evenly spaced steps.

    Args:
      name: what the progress bar says.
      num_steps: outer steps, a multiple of ``num_records``.
      together: all particles restart in the first truncation, instead of staggered phases.

    Returns:
      The steps, int ``[num_records + 1]`` from 0, and theta at them, leaves
      ``[num_seeds, num_records + 1, ...]``.
    """

    theta = jax.tree.map(lambda x: jnp.asarray(np.asarray(x)), theta)  # No weak types: one compile.

    def begin(seed):
        key_init, key_steps = jax.random.split(jax.random.key(seed))
        particles = estimator.init(theta, key_init)
        if together and hasattr(particles, "position"):
            particles = synchronized(particles)
        return theta, optimizer.init(theta), particles, key_steps

    def advance(carry, step):
        theta, optimizer_state, particles, key = carry
        grad, particles, _ = estimator.estimate(theta, particles, jax.random.fold_in(key, step))
        update, optimizer_state = optimizer.update(grad, optimizer_state, theta)
        return (optax.apply_updates(theta, update), optimizer_state, particles, key), None

    per_record = num_steps // num_records

    @jax.jit
    @jax.vmap
    def record(carry, start):
        carry, _ = jax.lax.scan(advance, carry, start + jnp.arange(per_record))
        return carry

    carry = jax.jit(jax.vmap(begin))(jnp.arange(num_seeds))
    thetas = [carry[0]]
    for index in tqdm(range(num_records), desc=name, leave=False):
        carry = record(carry, jnp.full(num_seeds, index * per_record))
        thetas.append(jax.block_until_ready(carry[0]))
    stacked = jax.tree.map(lambda *x: np.stack(x, axis=1), *thetas)
    return per_record * np.arange(num_records + 1), stacked


def band(axis, x, runs, **line) -> None:
    """Draws the median of ``runs [seeds, x]`` as a line and their range as a band."""
    axis.fill_between(
        x, runs.min(axis=0), runs.max(axis=0), color=line.get("color"), alpha=0.2, linewidth=0
    )
    axis.plot(x, np.median(runs, axis=0), **line)
