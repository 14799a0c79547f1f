"""Backpropagation through whole episodes and through truncations."""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp

from meta_train.estimators.base import GradientEstimator, checked, map_particles, population_mean
from meta_train.estimators.config import ONE_DEVICE, ParticlesConfig, TruncatedConfig
from meta_train.estimators.derivatives import resting_after_horizon, unroll_window
from meta_train.estimators.horizons import Horizons, check_truncation, episode_loss
from meta_train.estimators.particles import (
    check_population,
    end_if_nonfinite,
    init_particles,
    restart_if_done,
    window_loss,
)
from meta_train.estimators.perturbations import Theta
from meta_train.unroll import UnrolledSystem, unroll


def _keep_draws(primitive, *_, **__) -> bool:
    """Random bits are the one thing dear to compute and cheap to keep."""
    return primitive.name == "random_bits"


def rematerialized(system: UnrolledSystem) -> UnrolledSystem:
    """The system with steps recomputed in the backward pass instead of stored.

    The backward pass then keeps the states of the unroll and the residuals of one step.
    """
    step = jax.checkpoint(system.step, prevent_cse=False, policy=_keep_draws)
    return UnrolledSystem(system.init, step)


def theta_per_particle(theta: Theta, particles) -> Theta:
    """A copy of theta for every particle, ``[N, ...]``.

    Each particle's gradient is wanted on its own. Differentiating one shared theta under
    ``vmap`` gives the same numbers, but XLA then merges the particles' products and splits
    them again, with transposes that cost as much as the products.
    """
    num = jax.tree.leaves(particles)[0].shape[0]
    return jax.tree.map(lambda x: jnp.broadcast_to(x, (num, *x.shape)), theta)


def bptt(
    system: UnrolledSystem,
    *,
    num_particles: int,
    horizons: Horizons,
    chunk: int | None = None,
) -> GradientEstimator:
    """Backpropagation through time over whole episodes: the exact gradient of each.

    Unbiased for the mean of the derivative of the mean per-step loss, which is the derivative of
    its mean only where the loss does not jump in theta. With a ReLU network inside it does, and
    the two can differ in sign: see ``derivatives``.

    ``N T`` forward and backward steps, the forward ones twice; memory: ``T`` inner states
    and the residuals of one step, for each of the ``chunk`` episodes computed at a time.

    Args:
      num_particles: ``N``, episodes per outer step.
      horizons: distribution of episode lengths (``T`` is the largest; shorter are masked).
      chunk: episodes computed at a time; see ``map_particles``.

    Raises:
      ValueError: on a non-positive number, or (from ``init``) a loss without a derivative.

    Source: Vicol et al. 2021, section 2 and Table 1.
    """
    check_population(num_particles, horizons, chunk)

    def init(theta, key):
        del theta, key
        return jnp.arange(num_particles, dtype=jnp.int32)

    def episode(key, theta_and_id):
        theta, particle_id = theta_and_id
        key_restart, key_data = jax.random.split(jax.random.fold_in(key, particle_id))
        key_horizon, key_begin = jax.random.split(key_restart)
        horizon = horizons.draw(key_horizon)

        run = rematerialized(resting_after_horizon(system, horizons, horizon))

        def loss(theta):
            state = run.init(theta, key_begin, horizon)
            losses = unroll(run, theta, state, key_data, horizons.max)[1]
            return episode_loss(losses, horizons, horizon)

        return jax.value_and_grad(loss)(theta)

    def estimate(theta, ids, key):
        losses, grads = map_particles(
            partial(episode, key), (theta_per_particle(theta, ids), ids), chunk
        )
        grad, _, metrics = population_mean(grads, losses)
        return grad, ids, metrics

    return checked("bptt", system, init, estimate, differentiates=True)


def tbptt(
    system: UnrolledSystem,
    *,
    num_particles: int,
    truncation: int,
    horizons: Horizons,
    chunk: int | None = None,
) -> GradientEstimator:
    """Truncated backpropagation through time: exact within a truncation, blind beyond it.

    The inner state crosses a truncation as a constant, so the effect of theta on later
    truncations through the state is missing: biased to short horizons. A state that is
    initialized from theta is differentiated in the first truncation of an episode. Jumps of the
    loss in theta (a ReLU network inside has them) do not count either: see ``derivatives``.
    ``N K`` forward and backward steps, the forward ones twice; memory: ``N`` inner states,
    and ``K`` states and the residuals of one step for each of the ``chunk`` particles
    computed at a time.

    Args:
      num_particles: ``N``, inner runs.
      truncation: ``K``, inner steps per outer step.
      horizons: distribution of episode lengths.
      chunk: particles computed at a time; see ``map_particles``.

    Raises:
      ValueError: on a ``truncation`` longer than any horizon, a non-positive number, or
        (from ``init``) a loss without a derivative.

    Source: Vicol et al. 2021, section 2 and Table 1.
    """
    check_population(num_particles, horizons, chunk)
    check_truncation(horizons, truncation)

    def init(theta, key):
        begin = partial(system.init, theta)
        return init_particles(num_particles, horizons, truncation, key, begin, ())

    remat_system = rematerialized(system)

    def window(key, theta_and_particle):
        theta, particle = theta_and_particle
        key_restart, key_data = jax.random.split(jax.random.fold_in(key, particle.id))

        def loss(theta):
            started = restart_if_done(particle, horizons, key_restart, partial(system.init, theta))
            state, losses = unroll_window(
                remat_system, theta, started, horizons, key_data, truncation
            )
            return window_loss(started, horizons, losses), started._replace(
                states=state, position=started.position + truncation
            )

        (mean_loss, advanced), grad = jax.value_and_grad(loss, has_aux=True)(theta)
        return grad, advanced, mean_loss

    def estimate(theta, particles, key):
        grads, particles, losses = map_particles(
            partial(window, key), (theta_per_particle(theta, particles), particles), chunk
        )
        grad, finite, metrics = population_mean(grads, losses)
        return grad, end_if_nonfinite(particles, finite), metrics

    return checked("tbptt", system, init, estimate, differentiates=True)


@dataclass(frozen=True)
class BPTT(ParticlesConfig):
    """See ``bptt``."""

    def make(self, system, horizons, context=ONE_DEVICE):
        return bptt(system, horizons=horizons, **self.arguments(context))


@dataclass(frozen=True)
class TBPTT(TruncatedConfig):
    """See ``tbptt``."""

    def make(self, system, horizons, context=ONE_DEVICE):
        return tbptt(system, horizons=horizons, **self.arguments(context))
