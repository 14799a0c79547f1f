"""The exact meta-gradient by walking the inner run back, in almost no memory."""

from functools import partial

import jax
import jax.numpy as jnp

from meta_train.estimators import base
from meta_train.reversible.system import episode_gradient
from meta_train.unroll import UnrolledSystem


def reversible(
    system: UnrolledSystem,
    *,
    num_particles: int,
    horizons: base.Horizons,
    chunk: int | None = None,
) -> base.GradientEstimator:
    """Reversible backpropagation over whole episodes: the exact gradient of the mean per-step loss.

    The same estimate as ``bptt``, with the same keys, up to rounding, and in memory that
    does not grow with the episode but for a tape of a few bits per weight and step. ``N T``
    forward steps, and two to three times as much to walk back. An episode that could not be
    recovered to the bit has NaN as its gradient: it contributes nothing, and ``exact``, the
    share of recovered episodes, falls below 1.

    Args:
      system: from ``reversible_inner_training`` or ``reversible_system``.
      num_particles: ``N``, episodes per outer step.
      horizons: distribution of episode lengths (``T`` is the largest; shorter are masked).
      chunk: episodes computed at a time; see ``base.map_particles``.

    Raises:
      ValueError: on a system without a reversible form, or a non-positive number.

    Source: Maclaurin, Duvenaud, Adams 2015; here for any optimizer that moves the weights
    by what its post-update accumulators say.
    """
    base.check_positive(num_particles=num_particles)
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
        value, grad, report = episode_gradient(
            system.reversible,
            theta,
            key_begin,
            jax.random.split(key_data, horizons.max),
            lambda losses: base.episode_loss(losses, horizons, key_horizon),
        )
        return value, grad, report.ok

    def estimate(theta, ids, key):
        losses, grads, exact = base.map_particles(partial(episode, theta, key), ids, chunk)
        grad, _, metrics = base.population_mean(grads, losses)
        return grad, ids, metrics | {"exact": jnp.mean(exact.astype(losses.dtype))}

    return base.GradientEstimator(init, estimate)
