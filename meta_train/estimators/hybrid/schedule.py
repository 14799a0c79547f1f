"""When Hybrid-ES has a gradient and when it searches, and what of it crosses between workers."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from meta_train.compiled_apart import compiled_apart
from meta_train.estimators.base import Metrics
from meta_train.estimators.hybrid.between import Between
from meta_train.estimators.hybrid.messages import Message
from meta_train.estimators.hybrid.refresh import Refresh
from meta_train.estimators.hybrid.state import HybridState

# ``(theta, state, key, obtain_gradient, obtain_costs) -> (gradient, state, message, metrics)``.
Advance = Callable[
    [Any, HybridState, jax.Array, Callable, Callable],
    tuple[Any, HybridState, Message, Metrics],
]


def alternating(
    gradients: Refresh, candidates: Between, *, refresh_every: int, assist: bool, predicts: bool
) -> Advance:
    """One step of either kind, from what was sent; and how that is obtained is the caller's.

    ``obtain_gradient`` and ``obtain_costs`` are ``Refresh.measure`` and ``Between.measure``, or
    read what these sent from a log.

    Args:
      gradients: the steps with a gradient.
      candidates: the steps in between.
      refresh_every: ``r``: every ``r``-th step has a gradient.
      assist: search in the steps with a gradient too, around it.
      predicts: the surrogate is predicted from the gradients, for the steps in between.
    """

    def refreshed(theta, state, key, obtain_gradient, obtain_costs):
        state, sent, metrics = obtain_gradient(theta, state, key)
        step = state.shared.step
        grad, shared = compiled_apart(gradients.absorb, state.shared, sent, witness=step)
        state = state._replace(shared=shared)
        if not assist:
            return grad, state, sent, None, metrics
        around = state
        if predicts:  # Its prediction is for the steps in between.
            around = state._replace(shared=shared._replace(surrogate=grad))
        grad, state, costs, more = searched(theta, around, key, obtain_costs)
        if predicts:
            state = state._replace(shared=state.shared._replace(surrogate=shared.surrogate))
        return grad, state, sent, costs, metrics | {"sigma": more["sigma"]}

    def searched(theta, state, key, obtain_costs):
        step = state.shared.step
        setting = compiled_apart(candidates.prepare, state.shared, key, witness=step)
        costs = obtain_costs(theta, state, setting, key)
        grad, shared, metrics = compiled_apart(
            candidates.follow, state.shared, setting, key, costs, witness=step
        )
        if candidates.unperturbed:
            metrics["unperturbed"] = candidates.unperturbed(ravel_pytree(theta)[0], setting)
        return grad, state._replace(shared=shared), costs, metrics

    def advance(theta, state, key, obtain_gradient, obtain_costs):
        """One step of either kind: the gradient, state, message, metrics."""
        unravel = ravel_pytree(theta)[1]

        def with_gradient(state):
            return refreshed(theta, state, key, obtain_gradient, obtain_costs)

        def without(state):
            return searched(theta, state, key, obtain_costs)

        # What the kind of step that is not taken would have sent, as zeros; as metrics, NaN.
        spec_with = jax.eval_shape(with_gradient, state)
        spec_without = jax.eval_shape(without, state)
        names = spec_with[4] | spec_without[3]

        def complete(metrics, refresh):
            filled = {
                name: jnp.asarray(metrics.get(name, jnp.nan), leaf.dtype)
                for name, leaf in names.items()
            }
            return filled | {"refresh": jnp.asarray(refresh, jnp.float32)}

        def full_with(state):
            grad, state, sent, costs, metrics = with_gradient(state)
            costs = _zeros(spec_without[2]) if costs is None else costs
            message = Message(jnp.array(True), sent, jnp.array(assist), costs)
            return grad, state, message, complete(metrics, 1)

        def full_without(state):
            grad, state, costs, metrics = without(state)
            sent = _zeros(spec_with[2])
            message = Message(jnp.array(False), sent, jnp.array(True), costs)
            return grad, state, message, complete(metrics, 0)

        if refresh_every == 1:
            grad, state, message, metrics = full_with(state)
        else:
            grad, state, message, metrics = jax.lax.cond(
                state.shared.step % refresh_every == 0, full_with, full_without, state
            )
        shared = state.shared._replace(step=state.shared.step + 1)
        return unravel(grad), state._replace(shared=shared), message, metrics

    return advance


def _zeros(shapes: Any) -> Any:
    return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
