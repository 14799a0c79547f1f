"""Methods x seeds: descents that record theta, and what is measured of the recorded thetas."""

import os
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from meta_train.estimators import GradientEstimator, synchronized
from meta_train.progress import progress
from meta_train.unroll import UnrolledSystem, unroll

HELD_OUT_SEED = 1_000_003  # Far from the seeds of the descents.

Recorded = tuple[np.ndarray, Any]  # Steps ``[R]``; theta at them, leaves ``[seeds, R, ...]``.
Measure = Callable[[Mapping[str, Any]], Mapping[str, np.ndarray]]


class Descent(NamedTuple):
    """One method: steps ``[R]``, thetas with leaves ``[seeds, R, ...]``, losses ``[seeds, R]``."""

    steps: np.ndarray
    theta: Any
    loss: np.ndarray


def compare(methods: Mapping[str, Callable[[], Recorded]], measure: Measure) -> dict[str, Descent]:
    """Runs every method and measures all that they recorded, in one call of ``measure``."""
    recorded = in_parallel(methods)
    losses = measure({name: theta for name, (_, theta) in recorded.items()})
    return {name: Descent(steps, theta, losses[name]) for name, (steps, theta) in recorded.items()}


def by_name(found: Mapping[str, Any], field: str) -> dict[str, Any]:
    """One field of every method."""
    return {name: getattr(each, field) for name, each in found.items()}


def final(found: Mapping[str, Descent]) -> dict[str, np.ndarray]:
    """The last losses of every method, ``[seeds]``."""
    return {name: each.loss[:, -1] for name, each in found.items()}


def ranges(values: Mapping[str, np.ndarray], names: Iterable[str], form: str = ".3f") -> str:
    """``NAME lowest to highest`` of each name, for a claim's evidence."""
    return ", ".join(f"{n} {values[n].min():{form}} to {values[n].max():{form}}" for n in names)


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
    cost: int = 1,
) -> Recorded:
    """Descends from ``theta`` once for each seed and records theta at evenly spaced steps.

    Args:
      name: what the progress bar says.
      theta: where to start, or ``key -> theta`` to start each seed elsewhere.
      num_steps: outer steps, rounded down to a multiple of ``num_records``.
      together: all particles restart in the first truncation, instead of staggered phases.
      cost: what an outer step counts for.

    Returns:
      Steps times ``cost``, int ``[num_records + 1]`` from 0, and theta at them, leaves
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
    for index in progress(range(num_records), desc=name, leave=False):
        carry = record(carry, jnp.full(num_seeds, index * per_record))
        thetas.append(jax.block_until_ready(carry[0]))
    stacked = jax.tree.map(lambda *x: np.stack(x, axis=1), *thetas)
    return cost * per_record * np.arange(num_records + 1), stacked


def adam_descents(
    tried: Mapping[str, tuple[GradientEstimator, int, float]],
    theta: Any,
    *,
    inner_steps: int,
    num_records: int,
    num_seeds: int,
) -> dict[str, Callable[[], Recorded]]:
    """Methods for ``compare``, of the same number of inner steps each; see ``descend``.

    Args:
      tried: estimators, the inner steps of one outer step, and Adam's learning rate.
    """
    return {
        name: partial(
            descend,
            name,
            estimator,
            theta,
            optax.adam(rate),
            num_steps=inner_steps // cost,
            num_records=num_records,
            num_seeds=num_seeds,
            cost=cost,
        )
        for name, (estimator, cost, rate) in tried.items()
    }


def in_terms_of(theta_of: Callable[[Any], Any], system: UnrolledSystem) -> UnrolledSystem:
    """The system as a function of what ``theta_of`` makes theta of."""
    return UnrolledSystem(
        lambda x, *rest: system.init(theta_of(x), *rest),
        lambda x, *rest: system.step(theta_of(x), *rest),
    )


def each(loss: Callable[[Any], jax.Array]) -> Measure:
    """Measures a deterministic ``loss`` of every theta ``[seeds, R, ...]``."""
    losses = jax.jit(jax.vmap(jax.vmap(loss)))
    return lambda thetas: {name: np.asarray(losses(theta)) for name, theta in thetas.items()}


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
            losses = unroll(
                system, theta, system.init(theta, key_init, num_steps), key_steps, num_steps
            )[1]
            return jnp.mean(losses)

        return jnp.mean(jax.vmap(run)(keys))

    rows = [np.asarray(x, np.float32).reshape(-1, np.shape(x)[-1]) for x in thetas.values()]
    losses = jax.jit(lambda t: jax.lax.map(one, t, batch_size=chunk))(np.concatenate(rows))
    pieces = np.split(np.asarray(losses), np.cumsum([len(row) for row in rows])[:-1])
    return {
        name: piece.reshape(np.shape(x)[:-1])
        for (name, x), piece in zip(thetas.items(), pieces, strict=True)
    }


def in_parallel(jobs: Mapping[Any, Callable[[], Any]]) -> dict[Any, Any]:
    """The result of each job, one thread a core: small programs leave XLA's own threads idle."""
    x64 = jnp.result_type(float) == jnp.float64  # Of this thread; each has its own.

    def run(job):
        with jax.enable_x64(x64):
            return job()

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        futures = {name: pool.submit(run, job) for name, job in jobs.items()}
        pending = progress(futures.items(), desc="jobs", leave=False)
        return {name: future.result() for name, future in pending}
