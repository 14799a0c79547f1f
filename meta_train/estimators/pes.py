"""Persistent evolution strategies."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from meta_train.checks import check_positive
from meta_train.estimators.base import (
    GradientEstimator,
    checked,
    estimate_perturbed_windows,
)
from meta_train.estimators.config import ONE_DEVICE, TruncatedPairsConfig
from meta_train.estimators.horizons import Horizons, check_truncation
from meta_train.estimators.particles import (
    antithetic_starts,
    check_population,
    init_particles,
    restart_if_done,
    window_loss,
)
from meta_train.estimators.perturbations import add_scaled, perturbation_sampler, scaled
from meta_train.unroll import UnrolledSystem, unroll


def pes(
    system: UnrolledSystem,
    *,
    num_pairs: int,
    truncation: int,
    horizons: Horizons,
    sigma: float,
    sampler: str = "normal",
    chunk: int | None = None,
) -> GradientEstimator:
    """Persistent evolution strategies: no truncation bias, at the price of truncated ES.

    Unbiased for the gradient of the mean per-step loss smoothed by an independent
    Gaussian perturbation of theta *in each truncation* (which equals the smoothing of
    full ES only up to quadratic losses). Per truncation,

        g = mean_i xi_i * (L_i(theta + eps_i) - L_i(theta - eps_i)) / (2 sigma^2)

    where ``xi_i`` sums the ``eps_i`` drawn since particle ``i`` last restarted, and ``L_i``
    is the mean loss of the truncation. Compute: ``2 N K`` forward steps; memory: ``2 N``
    inner states and ``N`` copies of theta. Theta moves between truncations, so in training
    the estimate lags behind it (hysteresis), as for every online method.

    Args:
      num_pairs: ``N``, antithetic pairs; the halves share data and keys.
      truncation: ``K``, inner steps per outer step.
      horizons: distribution of episode lengths.
      sigma: standard deviation of the perturbations.
      sampler: their distribution; see ``perturbations.perturbation_sampler``.
      chunk: pairs computed at a time; see ``map_particles``.

    Raises:
      ValueError: on a ``truncation`` longer than any horizon, or a non-positive number.

    Source: Vicol, Metz, Sohl-Dickstein 2021, Algorithm 2. Differs: restarts fall only
    between truncations, so no truncation mixes two episodes (one that ends within a truncation
    idles until the next); losses are averaged over the truncation, not summed.
    """
    check_population(num_pairs, horizons, chunk, unit="pairs")
    check_positive(sigma=sigma)
    perturbations = perturbation_sampler(sampler, num_pairs, sigma)
    check_truncation(horizons, truncation)

    def init(theta, key):
        zeros = jax.tree.map(jnp.zeros_like, theta)
        begin = antithetic_starts(system, theta, zeros)
        return init_particles(num_pairs, horizons, truncation, key, begin, zeros)

    def window(perturb, theta, key, particle):
        key_restart, key_eps, key_data = jax.random.split(jax.random.fold_in(key, particle.id), 3)
        eps = perturb(key_eps, particle.id)
        begin = antithetic_starts(system, theta, eps)
        particle = restart_if_done(particle, horizons, key_restart, begin)
        xi = add_scaled(particle.memory, 1.0, eps)

        def half(sign, state):
            return unroll(system, add_scaled(theta, sign, eps), state, key_data, truncation)

        states, losses = jax.vmap(half)(jnp.array([1.0, -1.0]), particle.states)
        positive, negative = window_loss(particle, horizons, losses)
        contribution = scaled((positive - negative) / (2 * sigma**2), xi)
        particle = particle._replace(
            states=states, position=particle.position + truncation, memory=xi
        )
        return contribution, particle, (positive + negative) / 2

    estimate = estimate_perturbed_windows(window, perturbations, chunk)
    return checked("pes", system, init, estimate, sigma=sigma, sampler=sampler)


@dataclass(frozen=True)
class PES(TruncatedPairsConfig):
    """See ``pes``."""

    def make(self, system, horizons, context=ONE_DEVICE):
        return pes(system, horizons=horizons, **self.arguments(context))
