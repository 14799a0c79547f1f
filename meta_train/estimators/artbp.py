"""Anticipated reweighted truncated backpropagation: cuts at random places, reweighted."""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp

from meta_train.checks import check_positive
from meta_train.estimators.base import GradientEstimator, checked, map_particles, population_mean
from meta_train.estimators.config import ONE_DEVICE, ParticlesConfig
from meta_train.estimators.derivatives import float_leaves, replace_floats, resting_after_horizon
from meta_train.estimators.horizons import Horizons, episode_loss
from meta_train.estimators.particles import check_population
from meta_train.unroll import UnrolledSystem


def artbp(
    system: UnrolledSystem,
    *,
    num_particles: int,
    mean_truncation: float,
    horizons: Horizons,
    alpha: float = 6.0,
    chunk: int | None = None,
) -> GradientEstimator:
    """Truncated backpropagation with random, compensated cuts: unbiased, as ``bptt`` is.

    After each inner step the backward pass is cut with probability ``c`` and multiplied by
    ``1/(1 - c)`` where it is not, so its expectation is that of ``bptt``: the mean of the
    derivative, which is the derivative of the mean per-step loss only where the loss does not jump
    in theta (see ``derivatives``: with a ReLU network inside, it does). ``d`` steps after the last
    cut, ``c = alpha / ((alpha - 1) l + d)``: cuts are ``l`` steps apart on average with a
    polynomial tail, which lets the products of weights grow like ``d^alpha`` instead of
    exponentially. ``alpha=inf``: ``c = 1/l``.

    Every outer step runs whole episodes. A cut segment is ``l`` steps long on average but
    may be as long as the episode, and compiled programs have fixed shapes, so this costs
    the ``N T`` forward and backward steps and the memory of ``bptt``; the ``l`` steps and
    ``l`` residuals of Table 1 are what a dynamic program needs on average.

    Args:
      num_particles: ``N``, episodes per outer step.
      mean_truncation: ``l``, mean steps between cuts; above 1.
      horizons: distribution of episode lengths (``T`` is the largest; shorter are masked).
      alpha: tail exponent of the segment lengths, above 1.
      chunk: episodes computed at a time; see ``map_particles``.

    Raises:
      ValueError: on a non-positive number, ``mean_truncation`` or ``alpha`` not above 1, or
        (from ``init``) a loss without a derivative.

    Source: Tallec and Ollivier 2017, "Unbiasing truncated backpropagation through time".
    Their ``c``; that its mean segment is ``l`` follows from a telescoping sum.
    """
    check_population(num_particles, horizons, chunk)
    check_positive(mean_truncation=mean_truncation)
    for name, value in {"mean_truncation": mean_truncation, "alpha": alpha}.items():
        if not value > 1:
            raise ValueError(
                f"`{name}` must be above 1, got {name}={value}; "
                "cuts one step apart leave no path to reweight."
            )

    def init(theta, key):
        del theta, key
        return jnp.arange(num_particles, dtype=jnp.int32)

    def cut_probability(since_cut):
        return 1 / ((1 - 1 / alpha) * mean_truncation + since_cut / alpha)

    def episode(theta, key, particle_id):
        key_restart, key_data, key_cuts = jax.random.split(jax.random.fold_in(key, particle_id), 3)
        key_horizon, key_begin = jax.random.split(key_restart)
        horizon = horizons.draw(key_horizon)
        run = resting_after_horizon(system, horizons, horizon)

        def body(theta, carry, keys):
            state, since_cut = carry
            key_step, key_cut = keys
            state, loss = run.step(theta, state, key_step)
            probability = cut_probability(since_cut)
            cut = jax.random.bernoulli(key_cut, probability)
            weight = jnp.where(cut, 0.0, 1 / (1 - probability))
            return (_scale_backward(weight, state), jnp.where(cut, 1, since_cut + 1)), loss

        def loss(theta):
            start = run.init(theta, key_begin, horizon), jnp.int32(1)
            keys = (
                jax.random.split(key_data, horizons.max),
                jax.random.split(key_cuts, horizons.max),
            )
            losses = jax.lax.scan(partial(body, theta), start, keys)[1]
            return episode_loss(losses, horizons, horizon)

        return jax.value_and_grad(loss)(theta)

    def estimate(theta, ids, key):
        losses, grads = map_particles(partial(episode, theta, key), ids, chunk)
        grad, _, metrics = population_mean(grads, losses)
        return grad, ids, metrics

    return checked("artbp", system, init, estimate, differentiates=True)


def _scale_backward(weight: jax.Array, state):
    """The identity, whose derivative is ``weight``."""
    return replace_floats(state, [_scaled_backward(x, weight) for x in float_leaves(state)])


@jax.custom_vjp
def _scaled_backward(x: jax.Array, weight: jax.Array) -> jax.Array:
    del weight
    return x


def _scaled_backward_bwd(weight, cotangent):
    # Nothing passes a cut, not even what is infinite beyond it.
    scaled = jnp.where(weight > 0, weight.astype(cotangent.dtype) * cotangent, 0.0)
    return scaled, jnp.zeros_like(weight)


_scaled_backward.defvjp(lambda x, weight: (x, weight), _scaled_backward_bwd)


@dataclass(frozen=True)
class ARTBP(ParticlesConfig):
    """See ``artbp``.

    Attributes:
      truncation: mean inner steps between cuts, above 1.
      alpha: tail exponent of the segment lengths, above 1; inf: geometric lengths.
    """

    truncation: float = 20.0
    alpha: float = 6.0

    def __post_init__(self):
        super().__post_init__()
        for name, value in {"truncation": self.truncation, "alpha": self.alpha}.items():
            if not value > 1:
                raise ValueError(f"`{name}` must be above 1, got {name}={value}.")

    def make(self, system, horizons, context=ONE_DEVICE):
        return artbp(
            system,
            mean_truncation=self.truncation,
            horizons=horizons,
            alpha=self.alpha,
            **self.arguments(context),
        )
