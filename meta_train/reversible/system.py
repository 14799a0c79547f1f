"""Unrolled systems whose episodes can be walked back exactly."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from meta_train.reversible.arithmetic import (
    SINGLE,
    FixedPoint,
    SpillPlan,
    check_fixed_point,
    plan_spills,
)
from meta_train.reversible.dynamics import Cotangents, Dynamics, float_step, reverse, run
from meta_train.reversible.report import Report
from meta_train.unroll import UnrolledSystem

Theta = Any


class Start(NamedTuple):
    """The start of an episode.

    Attributes:
      context: what stays the same over the episode (the problem); independent of theta.
      weights: float ``[P]``.
      accumulators: float ``[K, P]``.
    """

    context: Any
    weights: jax.Array
    accumulators: jax.Array


class State(NamedTuple):
    """The state of the system as the other estimators see it, in ordinary floats."""

    context: Any
    weights: jax.Array
    accumulators: jax.Array
    step: jax.Array


class ReversibleForm(NamedTuple):
    """A system in the form whose episodes can be walked back; see ``reversible_system``.

    Attributes:
      begin: ``(theta, key, horizon) -> Start``.
      dynamics: ``context -> Dynamics`` with ``hyper = ()`` and inputs ``(step, key)``.
      decays: float ``[K]``, the decays of the accumulators.
      fixed: resolution of the exact state.
    """

    begin: Callable[[Theta, jax.Array, ArrayLike], Start]
    dynamics: Callable[[Any], Dynamics]
    decays: np.ndarray
    fixed: FixedPoint

    def of(self, to_theta: Callable[[Any], Theta]) -> "ReversibleForm":
        """The same system as a function of what ``to_theta`` maps to its theta."""
        return self._replace(
            begin=lambda theta, *rest: self.begin(to_theta(theta), *rest),
            dynamics=lambda context: self.dynamics(context).of(to_theta),
        )


def reversible_system(
    begin: Callable[[Theta, jax.Array, ArrayLike], Start],
    dynamics: Callable[[Any], Dynamics],
    decays: np.ndarray,
    fixed: FixedPoint = SINGLE,
) -> UnrolledSystem:
    """The system with these dynamics, in ordinary floats for every estimator, and reversible.

    Up to rounding, both forms are the same system. Arguments as in ``ReversibleForm``.

    Raises:
      ValueError: on a decay that is no multiple of ``2^-decay_bits`` in (0, 1].
    """
    check_fixed_point(fixed)
    numerators = np.asarray(decays, np.float64) * 2**fixed.decay_bits
    if np.any(numerators != np.round(numerators)) or np.any(numerators < 1):
        raise ValueError(
            f"`decays` must be positive multiples of 2^-{fixed.decay_bits}, got {decays}; "
            "round them with `arithmetic.snap`."
        )
    if np.any(numerators > 2**fixed.decay_bits):
        raise ValueError(f"`decays` must be at most 1, got {decays}.")

    def init(theta, key, horizon):
        return State(*begin(theta, key, horizon), jnp.zeros([], jnp.int32))

    def step(theta, state, key):
        weights, accumulators, loss = float_step(
            dynamics(state.context),
            theta,
            (),
            (state.step, key),
            state.weights,
            state.accumulators,
        )
        return State(state.context, weights, accumulators, state.step + 1), loss

    form = ReversibleForm(begin, dynamics, np.asarray(decays), fixed)
    return UnrolledSystem(init, step, form)


def plan(system: ReversibleForm, num_steps: int) -> SpillPlan:
    """When the buffers of an episode of ``num_steps`` spill, and how large its tape is."""
    numerators = np.round(system.decays * 2**system.fixed.decay_bits).astype(np.int64)
    return plan_spills(np.tile(numerators, (num_steps, 1)), system.fixed.decay_bits)


def episode_gradient(
    system: ReversibleForm,
    theta: Theta,
    key_begin: jax.Array,
    horizon: ArrayLike,
    step_keys: jax.Array,
    objective: Callable[[jax.Array], jax.Array],
) -> tuple[jax.Array, Theta, Report]:
    """The exact gradient of ``objective(losses)`` of one episode, walked back.

    Compute: the episode, and about seven times that to walk back; see the estimator. Memory:
    one step, and a tape of ``sum_k log2(1 / decay_k)`` bits per weight and step.

    Args:
      horizon: steps of the episode, at most ``T``; after them it rests, with losses of 0.
      step_keys: one key a step, ``[T]``.
      objective: ``losses [T] -> scalar``.

    Returns:
      The objective's value, its gradient (NaN if not exact) and the report.

    Raises:
      TypeError: when it is itself differentiated.
    """
    (context, weights, accumulators), pull_begin = jax.vjp(
        lambda theta: system.begin(theta, key_begin, horizon), theta
    )
    num_steps = step_keys.shape[0]
    inputs = jnp.arange(num_steps, dtype=jnp.int32), step_keys
    dynamics = system.dynamics(context)
    if not isinstance(horizon, int) or horizon < num_steps:
        dynamics = _resting(dynamics, horizon, weights, jax.tree.map(lambda x: x[0], inputs))
    arguments = (
        dynamics,
        theta,
        (),
        inputs,
        weights,
        accumulators,
        plan(system, num_steps),
        system.fixed,
    )
    ended = run(*arguments)
    value, d_losses = jax.value_and_grad(objective)(ended.observed)
    cotangents = Cotangents(jnp.zeros_like(weights), jnp.zeros_like(accumulators), d_losses)
    gradients, report, _ = reverse(*arguments, ended, cotangents)
    no_gradient = jax.tree.map(_zero_cotangent, context)
    (through_start,) = pull_begin(Start(no_gradient, gradients.weights, gradients.accumulators))
    return value, jax.tree.map(jnp.add, gradients.theta, through_start), report


def _resting(dynamics: Dynamics, horizon: ArrayLike, weights: jax.Array, x: Any) -> Dynamics:
    """The dynamics until step ``horizon``, and then nothing: no loss, no gradient, no move.

    Accumulators decay to the end, which loses nothing. Under ``vmap`` what rests is computed all
    the same, and a derivative that is not finite would make its product with zero not a number:
    so at the first step's ``weights`` and ``x``, where no episode does without it.
    """

    def here(now, w):
        runs = now[0] < horizon
        return (*jax.tree.map(lambda a, b: jnp.where(runs, a, b), (now, w), (x, weights)), runs)

    def unless_resting(runs, value):
        return jnp.where(runs, value, jnp.zeros_like(value))

    def loss(theta, w, now):
        now, w, runs = here(now, w)
        return unless_resting(runs, dynamics.loss(theta, w, now))

    def absorb(theta, hyper, gradient, now):
        now, _, runs = here(now, weights)
        return unless_resting(runs, dynamics.absorb(theta, hyper, gradient, now))

    def move(theta, hyper, accumulators, now):
        now, _, runs = here(now, weights)
        return unless_resting(runs, dynamics.move(theta, hyper, accumulators, now))

    def observe(theta, loss, w, now):
        now, w, runs = here(now, w)
        return unless_resting(runs, dynamics.observe(theta, loss, w, now))

    return Dynamics(loss, dynamics.decay, absorb, move, observe)


def _zero_cotangent(x: jax.Array):
    if jnp.issubdtype(x.dtype, jnp.inexact):
        return jnp.zeros_like(x)
    return np.zeros(x.shape, jax.dtypes.float0)
