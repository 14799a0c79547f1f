"""Methods that learn a policy, and runs of them that are kept on disk as they go."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree

from launch.evaluation.kept import kept, software
from meta_train import estimators as est
from meta_train.estimators.base import GradientEstimator, checked, population_mean
from meta_train.progress import progress
from meta_train.unroll import UnrolledSystem, unroll, with_flat_theta
from tasks.dynamics.control import Control
from tasks.dynamics.gymnasium_rollouts import gymnasium_returns
from tasks.dynamics.mujoco_physics import EPISODE


class Method(NamedTuple):
    """How a policy is learned.

    Attributes:
      make: ``(system, horizons) -> estimator``.
      rate: of plain gradient descent.
      cost: environment steps of an outer step, all particles counted.
    """

    make: Callable[..., GradientEstimator]
    rate: float
    cost: int


def ars(
    system: UnrolledSystem, *, num_pairs: int, horizons: est.Horizons, sigma: float
) -> GradientEstimator:
    """Augmented random search, version V1: the step of full ES over the spread of its returns.

        g = mean_i delta_i (R_i(theta - sigma delta_i) - R_i(theta + sigma delta_i)) / std(R)

    with ``delta_i ~ N(0, I)``, returns ``R`` and their standard deviation over the ``2 N``
    episodes; all directions are used. Plain descent along it is the published method. It is no
    estimate of the gradient but for its direction.

    Source: Mania, Guy, Recht 2018, Algorithm 1.
    """

    def init(theta, key):
        del theta, key
        return jnp.arange(num_pairs, dtype=jnp.int32)

    def estimate(theta, ids, key):
        def pair(index):
            key_delta, key_start, key_steps = jax.random.split(jax.random.fold_in(key, index), 3)
            delta = jax.random.normal(key_delta, theta.shape, theta.dtype)

            def half(sign):
                moved = theta + sign * sigma * delta
                state = system.init(moved, key_start, horizons.max)
                return jnp.sum(unroll(system, moved, state, key_steps, horizons.max)[1])

            return delta, jax.vmap(half)(jnp.array([1.0, -1.0]))

        deltas, losses = jax.vmap(pair)(ids)
        spread = jnp.maximum(jnp.std(losses), 1e-8)
        contributions = deltas * ((losses[:, 0] - losses[:, 1]) / spread)[:, None]
        grad, _, metrics = population_mean(contributions, losses.mean(axis=1) / horizons.max)
        return grad, ids, metrics

    return checked("ars", system, init, estimate)


class Curve(NamedTuple):
    """What a method found.

    Attributes:
      steps: environment steps, int ``[R + 1]`` from 0.
      theta: the policy as a vector, ``[seeds, R + 1, P]``.
      returns: in Gymnasium, mean of some rollouts each, ``[seeds, R + 1]``.
    """

    steps: np.ndarray
    theta: np.ndarray
    returns: np.ndarray


class Size(NamedTuple):
    """Of the runs of a method.

    Attributes:
      steps: environment steps of a run.
      record: environment steps from one record of theta to the next, in whole outer steps.
      seeds: of the runs.
      rollouts: in Gymnasium, of each recorded theta.
    """

    steps: int
    record: int
    seeds: tuple[int, ...]
    rollouts: int


def learn(
    name: str, method: Method, control: Control, size: Size, folder: Path | None, target: float
) -> Curve:
    """Runs of a method, from theta = 0, until each has reached the target or the steps are done.

    Args:
      name: what the progress bar says.
      folder: where each record is kept, so that the same call goes on; None: nowhere.
      target: a mean return; when a record of every run is at least that, the rest is left out.
    """
    system, unravel, start = flat_system(control)
    estimator = method.make(system, horizons=est.fixed_horizon(EPISODE))
    optimizer = optax.sgd(method.rate)
    each = max(1, round(size.record / method.cost))
    seeds = jnp.array(size.seeds)

    @jax.jit
    @jax.vmap
    def begin(seed):
        return start, estimator.init(start, jax.random.key(seed))

    @jax.jit
    @partial(jax.vmap, in_axes=(0, 0, None))
    def advance(seed, carry, first):
        key = jax.random.fold_in(jax.random.key(seed), 1)

        def step(carry, index):
            theta, particles = carry
            found = estimator.estimate(theta, particles, jax.random.fold_in(key, index))
            update, _ = optimizer.update(found[0], optimizer.init(theta), theta)
            return (optax.apply_updates(theta, update), found[1]), None

        return jax.lax.scan(step, carry, first + jnp.arange(each))[0]

    measure = jax.jit(gymnasium_returns(control, size.rollouts))

    def measured(carry, index):
        returns = measure(jax.vmap(unravel)(carry[0]), jnp.int32(1000 * index))
        return np.asarray(returns.total).mean(axis=1)

    carry = begin(seeds)
    thetas, totals = [np.asarray(carry[0])], [measured(carry, 0)]
    settings = {
        "control": repr(control),
        "method": [name, repr(method.rate), method.cost, getattr(method.make, "keywords", {})],
        "steps per record": each * method.cost,
        "seeds": list(size.seeds),
        "rollouts": size.rollouts,
    } | software()
    structure = jax.tree.structure(carry)
    records = progress(range(1, size.steps // (each * method.cost) + 1), desc=name, leave=False)
    for index in records:

        def record(carry=carry, index=index):
            carry = jax.block_until_ready(advance(seeds, carry, jnp.int32((index - 1) * each)))
            leaves = {f"leaf_{i:03}": np.asarray(x) for i, x in enumerate(jax.tree.leaves(carry))}
            return leaves | {"total": measured(carry, index)}

        found = kept(folder, settings | {"record": index}, record) if folder else record()
        carry = jax.tree.unflatten(
            structure, [jnp.asarray(found[key]) for key in sorted(found) if key != "total"]
        )
        thetas.append(np.asarray(carry[0]))
        totals.append(found["total"])
        if np.all(np.max(totals, axis=0) >= target):
            break
    steps = each * method.cost * np.arange(len(thetas))
    return Curve(steps, np.stack(thetas, axis=1), np.stack(totals, axis=1))


def flat_system(control: Control) -> tuple[UnrolledSystem, Callable[[jax.Array], Any], jax.Array]:
    """The system over theta as one vector, the function to its tree, and the first theta."""
    dynamics = control.dynamics()
    theta = dynamics.init_theta(jax.random.key(0))
    spec = jax.eval_shape(lambda: theta)
    system, unravel = with_flat_theta(UnrolledSystem(dynamics.init, dynamics.step), spec)
    return system, unravel, ravel_pytree(theta)[0]


def steps_to(curve: Curve, level: float) -> np.ndarray:
    """Environment steps until the first record of at least ``level``, ``[seeds]``; inf: never."""
    reached = curve.returns >= level
    first = np.argmax(reached, axis=1)
    return np.where(reached.any(axis=1), curve.steps[first], np.inf)


def final_returns(control: Control, thetas: np.ndarray, num_rollouts: int, seed: int) -> np.ndarray:
    """Returns in Gymnasium of policies ``[policies, P]``: ``[policies, rollouts]``."""
    unravel = flat_system(control)[1]
    measure = jax.jit(gymnasium_returns(control, num_rollouts))
    trees = jax.vmap(unravel)(jnp.asarray(thetas))
    return np.asarray(measure(trees, jnp.int32(seed)).total)
