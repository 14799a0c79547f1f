"""The loss at the end of an episode, as a sum of per-step differences."""

import jax
import jax.numpy as jnp

from meta_train.estimators.horizons import Horizons
from meta_train.unroll import UnrolledSystem


def telescoped(system: UnrolledSystem, horizons: Horizons) -> UnrolledSystem:
    """A system whose mean per-step loss is the *last* loss of an episode of ``system``.

    Its losses are ``(L_t - L_{t-1}) E[horizon]`` with ``L_{-1} = 0``, which telescope; so any
    estimator of the mean per-step loss becomes one of the final loss and learns from every
    truncation. With ``pes``: telescoped PES, ``xi_u (L_u - L_{u-1})`` per truncation.
    (Estimators that are blind across truncations stay so: truncated ES of this system sees
    each ``-L_{u-1}`` as a constant.) For low variance all losses of an episode should be
    scored alike, for example on one minibatch held over the episode. Costs a scalar of state.

    Args:
      system: any system.
      horizons: the distribution of episode lengths the estimator is given.

    Source: Vicol et al. 2021, telescoping sums. Differs: the authors' code pairs ``L_{u-1}``
    with ``xi_{u-1}``; both are unbiased.
    """

    def init(theta, key, horizon):
        state = system.init(theta, key, horizon)
        loss = jax.eval_shape(system.step, theta, state, key)[1]
        return state, jnp.zeros(loss.shape, loss.dtype)

    def step(theta, state, key):
        inner, previous = state
        inner, loss = system.step(theta, inner, key)
        return (inner, loss), (loss - previous) * horizons.mean

    return UnrolledSystem(init, step)
