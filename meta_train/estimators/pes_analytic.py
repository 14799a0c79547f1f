"""Persistent evolution strategies with the current truncation differentiated analytically."""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import optax

from meta_train.checks import check_positive
from meta_train.estimators.base import (
    GradientEstimator,
    checked,
    estimate_perturbed_windows,
)
from meta_train.estimators.config import ONE_DEVICE, TruncatedPairsConfig
from meta_train.estimators.derivatives import unroll_window
from meta_train.estimators.horizons import Horizons, check_truncation
from meta_train.estimators.particles import (
    antithetic_starts,
    check_population,
    init_particles,
    restart_if_done,
    window_loss,
)
from meta_train.estimators.perturbations import add_scaled, perturbation_sampler
from meta_train.unroll import UnrolledSystem, unroll


def pes_analytic(
    system: UnrolledSystem,
    *,
    num_pairs: int,
    truncation: int,
    horizons: Horizons,
    sigma: float,
    sampler: str = "normal",
    chunk: int | None = None,
) -> GradientEstimator:
    """PES whose noisiest term, the effect of theta on the current truncation, is exact.

    Beside each pair runs a state under theta itself. With ``p`` the gradient of the
    truncation's loss from that state (truncated backpropagation), per truncation

        g = mean_i p_i + xi_i * (D_i - eps_i . p_i) / sigma^2
        D_i = (L_i(theta + eps_i) - L_i(theta - eps_i)) / 2

    where ``xi_i`` sums the perturbations of *earlier* truncations, without ``eps_i``; the ``p_i``
    in it is a control variate, independent of ``xi_i``. The effect through earlier truncations is
    smoothed as in ``pes``, that of the current one is not: unbiased for the gradient of the mean
    per-step loss when the loss is quadratic in theta, or ``sigma`` small. The analytic part does
    not see jumps of the loss in theta (``derivatives``: a ReLU network inside has them), so with
    jumps within a truncation it is biased, which ``pes`` is not. Compute: ``3 N K`` forward and
    ``N K`` backward steps; memory: ``3 N`` inner states, ``N`` copies of theta, the residuals of
    ``K`` steps for each of ``chunk`` pairs.

    Args:
      num_pairs: ``N``, antithetic pairs; pair and mean share data and keys.
      truncation: ``K``, inner steps per outer step.
      horizons: distribution of episode lengths.
      sigma: standard deviation of the perturbations.
      sampler: their distribution; see ``perturbations.perturbation_sampler``.
      chunk: pairs computed at a time; see ``map_particles``.

    Raises:
      ValueError: on a ``truncation`` longer than any horizon, a non-positive number,
        or (from ``init``) a loss without a derivative.

    Source: Vicol et al. 2021, PES+Analytic. Differs: each pair has a mean state of its own,
    so a population covers many tasks and phases.
    """
    check_population(num_pairs, horizons, chunk, unit="pairs")
    check_positive(sigma=sigma)
    perturbations = perturbation_sampler(sampler, num_pairs, sigma)
    check_truncation(horizons, truncation)

    def begin(eps, theta, key, horizon):
        return system.init(theta, key, horizon), antithetic_starts(system, theta, eps)(key, horizon)

    def init(theta, key):
        zeros = jax.tree.map(jnp.zeros_like, theta)
        return init_particles(
            num_pairs, horizons, truncation, key, partial(begin, zeros, theta), zeros
        )

    def window(perturb, theta, key, particle):
        key_restart, key_eps, key_data = jax.random.split(jax.random.fold_in(key, particle.id), 3)
        eps = perturb(key_eps, particle.id)

        def mean_loss(theta):
            fresh = partial(begin, eps, theta)
            started = restart_if_done(particle, horizons, key_restart, fresh)
            mean = started._replace(states=started.states[0])
            mean_state, losses = unroll_window(system, theta, mean, horizons, key_data, truncation)
            return window_loss(started, horizons, losses), (started, mean_state)

        (loss, (started, mean_state)), direct = jax.value_and_grad(mean_loss, has_aux=True)(theta)

        def half(sign, state):
            return unroll(system, add_scaled(theta, sign, eps), state, key_data, truncation)

        pair, losses = jax.vmap(half)(jnp.array([1.0, -1.0]), started.states[1])
        positive, negative = window_loss(started, horizons, losses)
        indirect = (positive - negative) / 2 - optax.tree.vdot(eps, direct)
        contribution = add_scaled(direct, indirect / sigma**2, started.memory)
        advanced = started._replace(
            states=(mean_state, pair),
            position=started.position + truncation,
            memory=add_scaled(started.memory, 1.0, eps),
        )
        return contribution, advanced, loss

    estimate = estimate_perturbed_windows(window, perturbations, chunk)
    return checked(
        "pes_analytic",
        system,
        init,
        estimate,
        differentiates=True,
        sigma=sigma,
        sampler=sampler,
    )


@dataclass(frozen=True)
class PESAnalytic(TruncatedPairsConfig):
    """See ``pes_analytic``; it also runs an unperturbed run for each pair."""

    def make(self, system, horizons, context=ONE_DEVICE):
        return pes_analytic(system, horizons=horizons, **self.arguments(context))

    def inner_steps(self, horizon):
        return 1.5 * super().inner_steps(horizon)
