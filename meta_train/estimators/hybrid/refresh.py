"""A refresh of Hybrid-ES: every worker's gradient, then what all make of them."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree

from meta_train.compiled_apart import compiled_apart
from meta_train.estimators.base import GradientEstimator, Metrics, mean_in_pairs
from meta_train.estimators.config import Exchange
from meta_train.estimators.hybrid import noise as noises
from meta_train.estimators.hybrid.compression import Compressor, with_feedback
from meta_train.estimators.hybrid.prediction import Predictor
from meta_train.estimators.hybrid.searches import Search
from meta_train.estimators.hybrid.state import HybridState, Shared


class Refresh(NamedTuple):
    """The two halves of a refresh.

    Attributes:
      measure: ``(theta, state, key) -> (state, sent, metrics)``, this device's part.
      absorb: ``(shared, sent) -> (gradient [P], shared)``, what every device makes of it. What is
        not finite, or overflows what is learned from it, teaches nothing.
    """

    measure: Callable[[Any, HybridState, jax.Array], tuple[HybridState, Any, Metrics]]
    absorb: Callable[[Shared, Any], tuple[jax.Array, Shared]]


def refresh(
    surrogate: GradientEstimator,
    search: Search,
    noise: noises.Noise,
    *,
    predictor: Predictor | None,
    compressor: Compressor | None,
    exchange: Exchange,
) -> Refresh:
    """The refresh of ``hybrid_es``; see there for the arguments."""

    def measure(theta, state, key):
        def one(shard):
            particles, residual = shard

            def run(theta, particles, residual, key):
                grad, particles, metrics = surrogate.estimate(theta, particles, key)
                grad = ravel_pytree(grad)[0]
                if compressor:
                    grad, residual = with_feedback(compressor, grad, residual)
                return grad, particles, residual, metrics

            return compiled_apart(run, theta, particles, residual, key, witness=state.shared.step)

        shards = state.workers.shape[0]
        split = jax.tree.map(
            lambda x: x.reshape(shards, x.shape[0] // shards, *x.shape[1:]), state.particles
        )
        sent, particles, residuals, metrics = jax.lax.map(one, (split, state.residuals))
        particles = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), particles)
        if compressor:
            metrics = exchange.mean(mean_in_pairs(metrics))
            sent = exchange.gather(sent)
        else:
            sent, metrics = exchange.mean(mean_in_pairs((sent, metrics)))
        return state._replace(particles=particles, residuals=residuals), sent, metrics

    def absorb(shared, sent):
        size, dtype = shared.surrogate.shape[0], shared.surrogate.dtype
        if compressor:
            sent = mean_in_pairs(jax.vmap(lambda code: compressor.decode(code, size, dtype))(sent))
        prediction = predictor.learn(shared.prediction, sent) if predictor else ()
        fresh = Shared(
            shared.step,
            # What it is made from stays the same until the next refresh, so it does too.
            predictor.predict(prediction) if predictor else sent,
            search.observe(shared.past, sent),
            noises.observe_gradient(noise, shared.scale, sent),
            prediction,
        )
        usable = [jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves((sent, fresh))]
        return sent, optax.tree.where(jnp.all(jnp.array(usable)), fresh, shared)

    return Refresh(measure, absorb)
