"""The exact meta-gradient by walking the inner run back, in almost no memory."""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp

from meta_train.estimators.base import (
    GradientEstimator,
    Metrics,
    checked,
    map_particles,
    population_mean,
)
from meta_train.estimators.config import ONE_DEVICE, ParticlesConfig
from meta_train.estimators.horizons import Horizons, episode_loss
from meta_train.estimators.particles import check_population
from meta_train.reversible.report import Failure, Report, poison
from meta_train.reversible.system import episode_gradient
from meta_train.unroll import UnrolledSystem


def reversible(
    system: UnrolledSystem,
    *,
    num_particles: int,
    horizons: Horizons,
    chunk: int | None = None,
) -> GradientEstimator:
    """Reversible backpropagation over whole episodes: the exact gradient of the mean per-step loss.

    The same estimate as ``bptt``, with the same keys, up to rounding (so, where the loss jumps in
    theta, the mean of its derivative and not the derivative of its mean: see ``derivatives``),
    and in memory that does not grow with the episode but for a tape of a few bits per weight and
    step. ``N T`` forward steps in exact arithmetic, and about seven times as much to walk back:
    in all, twice the time of ``bptt`` (8 to 11 forward steps a step on digits networks, on one
    core).

    A derivative of each episode, not of the mean loss, where the loss of an episode jumps in
    theta: the inner gradient of a ReLU network jumps where a unit turns on or off, so weights and
    losses after it do. Derivatives see none of these jumps, and their mean is then not the
    derivative of the mean (nor is that of ``bptt``): use a smooth activation, or an evolution
    strategy.

    An episode that diverged, whose state left the fixed-point range, or which is lost in the
    rounding to the grid (``Failure.UNDERFLOW``) has no exact gradient:
    like other non-finite ones it contributes nothing, and is counted. But where the reversal
    itself disagrees with the run (``Failure.REPLAY``, ``Failure.START``), the program is broken
    and no episode can be trusted: the whole estimate is NaN.

    Metrics, means over the episodes like all others: ``exact``, the share that was recovered to
    the bit; for every ``Failure``, as in ``failed_loss``, the share that it ended first; and
    ``failed_step``, the steps of these failures, 0 for exact episodes (over ``1 - exact`` it is
    their mean step).

    Args:
      system: from ``reversible_inner_training`` or ``reversible_system``.
      num_particles: ``N``, episodes per outer step.
      horizons: distribution of episode lengths (``T`` is the largest; shorter are masked).
      chunk: episodes computed at a time; see ``map_particles``.

    Raises:
      ValueError: on a system without a reversible form, or a non-positive number.

    Source: Maclaurin, Duvenaud, Adams 2015; here for any optimizer that moves the weights
    by what its post-update accumulators say.
    """
    check_population(num_particles, horizons, chunk)
    if system.reversible is None:
        raise ValueError(
            "`system` must have a reversible form, got one whose steps cannot be undone. Make it "
            "with `reversible_inner_training` and an optimizer from `learned_opt.reversible`, or "
            "use another estimator (`bptt` has the same expectation)."
        )

    def init(theta, key):
        del theta, key
        return jnp.arange(num_particles, dtype=jnp.int32)

    def episode(theta, key, particle_id):
        key_restart, key_data = jax.random.split(jax.random.fold_in(key, particle_id))
        key_horizon, key_begin = jax.random.split(key_restart)
        # A number that is known needs no rest after it.
        horizon = horizons.max if horizons.fixed else horizons.draw(key_horizon)
        value, grad, report = episode_gradient(
            system.reversible,
            theta,
            key_begin,
            horizon,
            jax.random.split(key_data, horizons.max),
            lambda losses: episode_loss(losses, horizons, horizon),
        )
        return value, grad, report

    def estimate(theta, ids, key):
        losses, grads, reports = map_particles(partial(episode, theta, key), ids, chunk)
        grad, _, metrics = population_mean(grads, losses)
        broken = (reports.failure == Failure.REPLAY) | (reports.failure == Failure.START)
        return poison(~jnp.any(broken), grad), ids, metrics | _shares(reports, losses.dtype)

    return checked("reversible", system, init, estimate)


def _shares(reports: Report, dtype) -> Metrics:
    """How often episodes failed, why and when, from their reports ``[N]``."""
    shares = {
        "exact" if failure == Failure.NONE else f"failed_{failure.name.lower()}": jnp.mean(
            reports.failure == failure, dtype=dtype
        )
        for failure in Failure
    }
    return shares | {"failed_step": jnp.mean(jnp.maximum(reports.step, 0), dtype=dtype)}


@dataclass(frozen=True)
class Reversible(ParticlesConfig):
    """See ``reversible``; inner training must be in reversible form."""

    @property
    def needs_reversible(self):
        return True

    def make(self, system, horizons, context=ONE_DEVICE):
        return reversible(system, horizons=horizons, **self.arguments(context))
