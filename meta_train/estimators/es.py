"""Evolution strategies over full episodes and over truncations."""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp

from meta_train.checks import check_positive
from meta_train.estimators.base import (
    GradientEstimator,
    checked,
    estimate_perturbed_windows,
    map_particles,
    population_mean,
)
from meta_train.estimators.config import ONE_DEVICE, PairsConfig, TruncatedPairsConfig
from meta_train.estimators.horizons import Horizons, check_truncation, episode_loss
from meta_train.estimators.particles import (
    check_population,
    init_particles,
    restart_if_done,
    window_loss,
)
from meta_train.estimators.perturbations import add_scaled, perturbation_sampler, scaled
from meta_train.unroll import UnrolledSystem, unroll


def full_es(
    system: UnrolledSystem,
    *,
    num_pairs: int,
    horizons: Horizons,
    sigma: float,
    sampler: str = "normal",
    chunk: int | None = None,
) -> GradientEstimator:
    """Antithetic evolution strategies over whole episodes.

    Unbiased for the gradient of the mean per-step loss smoothed by *one* Gaussian
    perturbation of theta held over the episode:

        g = mean_i eps_i * (L_i(theta + eps_i) - L_i(theta - eps_i)) / (2 sigma^2).

    Every outer step runs whole episodes: ``2 N T`` forward steps with ``T`` the largest
    horizon (shorter ones are masked). Memory: ``2 N`` inner states.

    Args:
      num_pairs: ``N``, antithetic pairs; the halves share data and keys.
      horizons: distribution of episode lengths.
      sigma: standard deviation of the perturbations.
      sampler: their distribution; see ``perturbations.perturbation_sampler``.
      chunk: pairs computed at a time; see ``map_particles``.

    Raises:
      ValueError: on a non-positive number.

    Source: Vicol et al. 2021, section 3, equation 3 (antithetic form).
    """
    check_population(num_pairs, horizons, chunk, unit="pairs")
    check_positive(sigma=sigma)
    perturbations = perturbation_sampler(sampler, num_pairs, sigma)

    def init(theta, key):
        del theta, key
        return jnp.arange(num_pairs, dtype=jnp.int32)

    def episode(perturb, theta, key, particle_id):
        key_restart, key_eps, key_data = jax.random.split(jax.random.fold_in(key, particle_id), 3)
        key_horizon, key_begin = jax.random.split(key_restart)
        horizon = horizons.draw(key_horizon)
        eps = perturb(key_eps, particle_id)

        def half(sign):
            theta_i = add_scaled(theta, sign, eps)
            state = system.init(theta_i, key_begin, horizon)
            losses = unroll(system, theta_i, state, key_data, horizons.max)[1]
            return episode_loss(losses, horizons, horizon)

        positive, negative = jax.vmap(half)(jnp.array([1.0, -1.0]))
        contribution = scaled((positive - negative) / (2 * sigma**2), eps)
        return contribution, (positive + negative) / 2

    def estimate(theta, ids, key):
        episodes = partial(episode, perturbations(theta, key), theta, key)
        contributions, losses = map_particles(episodes, ids, chunk)
        grad, _, metrics = population_mean(contributions, losses)
        return grad, ids, metrics

    return checked("full_es", system, init, estimate, sigma=sigma, sampler=sampler)


def truncated_es(
    system: UnrolledSystem,
    *,
    num_pairs: int,
    truncation: int,
    horizons: Horizons,
    sigma: float,
    sampler: str = "normal",
    chunk: int | None = None,
) -> GradientEstimator:
    """Antithetic evolution strategies on each truncation alone: biased to short horizons.

    Each pair perturbs theta from one shared inner state (at the start of an episode, from the
    start under its own theta), which then advances under theta itself. The expectation is
    that of truncated backpropagation, smoothed: it misses the effect of theta on later
    truncations through the state. ``3 N K`` forward steps;
    memory: ``N`` inner states.

    Args:
      num_pairs: ``N``, antithetic pairs, each with its own inner state.
      truncation: ``K``, inner steps per outer step.
      horizons: distribution of episode lengths.
      sigma: standard deviation of the perturbations.
      sampler: their distribution; see ``perturbations.perturbation_sampler``.
      chunk: pairs computed at a time; see ``map_particles``.

    Raises:
      ValueError: on a ``truncation`` longer than any horizon, or a non-positive number.

    Source: Vicol et al. 2021, Algorithm 1 (right column). Differs: the paper advances one
    inner state for the whole population; here every pair has its own, so a population
    covers many tasks and phases.
    """
    check_population(num_pairs, horizons, chunk, unit="pairs")
    check_positive(sigma=sigma)
    perturbations = perturbation_sampler(sampler, num_pairs, sigma)
    check_truncation(horizons, truncation)

    def init(theta, key):
        begin = partial(system.init, theta)
        return init_particles(num_pairs, horizons, truncation, key, begin, ())

    def window(perturb, theta, key, particle):
        key_restart, key_eps, key_data = jax.random.split(jax.random.fold_in(key, particle.id), 3)
        eps = perturb(key_eps, particle.id)

        def branch(sign):
            theta_i = add_scaled(theta, sign, eps)
            begin = partial(system.init, theta_i)
            started = restart_if_done(particle, horizons, key_restart, begin)
            states, losses = unroll(system, theta_i, started.states, key_data, truncation)
            position = started.position + truncation
            loss = window_loss(started, horizons, losses)
            return started._replace(states=states, position=position), loss

        branches, losses = jax.vmap(branch)(jnp.array([1.0, -1.0, 0.0]))
        positive, negative, unperturbed = losses
        contribution = scaled((positive - negative) / (2 * sigma**2), eps)
        return contribution, jax.tree.map(lambda x: x[2], branches), unperturbed

    estimate = estimate_perturbed_windows(window, perturbations, chunk)
    return checked("truncated_es", system, init, estimate, sigma=sigma, sampler=sampler)


@dataclass(frozen=True)
class FullES(PairsConfig):
    """See ``full_es``."""

    def make(self, system, horizons, context=ONE_DEVICE):
        return full_es(system, horizons=horizons, **self.arguments(context))


@dataclass(frozen=True)
class TruncatedES(TruncatedPairsConfig):
    """See ``truncated_es``; it also advances an unperturbed run for each pair."""

    def make(self, system, horizons, context=ONE_DEVICE):
        return truncated_es(system, horizons=horizons, **self.arguments(context))

    def inner_steps(self, horizon):
        return 1.5 * super().inner_steps(horizon)
