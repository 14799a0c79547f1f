"""Gradient descent with an estimator, recorded: what the figures of the studies are drawn from."""

import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

from meta_train.estimators import GradientEstimator, synchronized
from meta_train.unroll import UnrolledSystem, unroll

HELD_OUT_SEED = 1_000_003  # Far from the seeds of the descents.


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
      theta: where to start, or ``key -> theta`` to start each seed elsewhere.
      num_steps: outer steps, a multiple of ``num_records``.
      together: all particles restart in the first truncation, instead of staggered phases.

    Returns:
      The steps, int ``[num_records + 1]`` from 0, and theta at them, leaves
      ``[num_seeds, num_records + 1, ...]``.
    """

    draw = theta if callable(theta) else lambda key: theta

    def begin(seed):
        key_init, key_steps = jax.random.split(jax.random.key(seed))
        # No weak types: one compile.
        theta = jax.tree.map(
            lambda x: jax.lax.convert_element_type(x, jnp.asarray(x).dtype),
            draw(jax.random.fold_in(key_init, 1)),
        )
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


def held_out_losses(
    system: UnrolledSystem,
    thetas: Mapping[str, Any],
    num_steps: int,
    num_runs: int,
    *,
    seed: int = HELD_OUT_SEED,
    chunk: int = 8,
) -> dict[str, np.ndarray]:
    """The mean per-step loss of each theta, over the same runs, which no descent has seen.

    Args:
      thetas: name -> thetas ``[..., P]`` with any leading axes.
      num_runs: inner runs averaged, with fixed keys drawn from ``seed``.
      chunk: thetas computed at a time.

    Returns:
      Name -> float array of the leading axes.
    """
    keys = jax.random.split(jax.random.key(seed), num_runs)

    def one(theta):
        def run(key):
            key_init, key_steps = jax.random.split(key)
            losses = unroll(system, theta, system.init(theta, key_init), key_steps, num_steps)[1]
            return jnp.mean(losses)

        return jnp.mean(jax.vmap(run)(keys))

    rows = [np.asarray(x, np.float32).reshape(-1, np.shape(x)[-1]) for x in thetas.values()]
    losses = jax.jit(lambda t: jax.lax.map(one, t, batch_size=chunk))(np.concatenate(rows))
    pieces = np.split(np.asarray(losses), np.cumsum([len(row) for row in rows])[:-1])
    return {
        name: piece.reshape(np.shape(x)[:-1])
        for (name, x), piece in zip(thetas.items(), pieces, strict=True)
    }


def in_parallel(jobs: Mapping[str, Callable[[], Any]]) -> dict[str, Any]:
    """The result of each job, one thread a core: small programs leave XLA's own threads idle."""
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        futures = {name: pool.submit(job) for name, job in jobs.items()}
        return {name: future.result() for name, future in futures.items()}


def band(axis, x, runs, **line) -> None:
    """Draws the median of ``runs [seeds, x]`` as a line and their range as a band."""
    axis.fill_between(
        x, runs.min(axis=0), runs.max(axis=0), color=line.get("color"), alpha=0.2, linewidth=0
    )
    axis.plot(x, np.median(runs, axis=0), **line)


def log_ticks(axis, places=(0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0)) -> None:
    """Labels a logarithmic y axis at ``places`` alone, in plain numbers."""
    low, high = axis.get_ylim()
    axis.minorticks_off()
    axis.set_yticks(places, [f"{place:g}" for place in places])
    axis.set_ylim(low, high)
