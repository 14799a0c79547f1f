"""The one system every estimator sees: a computation graph unrolled through time."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.flatten_util import ravel_pytree
from jax.typing import ArrayLike

from meta_train.checks import check_theta

Theta = Any
State = Any


class UnrolledSystem(NamedTuple):
    """``s_{t+1}, L_t = step(theta, s_t, key_t)`` from ``s_0 = init(theta, key, horizon)``.

    Training an RNN, tuning a schedule, meta-training a learned optimizer, learning a
    control policy: each is one of these, and every gradient estimator estimates the
    gradient of the mean of ``L_t`` over an episode with respect to ``theta``.

    Attributes:
      init: ``(theta, key, horizon) -> state``. The state at the start of an episode of
        ``horizon`` steps, an int32 scalar: what depends on the length keeps it in the state.
      step: ``(theta, state, key) -> (state, loss)``. One step. The new state has the structure,
        shapes and dtypes of the old one; ``loss`` is a real float of shape (). All randomness
        comes from ``key``, so equal keys give equal draws for any ``theta`` (common random
        numbers).
      reversible: the same system in a form whose episodes can be walked back exactly, where
        there is one: a ``meta_train.reversible.system.ReversibleForm``.
    """

    init: Callable[[Theta, jax.Array, ArrayLike], State]
    step: Callable[[Theta, State, jax.Array], tuple[State, jax.Array]]
    reversible: Any = None


def unroll(
    system: UnrolledSystem, theta: Theta, state: State, key: jax.Array, num_steps: int
) -> tuple[State, jax.Array]:
    """Runs ``num_steps`` steps; step ``i`` gets the ``i``-th split of ``key``.

    Returns:
      The state after the last step and the losses, float ``[num_steps]``.
    """

    def body(state, step_key):
        return system.step(theta, state, step_key)

    return jax.lax.scan(body, state, jax.random.split(key, num_steps))


def theta_tree(theta_spec: Theta) -> Callable[[jax.Array], Theta]:
    """The function from theta as one vector ``[P]`` back to its pytree.

    Args:
      theta_spec: shapes and dtypes of theta, from ``jax.eval_shape``.
    """
    found: list[Callable[[jax.Array], Theta]] = []

    def ravel(theta):
        flat, unravel = ravel_pytree(theta)
        found.append(unravel)  # It knows shapes alone.
        return flat

    jax.eval_shape(ravel, theta_spec)  # Of an array it would be compiled.
    return found[0]


def with_flat_theta(
    system: UnrolledSystem, theta_spec: Theta
) -> tuple[UnrolledSystem, Callable[[jax.Array], Theta]]:
    """The same system over theta as one vector ``[P]``, and the function back to its pytree.

    Estimators and meta-optimizers do the same to every leaf of theta; on one vector there
    is one operation to compile instead of one a leaf.

    Args:
      theta_spec: shapes and dtypes of theta, from ``jax.eval_shape``.

    Raises:
      ValueError: if theta is empty or not of real floats.
    """
    check_theta(theta_spec)
    unravel = theta_tree(theta_spec)
    flat_system = UnrolledSystem(
        lambda theta, key, horizon: system.init(unravel(theta), key, horizon),
        lambda theta, state, key: system.step(unravel(theta), state, key),
        system.reversible and system.reversible.of(unravel),
    )
    return flat_system, unravel
