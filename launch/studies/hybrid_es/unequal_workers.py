"""Training on workers of which one is slow, or some are lost: accuracy and simulated time."""

import math
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np

from launch import cluster_sim as sim
from launch.studies.hybrid_es import hybrid_training as training
from launch.studies.hybrid_es.cluster_clock import BANDWIDTH, LATENCY, SPEED, works
from launch.studies.hybrid_es.hybrid_training import Problem, Recipe
from meta_train.estimators.base import GradientEstimator
from meta_train.estimators.hybrid.messages import Message

TARGET = 0.98  # training accuracy, mean over seeds
NUM_UNEQUAL = 16
PATIENCE = 1.0
EQUAL, SLOW, SLOW_EQUAL, LOSSY = (
    "equal workers",
    "one 4 times slower",
    "one 4 times slower, equal shares",
    "10% lost in each step",
)


def steps_to_target(curve: np.ndarray) -> float:
    """Of a mean curve ``[T]`` measured after every step; inf if never."""
    reached = np.flatnonzero(curve >= TARGET)
    return float(reached[0] + 1) if len(reached) else math.inf


class Unequal(NamedTuple):
    """A recipe on a cluster: accuracy and simulated time, ``[T]``."""

    recipe: Recipe
    cluster: str
    accuracy: np.ndarray
    clock: np.ndarray

    @property
    def seconds(self) -> float:
        steps = steps_to_target(self.accuracy)
        return float(self.clock[int(steps) - 1]) if math.isfinite(steps) else math.inf


def cluster_of(**link: float) -> sim.Cluster:
    """Equal workers."""
    return sim.homogeneous(NUM_UNEQUAL, speed=SPEED, **link)


def slowed(cluster: sim.Cluster) -> sim.Cluster:
    """The first worker takes four times as long."""
    return cluster._replace(speed=cluster.speed * np.where(cluster.id == 0, 0.25, 1.0))


def simulate(
    problem: Problem,
    recipe: Recipe,
    cluster: sim.Cluster,
    num_steps: int,
    advance=lambda state, arrived: (state, None),
    state: Any = None,
    **rules: Any,
) -> sim.ClusterRun:
    """On the event clock; alone, where everything arrives or is done again."""
    gradient, between = works(problem, recipe, len(cluster.id))

    def plan(step):
        return between if step % recipe.refresh_every else gradient

    return sim.simulate(cluster, plan, num_steps, advance, state, **rules)


def estimate_without(
    estimator: GradientEstimator, theta, state, key: jax.Array, arrived: jax.Array
) -> tuple[Any, Any]:
    """One step of a ``hybrid_es`` that hears of some candidates' costs only, bool ``[M]``.

    Everyone rebuilds the step from the message that did arrive; a missing cost is infinite.

    Returns:
      The gradient and the estimator's state.
    """
    assert estimator.rebuild is not None
    _, measured, metrics = estimator.estimate(theta, state, key)
    message = cast(Message, metrics["message"])
    costs = jnp.where(arrived, message.costs.costs, jnp.inf)
    message = message._replace(costs=message.costs._replace(costs=costs))
    grad, rebuilt = estimator.rebuild(theta, state, key, message)
    return grad, rebuilt._replace(particles=measured.particles, residuals=measured.residuals)


def lossy_run(problem: Problem, recipe: Recipe, cluster, num_steps: int, seed: int):
    """Hybrid-ES without the costs that do not arrive: accuracies and simulated times, ``[T]``."""
    estimator = training.estimator(problem, recipe)

    @jax.jit
    def step(theta, state, index, heard):
        key = training.key_of(seed, index)
        grad, state = estimate_without(estimator, theta, state, key, heard)
        theta = training.descend(theta, grad, recipe.rate)
        return theta, state, training.measure(problem, theta).train

    def advance(carry, arrived):
        theta, state, index = carry
        heard = np.ones(recipe.num_candidates, bool)
        if index % recipe.refresh_every:  # A candidate is heard of if all parts of its batch are.
            heard = arrived.reshape(recipe.num_candidates, -1).all(axis=1)
        theta, state, accuracy = step(theta, state, index, jnp.asarray(heard))
        return (theta, state, index + 1), float(accuracy)

    start = (*training.init(problem, estimator, seed), 0)
    rules = {"seed": seed, "patience": PATIENCE}
    done = simulate(problem, recipe, cluster, num_steps, advance, start, **rules)
    return np.array(done.records), done.clock


def unequal(problem: Problem, recipe: Recipe, curve: np.ndarray, seeds: int) -> list[Unequal]:
    """A recipe on four clusters. Only where costs are missing is the trajectory another."""
    even = cluster_of(latency=LATENCY, bandwidth=BANDWIDTH)
    lossy = even._replace(dropout=np.full(NUM_UNEQUAL, 0.1))

    def arriving(name, cluster, **rules):
        clock = simulate(problem, recipe, cluster, len(curve), **rules).clock
        return Unequal(recipe, name, curve, clock)

    found = [
        arriving(EQUAL, even),
        arriving(SLOW, slowed(even)),
        arriving(SLOW_EQUAL, slowed(even), proportional=False),
    ]
    if recipe.mode != "select":
        return [*found, arriving(LOSSY, lossy, patience=PATIENCE)]
    runs = [lossy_run(problem, recipe, lossy, len(curve), seed) for seed in range(seeds)]
    return [*found, Unequal(recipe, LOSSY, *np.mean(runs, axis=0))]
