"""The train step of a mixture, one program a part, so that each is compiled (and cached) alone."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from meta_train import devices
from meta_train.estimators.base import GradientEstimator
from meta_train.estimators.mixture import Mixture, MixtureState, Norms
from meta_train.trainer import TrainState, make_step, step_key


def make_mixture_step(
    mixture: Mixture, meta_optimizer: optax.GradientTransformation, num_devices: int
) -> Any:
    """``state -> (state, metrics)`` on placed states: what ``make_step(mixture.estimator)`` does.

    Each part that is drawn runs as a program of its own, then one more program combines the
    gradients and moves theta. Parts that are not drawn cost nothing.
    """

    def run(index, shared, state):
        theta, root, step = shared
        grad, state, metrics = mixture.part(index, theta, state, step_key(root, step))
        return devices.device_mean((grad, metrics)), state

    programs: list[Any] = [
        devices.part_map(partial(run, index), num_devices) for index in range(mixture.size)
    ]

    def lower(placed: TrainState) -> Any:
        """The largest part, as ``jax.stages.Lowered``."""
        shared = placed.theta, placed.key, placed.step
        sizes = [
            sum(leaf.size for leaf in jax.tree.leaves(part))
            for part in placed.estimator_state.parts
        ]
        largest = max(range(mixture.size), key=sizes.__getitem__)
        return programs[largest].lower(shared, placed.estimator_state.parts[largest])

    def combine(theta, state, key):
        del theta, key
        return mixture.combine(*state)

    nothing: Any = None  # Its state is given, never begun.
    finish = make_step(GradientEstimator(nothing, combine), meta_optimizer)
    finish = devices.replicated_map(finish, num_devices)
    drawn = jax.jit(lambda root, step: mixture.drawn(step_key(root, step)))
    idle: list = [None] * mixture.size  # What a part gives that does not run.

    def step(state: TrainState) -> tuple[TrainState, Any]:
        population: MixtureState = state.estimator_state
        ran = drawn(state.key, state.step)
        shared = state.theta, state.key, state.step
        results, parts = [], []
        for index, runs in enumerate(jax.device_get(ran)):
            part = population.parts[index]
            if runs:
                result, part = programs[index](shared, part)
            else:
                result = idle[index] or _zeros(jax.eval_shape(programs[index], shared, part)[0])
            idle[index] = idle[index] or _zeros(result)
            results.append(result)
            parts.append(part)
        grads, metrics = map(list, zip(*results, strict=True))
        inputs: tuple[Norms, list, list, jax.Array] = population.norms, grads, metrics, ran
        state, found = finish(state._replace(estimator_state=inputs))
        return state._replace(
            estimator_state=MixtureState(tuple(parts), state.estimator_state)
        ), found

    whole: Any = step  # As what `jax.jit` returns, it says what it would be compiled from.
    whole.lower = lower
    return whole


def _zeros(tree: Any) -> Any:
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), tree)
