"""Guided evolution strategies: perturbations stretched along surrogate gradients."""

import math
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from meta_train.checks import check_multiple, check_positive, check_whole
from meta_train.estimators.base import GradientEstimator, checked, map_particles, population_mean
from meta_train.estimators.config import ONE_DEVICE, PairsConfig
from meta_train.estimators.derivatives import float_leaves, replace_floats, resting_after_horizon
from meta_train.estimators.horizons import Horizons, episode_loss
from meta_train.estimators.particles import check_population
from meta_train.estimators.perturbations import (
    add_scaled,
    orthonormal,
    perturbation_sampler,
    scaled,
)
from meta_train.unroll import UnrolledSystem, unroll


class GuidedParticle(NamedTuple):
    """A pair of guided ES: its id, and its last surrogate gradients, ``[k, P]``."""

    id: jax.Array
    surrogates: jax.Array


def guided_es(
    system: UnrolledSystem,
    *,
    num_pairs: int,
    truncation: int,
    num_surrogates: int,
    horizons: Horizons,
    sigma: float,
    alpha: float = 0.5,
    sampler: str = "normal",
    chunk: int | None = None,
) -> GradientEstimator:
    """Antithetic ES over whole episodes, with perturbations guided by cheap biased gradients.

    With ``U [P, k]`` an orthonormal basis of the pair's last ``k`` surrogate gradients
    (truncated backpropagation; at first random directions), perturbations are
    ``eps ~ N(0, sigma^2 C)``,

        C = alpha I + (1 - alpha) (P / k) U U^T,      g = eps (L+ - L-) / (2 sigma^2).

    Its expectation is ``C`` times the gradient of the mean per-step loss (smoothed by ``eps``): a
    descent direction and not the gradient, biased towards the surrogates by design, with a
    trace-preserving ``C``. The loss is only evaluated, so its jumps in theta count; the
    surrogates do not see them (``derivatives``), and only choose where ``eps`` is large.
    ``alpha = 1`` is ``full_es``. ``3 N T`` forward and ``N T`` backward steps; memory: the
    residuals of ``T`` steps for each of ``chunk`` pairs, and ``N k`` copies of theta.

    Args:
      num_pairs: ``N``, antithetic pairs; the halves share data and keys.
      truncation: inner steps the surrogate gradients look back.
      num_surrogates: ``k``, at most the size of theta.
      horizons: distribution of episode lengths, the longest a multiple of ``truncation``.
      sigma: standard deviation of the perturbations, root mean square over directions.
      alpha: share of the isotropic part, in ``(0, 1]``.
      sampler: distribution of the isotropic part; see ``perturbations.perturbation_sampler``.
      chunk: pairs computed at a time; see ``map_particles``.

    Raises:
      ValueError: on a longest horizon that is no multiple of ``truncation``, a number out of
        range, or (from ``init``) more surrogates than theta has entries, or a loss without a
        derivative.

    Source: Maheswaranathan et al. 2019. Differs: ``C`` is scaled by ``P`` so that ``sigma``
    means what it does in ``full_es`` (the authors' factor ``beta`` is then 1).
    """
    check_population(num_pairs, horizons, chunk, unit="pairs")
    check_whole(num_surrogates=num_surrogates)
    check_positive(sigma=sigma)
    check_multiple(horizons.max, truncation)
    perturbations = perturbation_sampler(sampler, num_pairs, sigma)
    if not 0 < alpha <= 1:
        raise ValueError(
            f"`alpha` must be above 0 and at most 1, got alpha={alpha}; "
            "at 0 no direction but the surrogates is ever tried."
        )

    def init(theta, key):
        flat = ravel_pytree(theta)[0]
        if num_surrogates > flat.size:
            raise ValueError(
                f"`num_surrogates` must be at most the size of theta, got num_surrogates="
                f"{num_surrogates} for {flat.size} entries; more span no more directions."
            )
        surrogates = jax.random.normal(key, (num_pairs, num_surrogates, flat.size), flat.dtype)
        return GuidedParticle(jnp.arange(num_pairs, dtype=jnp.int32), surrogates)

    def surrogate(theta, key_begin, horizon, key_data):
        """The gradient of the episode with the state held constant every ``truncation`` steps."""

        run = resting_after_horizon(system, horizons, horizon)

        def loss(theta):
            def window(state, keys):
                floats = [jax.lax.stop_gradient(x) for x in float_leaves(state)]
                state = replace_floats(state, floats)
                return jax.lax.scan(lambda s, k: run.step(theta, s, k), state, keys)

            keys = jax.random.split(key_data, horizons.max)
            windows = keys.reshape(-1, truncation, *keys.shape[1:])
            losses = jax.lax.scan(window, run.init(theta, key_begin, horizon), windows)[1]
            return episode_loss(losses.reshape(-1), horizons, horizon)

        return ravel_pytree(jax.grad(loss)(theta))[0]

    def episode(perturb, theta, key, particle):
        keys = jax.random.split(jax.random.fold_in(key, particle.id), 4)
        key_restart, key_eps, key_data, key_sub = keys
        key_horizon, key_begin = jax.random.split(key_restart)
        horizon = horizons.draw(key_horizon)
        flat, unravel = ravel_pytree(theta)
        basis = orthonormal(particle.surrogates.T)
        within = jax.random.normal(key_sub, (num_surrogates,), flat.dtype)
        stretch = sigma * jnp.sqrt((1 - alpha) * flat.size / num_surrogates)
        eps = jnp.sqrt(alpha) * ravel_pytree(perturb(key_eps, particle.id))[0]
        eps = unravel(eps + stretch * basis @ within)

        def half(sign):
            theta_i = add_scaled(theta, sign, eps)
            state = system.init(theta_i, key_begin, horizon)
            losses = unroll(system, theta_i, state, key_data, horizons.max)[1]
            return episode_loss(losses, horizons, horizon)

        positive, negative = jax.vmap(half)(jnp.array([1.0, -1.0]))
        contribution = scaled((positive - negative) / (2 * sigma**2), eps)
        newest = surrogate(theta, key_begin, horizon, key_data)
        surrogates = jnp.concatenate([newest[None], particle.surrogates[:-1]])
        finite = jnp.all(jnp.isfinite(newest))
        surrogates = jnp.where(finite, surrogates, particle.surrogates)
        return contribution, GuidedParticle(particle.id, surrogates), (positive + negative) / 2

    def estimate(theta, particles, key):
        episodes = partial(episode, perturbations(theta, key), theta, key)
        contributions, particles, losses = map_particles(episodes, particles, chunk)
        grad, _, metrics = population_mean(contributions, losses)
        return grad, particles, metrics

    return checked(
        "guided_es",
        system,
        init,
        estimate,
        differentiates=True,
        sampler=sampler,
        sigma=sigma * math.sqrt(alpha),  # Of the directions that no surrogate has.
    )


@dataclass(frozen=True)
class GuidedES(PairsConfig):
    """See ``guided_es``.

    Attributes:
      truncation: inner steps the surrogate gradients look back.
      num_surrogates: surrogate gradients a pair remembers.
      alpha: share of the isotropic part, in (0, 1].
    """

    truncation: int = 20
    num_surrogates: int = 1
    alpha: float = 0.5

    def __post_init__(self):
        super().__post_init__()
        check_whole(truncation=self.truncation, num_surrogates=self.num_surrogates)
        if not 0 < self.alpha <= 1:
            raise ValueError(f"`alpha` must be above 0 and at most 1, got alpha={self.alpha}.")

    @property
    def horizon_multiple(self):
        return self.truncation

    def inner_steps(self, horizon):
        return 1.5 * super().inner_steps(horizon)

    def make(self, system, horizons, context=ONE_DEVICE):
        return guided_es(
            system,
            horizons=horizons,
            truncation=self.truncation,
            num_surrogates=self.num_surrogates,
            alpha=self.alpha,
            **self.arguments(context),
        )
