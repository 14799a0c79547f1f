"""Generalized persistent evolution strategies, and noise-reuse ES, its lowest-cost member."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import optax

from meta_train.checks import check_positive, check_whole, is_whole
from meta_train.estimators.base import (
    GradientEstimator,
    checked,
    estimate_perturbed_windows,
)
from meta_train.estimators.config import ONE_DEVICE, TruncatedPairsConfig
from meta_train.estimators.horizons import Horizons, check_truncation, num_windows
from meta_train.estimators.particles import (
    antithetic_starts,
    check_population,
    init_particles,
    restart_if_done,
    window_loss,
)
from meta_train.estimators.perturbations import add_scaled, perturbation_sampler, scaled
from meta_train.unroll import UnrolledSystem, unroll


def gpes(
    system: UnrolledSystem,
    *,
    num_pairs: int,
    truncation: int,
    noise_period: int,
    horizons: Horizons,
    sigma: float,
    sampler: str = "normal",
    chunk: int | None = None,
) -> GradientEstimator:
    """Persistent evolution strategies with a perturbation drawn anew every ``noise_period`` steps.

    Unbiased for the gradient of the mean per-step loss smoothed by an independent Gaussian
    perturbation of theta in each ``noise_period`` of an episode. Per truncation,

        g = mean_i xi_i * (L_i(theta + eps_i) - L_i(theta - eps_i)) / (2 sigma^2)

    where ``eps_i`` is the current perturbation and ``xi_i`` sums those of the episode so far.
    ``noise_period = truncation`` is ``pes``; ``noise_period >= horizon`` is ``nres``. Compute:
    ``2 N K`` forward steps; memory: ``2 N`` inner states and ``2 N`` copies of theta. Theta
    moves between truncations, so in training the estimate lags behind it (hysteresis).

    Args:
      num_pairs: ``N``, antithetic pairs; the halves share data and keys.
      truncation: inner steps per outer step (``W`` in the source).
      noise_period: inner steps per perturbation (``K`` in the source), a multiple of
        ``truncation``.
      horizons: distribution of episode lengths.
      sigma: standard deviation of the perturbations.
      sampler: their distribution; see ``perturbations.perturbation_sampler``.
      chunk: pairs computed at a time; see ``map_particles``.

    Raises:
      ValueError: on a ``truncation`` longer than any horizon, a noise period that is no
        multiple of it, or a non-positive number.

    Source: Li et al. 2023, "Variance-reduced gradient estimation via noise-reuse in online
    evolution strategies", Algorithm 3 and section 4. Differs: restarts fall only between
    truncations; losses are averaged over the truncation, not summed. A particle that starts
    in mid-episode draws its perturbation there.
    """
    check_population(num_pairs, horizons, chunk, unit="pairs")
    check_positive(sigma=sigma)
    perturbations = perturbation_sampler(sampler, num_pairs, sigma)
    check_truncation(horizons, truncation)
    if not is_whole(noise_period) or noise_period < 1 or noise_period % truncation:
        raise ValueError(
            f"`noise_period` must be a positive multiple of `truncation`, got noise_period="
            f"{noise_period}, truncation={truncation}; a perturbation lasts whole truncations."
        )
    # Longer than an episode is an episode, and need not fit a position.
    noise_period = min(noise_period, truncation * num_windows(horizons.max, truncation))

    def init(theta, key):
        key_particles, key_eps = jax.random.split(key)
        zeros = jax.tree.map(jnp.zeros_like, theta)
        begin = antithetic_starts(system, theta, zeros)
        particles = init_particles(
            num_pairs, horizons, truncation, key_particles, begin, (zeros, zeros)
        )

        perturb = perturbations(theta, key_eps)

        def draw(particle):
            eps = perturb(jax.random.fold_in(key_eps, particle.id), particle.id)
            started = particle.position % noise_period != 0
            eps = optax.tree.where(started, eps, zeros)
            return particle._replace(memory=(eps, eps))

        return jax.vmap(draw)(particles)

    def window(perturb, theta, key, particle):
        key_restart, key_eps, key_data = jax.random.split(jax.random.fold_in(key, particle.id), 3)
        drawn = perturb(key_eps, particle.id)
        begin = antithetic_starts(system, theta, drawn)
        particle = restart_if_done(particle, horizons, key_restart, begin)
        xi, eps = particle.memory
        draw = particle.position % noise_period == 0
        eps = optax.tree.where(draw, drawn, eps)
        xi = optax.tree.where(draw, add_scaled(xi, 1.0, eps), xi)

        def half(sign, state):
            return unroll(system, add_scaled(theta, sign, eps), state, key_data, truncation)

        states, losses = jax.vmap(half)(jnp.array([1.0, -1.0]), particle.states)
        positive, negative = window_loss(particle, horizons, losses)
        contribution = scaled((positive - negative) / (2 * sigma**2), xi)
        particle = particle._replace(
            states=states, position=particle.position + truncation, memory=(xi, eps)
        )
        return contribution, particle, (positive + negative) / 2

    estimate = estimate_perturbed_windows(window, perturbations, chunk)
    return checked("gpes", system, init, estimate, sigma=sigma, sampler=sampler)


def nres(
    system: UnrolledSystem,
    *,
    num_pairs: int,
    truncation: int,
    horizons: Horizons,
    sigma: float,
    sampler: str = "normal",
    chunk: int | None = None,
) -> GradientEstimator:
    """Noise-reuse ES (ES-Single): one perturbation an episode, used in all its truncations.

    Unbiased for the gradient of the mean per-step loss smoothed by *one* Gaussian
    perturbation of theta held over the episode, the objective of ``full_es``, but one
    truncation at a time:

        g = mean_i eps_i * (L_i(theta + eps_i) - L_i(theta - eps_i)) / (2 sigma^2).

    Its variance does not grow with the number of truncations in an episode, as that of
    ``pes`` may. Without restarts the perturbations are never drawn again, and the population
    must span theta. Compute: ``2 N K`` forward steps; memory: ``2 N`` inner states and
    ``2 N`` copies of theta.

    Args, Raises: those of ``gpes``.

    Source: Li et al. 2023 (NRES), Vicol 2023 (ES-Single): the same estimator found twice.
    """
    check_truncation(horizons, truncation)
    return gpes(
        system,
        num_pairs=num_pairs,
        truncation=truncation,
        noise_period=truncation * num_windows(horizons.max, truncation),
        horizons=horizons,
        sigma=sigma,
        sampler=sampler,
        chunk=chunk,
    )


es_single = nres


@dataclass(frozen=True)
class GPES(TruncatedPairsConfig):
    """See ``gpes``.

    Attributes:
      noise_period: inner steps per perturbation, a multiple of ``truncation``; 0: two truncations.
    """

    noise_period: int = 0

    def __post_init__(self):
        super().__post_init__()
        check_whole(0, noise_period=self.noise_period)
        if self.noise_period % self.truncation:
            raise ValueError(
                f"`noise_period` must be a multiple of `truncation`={self.truncation}, or 0 for "
                f"two truncations, got noise_period={self.noise_period}."
            )

    def make(self, system, horizons, context=ONE_DEVICE):
        return gpes(
            system,
            horizons=horizons,
            noise_period=self.noise_period or 2 * self.truncation,
            **self.arguments(context),
        )


@dataclass(frozen=True)
class NRES(TruncatedPairsConfig):
    """See ``nres``."""

    def make(self, system, horizons, context=ONE_DEVICE):
        return nres(system, horizons=horizons, **self.arguments(context))
