"""Forward-mode estimators: sensitivities of the state to theta are carried along with it.

All three carry, beside the state ``s``, what they know of ``J = ds/dtheta``: RTRL all of
it, UORO a random rank-one matrix with mean ``J``, forward gradients one random column
combination ``J u``. None looks back in time, so none has a truncation bias, and none keeps
residuals: memory does not depend on the truncation. Only the floats of the state count, a complex
one as two (its parts); integers and PRNG keys just advance. Theta moves between truncations, so in
training the sensitivities lag behind it (hysteresis), as for every online method.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree

from meta_train.checks import HORIZON
from meta_train.estimators.base import GradientEstimator, checked, map_particles, population_mean
from meta_train.estimators.config import ONE_DEVICE, TruncatedConfig
from meta_train.estimators.derivatives import float_leaves, step_on_floats
from meta_train.estimators.horizons import Horizons, check_truncation, step_weight
from meta_train.estimators.particles import (
    check_population,
    end_if_nonfinite,
    in_episode,
    init_particles,
    restart_if_done,
    window_loss,
)
from meta_train.estimators.perturbations import add_scaled, normal_perturbation, scaled
from meta_train.unroll import UnrolledSystem

UORO_EPS = 1e-7


def rtrl(
    system: UnrolledSystem,
    *,
    num_particles: int,
    truncation: int,
    horizons: Horizons,
    max_bytes: float = 2**31,
    chunk: int | None = None,
) -> GradientEstimator:
    """Real-time recurrent learning: the exact gradient, forward in time.

    Carries ``J = ds/dtheta``, ``[S, P]``: ``J <- F_s J + F_theta``, and the gradient of each
    loss is ``dL/ds J + dL/dtheta``. Exact (with theta fixed, the truncations of an episode
    add up to backpropagation through all of it, so its mean is that of ``bptt``: the mean of the
    derivative, which is the derivative of the mean loss only where the loss does not jump in
    theta, see ``derivatives``), at ``N K`` steps and as many
    Jacobian-vector products for each of the ``P`` entries of theta; memory ``N S P``.

    Args:
      num_particles: ``N``, inner runs.
      truncation: ``K``, inner steps per outer step.
      horizons: distribution of episode lengths.
      max_bytes: the largest sensitivity matrix (all particles together) allowed.
      chunk: particles computed at a time; see ``map_particles``.

    Raises:
      ValueError: on a ``truncation`` longer than any horizon, a non-positive number,
        a loss without a derivative, or (from ``init``) a sensitivity above ``max_bytes``.

    Source: Williams and Zipser 1989; Vicol et al. 2021, Table 1. Differs: a Jacobian-vector
    product for each parameter (``P`` times the step) instead of forming the ``S x S``
    Jacobian and a matrix product (``P S^2``); the same numbers, less for sparse steps.
    """
    if not max_bytes > 0:
        raise ValueError(f"`max_bytes` must be above 0, got max_bytes={max_bytes}.")

    def check_size(theta, key):
        floats = jax.eval_shape(lambda *args: float_leaves(system.init(*args)), theta, key, HORIZON)
        state_size = _size(floats)
        flat = jax.eval_shape(lambda t: ravel_pytree(t)[0], theta)
        num_bytes = num_particles * state_size * flat.size * flat.dtype.itemsize
        if num_bytes > max_bytes:
            raise ValueError(
                f"`rtrl` carries the sensitivity of {state_size} state entries to {flat.size} "
                f"entries of theta for {num_particles} particles: {num_bytes:.3g} bytes, above "
                f"`max_bytes`={max_bytes:.3g}. Use `uoro` or `forward_gradient`, which carry "
                "state + theta entries, or `pes`; or raise `max_bytes`."
            )

    def begin(theta, noise_key, key, horizon):
        del noise_key
        state, pushforward = _linear_init(system, theta, key, horizon)
        return _Carry(state, jax.vmap(pushforward)(_basis(theta)))

    def advance(theta, carry, noise_key, key):
        del noise_key
        step = step_on_floats(system, carry.state, key)
        floats = float_leaves(carry.state)
        (_, loss), pushforward, state = jax.linearize(step, theta, floats, has_aux=True)
        sensitivity, grad = jax.vmap(pushforward)(_basis(theta), carry.sensitivity)
        flat, unravel = ravel_pytree(theta)
        return _Carry(state, sensitivity), loss, unravel(grad.astype(flat.dtype))

    return _online(
        "rtrl", system, begin, advance, num_particles, truncation, horizons, chunk, check_size
    )


def uoro(
    system: UnrolledSystem,
    *,
    num_particles: int,
    truncation: int,
    horizons: Horizons,
    chunk: int | None = None,
) -> GradientEstimator:
    """Unbiased online recurrent optimization: a random rank-one sensitivity.

    Carries ``s~ [S]`` and ``theta~ [P]`` with ``E[s~ theta~^T] = J``. With signs ``nu``:
    ``s~ <- rho_0 F_s s~ + rho_1 nu`` and ``theta~ <- theta~/rho_0 + (nu^T F_theta)/rho_1``, the
    ``rho`` balancing norms. Unbiased for the mean of the derivative of the mean per-step loss,
    which is the derivative of its mean only where the loss does not jump in theta (see
    ``derivatives``), with a variance that grows with the state size and the horizon. ``N K`` steps
    with one Jacobian-vector and two vector-Jacobian products each; memory ``N (S + P)``.

    Args:
      num_particles: ``N``, inner runs.
      truncation: ``K``, inner steps per outer step.
      horizons: distribution of episode lengths.
      chunk: particles computed at a time; see ``map_particles``.

    Raises:
      ValueError: on a ``truncation`` longer than any horizon, a non-positive number,
        or (from ``init``) a loss without a derivative.

    Source: Tallec and Ollivier 2018. Differs: exact Jacobian-vector products where the
    authors' code of Vicol et al. 2021 has finite differences.
    """

    def begin(theta, noise_key, key, horizon):
        floats, pullback, state = jax.vjp(
            lambda theta: _init_on_floats(system, theta, key, horizon), theta, has_aux=True
        )
        signs = _signs(noise_key, floats)
        zero_state = jax.tree.map(jnp.zeros_like, floats)
        zero_theta = jax.tree.map(jnp.zeros_like, theta)
        (from_theta,) = pullback(signs)
        return _Carry(state, _mix(zero_state, zero_theta, signs, from_theta))

    def advance(theta, carry, noise_key, key):
        step = step_on_floats(system, carry.state, key)
        floats = float_leaves(carry.state)
        state_part, theta_part = carry.sensitivity
        still = jax.tree.map(jnp.zeros_like, theta)
        (new, loss), (moved, loss_rate), state = jax.jvp(
            step, (theta, floats), (still, state_part), has_aux=True
        )
        pullback = jax.vjp(step, theta, floats, has_aux=True)[1]
        signs = _signs(noise_key, new)
        (from_theta, _) = pullback((signs, jnp.zeros_like(loss)))
        (direct, _) = pullback((jax.tree.map(jnp.zeros_like, new), jnp.ones_like(loss)))
        grad = add_scaled(direct, loss_rate, theta_part)
        return _Carry(state, _mix(moved, theta_part, signs, from_theta)), loss, grad

    return _online("uoro", system, begin, advance, num_particles, truncation, horizons, chunk)


def forward_gradient(
    system: UnrolledSystem,
    *,
    num_particles: int,
    truncation: int,
    horizons: Horizons,
    chunk: int | None = None,
) -> GradientEstimator:
    """Forward gradients (DODGE): a random directional derivative, carried through the episode.

    Draws ``u ~ N(0, I)`` at the start of an episode, carries ``c = J u`` (``c <- F_s c +
    F_theta u``), and estimates ``u (dL/ds c + dL/dtheta u)``. Unbiased for the mean of the
    derivative of the mean per-step loss, unsmoothed. Where the loss does not jump in theta that is
    the derivative of its mean, and this the limit of ``nres`` for ``sigma -> 0``; where it jumps,
    neither (see ``derivatives``). Its variance is ``(P + 1) ||grad||^2`` per particle. ``N K``
    steps, each with one Jacobian-vector product; memory ``N (S + P)``.

    Args:
      num_particles: ``N``, inner runs.
      truncation: ``K``, inner steps per outer step.
      horizons: distribution of episode lengths.
      chunk: particles computed at a time; see ``map_particles``.

    Raises:
      ValueError: on a ``truncation`` longer than any horizon, a non-positive number,
        or (from ``init``) a loss without a derivative.

    Source: Silver et al. 2021, "Learning by directional gradient descent".
    """

    def begin(theta, noise_key, key, horizon):
        state, pushforward = _linear_init(system, theta, key, horizon)
        direction = normal_perturbation(noise_key, theta, 1.0)
        return _Carry(state, (pushforward(direction), direction))

    def advance(theta, carry, noise_key, key):
        del noise_key
        step = step_on_floats(system, carry.state, key)
        tangent, direction = carry.sensitivity
        (_, loss), (tangent, loss_rate), state = jax.jvp(
            step, (theta, float_leaves(carry.state)), (direction, tangent), has_aux=True
        )
        grad = scaled(loss_rate, direction)
        return _Carry(state, (tangent, direction)), loss, grad

    return _online(
        "forward_gradient", system, begin, advance, num_particles, truncation, horizons, chunk
    )


class _Carry(NamedTuple):
    """The state of the system, and what is known of its derivative by theta."""

    state: Any
    sensitivity: Any


def _online(
    name: str,
    system: UnrolledSystem,
    begin: Callable,
    advance: Callable,
    num_particles: int,
    truncation: int,
    horizons: Horizons,
    chunk: int | None,
    check_size: Callable = lambda theta, key: None,
) -> GradientEstimator:
    """An estimator that carries a sensitivity through one scan per truncation.

    Args:
      begin: ``(theta, noise_key, key, horizon) -> _Carry`` at the start of an episode.
      advance: ``(theta, carry, noise_key, key) -> (carry, loss, grad)``, one inner step and
        the (estimated) total derivative of its loss.
      check_size: ``(theta, key)``; raises if the carry would be too large.
    """
    check_population(num_particles, horizons, chunk)
    check_truncation(horizons, truncation)

    def init(theta, key):
        check_size(theta, key)

        def fresh(key, horizon):
            return begin(theta, *jax.random.split(key), horizon)

        return init_particles(num_particles, horizons, truncation, key, fresh, ())

    def window(theta, key, particle):
        key_restart, key_data, key_noise = jax.random.split(jax.random.fold_in(key, particle.id), 3)
        key_begin, key_steps = jax.random.split(key_noise)
        fresh = partial(begin, theta, key_begin)
        particle = restart_if_done(particle, horizons, key_restart, fresh)

        zeros = jax.tree.map(jnp.zeros_like, theta)

        def body(loop, step):
            carry, total = loop
            kept, keys = step
            carry, loss, grad = advance(theta, carry, *keys)
            return (carry, add_scaled(total, 1.0, optax.tree.where(kept, grad, zeros))), loss

        step_keys = jax.random.split(key_steps, truncation), jax.random.split(key_data, truncation)
        steps = in_episode(particle, truncation), step_keys
        (carry, total), losses = jax.lax.scan(body, (particle.states, zeros), steps)
        loss = window_loss(particle, horizons, losses)
        grad = scaled(step_weight(horizons, truncation), total)
        particle = particle._replace(states=carry, position=particle.position + truncation)
        return grad, particle, loss

    def estimate(theta, particles, key):
        grads, particles, losses = map_particles(partial(window, theta, key), particles, chunk)
        grad, finite, metrics = population_mean(grads, losses)
        return grad, end_if_nonfinite(particles, finite), metrics

    return checked(name, system, init, estimate, differentiates=True)


def _init_on_floats(system, theta, key, horizon) -> tuple[list, Any]:
    state = system.init(theta, key, horizon)
    return float_leaves(state), state


def _linear_init(system, theta, key, horizon) -> tuple[Any, Callable]:
    """The initial state, and ``dtheta -> d(float leaves)`` (zero where theta does not enter)."""
    _, pushforward, state = jax.linearize(
        lambda theta: _init_on_floats(system, theta, key, horizon), theta, has_aux=True
    )
    return state, pushforward


def _basis(theta: Any) -> Any:
    """The unit vectors of theta, leaves ``[P, ...]``."""
    flat, unravel = ravel_pytree(theta)
    return jax.vmap(unravel)(jnp.eye(flat.size, dtype=flat.dtype))


def _signs(key: jax.Array, floats: list[jax.Array]) -> list[jax.Array]:
    """Independent ``+1`` and ``-1``, shaped like ``floats``."""
    flat, unravel = ravel_pytree(floats)
    return unravel(jax.random.rademacher(key, flat.shape, flat.dtype))


def _mix(moved: list, theta_part: Any, signs: list, from_theta: Any) -> tuple[list, Any]:
    """``(rho_0 moved + rho_1 signs, theta_part / rho_0 + from_theta / rho_1)``."""
    rho_0 = jnp.sqrt((_norm(theta_part) + UORO_EPS) / (_norm(moved) + UORO_EPS))
    rho_1 = jnp.sqrt((_norm(from_theta) + UORO_EPS) / (_norm(signs) + UORO_EPS))
    return (
        jax.tree.map(lambda m, v: (rho_0 * m + rho_1 * v).astype(m.dtype), moved, signs),
        jax.tree.map(lambda t, f: (t / rho_0 + f / rho_1).astype(t.dtype), theta_part, from_theta),
    )


def _norm(tree: Any) -> jax.Array:
    return jnp.linalg.norm(ravel_pytree(tree)[0])


def _size(leaves: list) -> int:
    return sum(leaf.size for leaf in leaves)


@dataclass(frozen=True)
class RTRL(TruncatedConfig):
    """See ``rtrl``.

    Attributes:
      max_bytes: the largest sensitivity matrix (all particles together) allowed.
    """

    max_bytes: float = 2.0**31

    def make(self, system, horizons, context=ONE_DEVICE):
        return rtrl(system, horizons=horizons, max_bytes=self.max_bytes, **self.arguments(context))


@dataclass(frozen=True)
class UORO(TruncatedConfig):
    """See ``uoro``."""

    def make(self, system, horizons, context=ONE_DEVICE):
        return uoro(system, horizons=horizons, **self.arguments(context))


@dataclass(frozen=True)
class ForwardGradient(TruncatedConfig):
    """See ``forward_gradient``."""

    def make(self, system, horizons, context=ONE_DEVICE):
        return forward_gradient(system, horizons=horizons, **self.arguments(context))
