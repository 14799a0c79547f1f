"""The population of the truncated estimators: inner runs in all phases of their episodes."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from meta_train.checks import check_whole
from meta_train.estimators.horizons import Horizons, check_horizons, num_windows, step_weight
from meta_train.estimators.perturbations import Theta, add_scaled
from meta_train.unroll import UnrolledSystem


class Particle(NamedTuple):
    """One particle of a truncated estimator (all fields get a leading ``[N]`` axis).

    Attributes:
      id: int32 scalar, the same whatever device the particle lives on.
      states: the inner state, or a stack of them (antithetic estimators: ``[2, ...]``).
      position: int32 scalar, steps of this episode already counted.
      horizon: int32 scalar; the particle restarts at the first truncation where
        ``position >= horizon``.
      memory: what the estimator remembers over the episode (PES: the perturbation
        accumulator); zeros at its start. ``()`` if it remembers nothing.
    """

    id: jax.Array
    states: Any
    position: jax.Array
    horizon: jax.Array
    memory: Any


def check_population(
    num: int, horizons: Horizons, chunk: int | None, unit: str = "particles"
) -> None:
    """What every estimator first asks of the numbers it is given.

    Raises:
      ValueError: unless ``num_UNIT`` is a whole number, ``chunk`` one or None, and ``horizons``
        are ``Horizons``.
    """
    check_whole(**{f"num_{unit}": num})
    check_horizons(horizons)
    if chunk is not None:
        check_whole(chunk=chunk)


def init_particles(
    num_particles: int,
    horizons: Horizons,
    truncation: int,
    key: jax.Array,
    begin: Callable[[jax.Array, jax.Array], Any],
    memory: Any,
) -> Particle:
    """A population with phases spread evenly over the truncations of the episode.

    Particle ``i`` starts in a fresh state, but its first episode is cut short, so that
    from the first outer step on the population restarts at evenly spread times instead
    of all at once. (Shifting a step counter inside a fresh state would instead make the
    first episode one that no real run has.) Phase 0 restarts in the first truncation.
    Until all have restarted once, the start of the episode is seen more often than its end.

    Args:
      begin: ``(key, horizon) -> states``, the states at the start of an episode.
      memory: zeros, the memory at the start of an episode.
    """

    def one(index):
        key_horizon, key_begin = jax.random.split(jax.random.fold_in(key, index))
        horizon = horizons.draw(key_horizon)
        windows = num_windows(horizon, truncation)
        position = truncation * (windows - _part(windows, index, num_particles))
        return Particle(index, begin(key_begin, horizon), position, horizon, memory)

    return jax.vmap(one)(jnp.arange(num_particles, dtype=jnp.int32))


def _part(total: jax.Array, index: jax.Array, num: int) -> jax.Array:
    """``total * index // num`` for ``index < num``, exact where the product overflows int32.

    Long division, over the bits of ``index`` from the first; ``num`` up to 2^29, ``total`` to 2^30.
    """

    def bit(i, carry):
        quotient, remainder = carry
        remainder = 2 * remainder + total * (index >> (30 - i) & 1)
        return 2 * quotient + remainder // num, remainder % num

    zero = jnp.zeros_like(total)
    return jax.lax.fori_loop(0, 31, bit, (zero, zero))[0]


def synchronized(particles: Particle) -> Particle:
    """The population with no phases: every particle restarts in the next truncation."""
    return particles._replace(position=particles.horizon)


def restart_if_done(
    particle: Particle,
    horizons: Horizons,
    key: jax.Array,
    begin: Callable[[jax.Array, jax.Array], Any],
) -> Particle:
    """The particle at the start of a truncation: a fresh episode if the last one is over."""
    key_horizon, key_begin = jax.random.split(key)
    horizon = horizons.draw(key_horizon)
    fresh = Particle(
        particle.id,
        begin(key_begin, horizon),
        jnp.zeros_like(particle.position),
        horizon,
        jax.tree.map(jnp.zeros_like, particle.memory),
    )
    return optax.tree.where(particle.position >= particle.horizon, fresh, particle)


def antithetic_starts(
    system: UnrolledSystem, theta: Theta, eps: Theta
) -> Callable[[jax.Array, jax.Array], Any]:
    """``(key, horizon) -> states [2, ...]``: the halves of a pair start from the same draw.

    The start is the first thing theta enters, so each half starts under its own theta:
    ``theta + eps`` and ``theta - eps``.
    """

    def begin(key, horizon):
        def half(sign):
            return system.init(add_scaled(theta, sign, eps), key, horizon)

        return jax.vmap(half)(jnp.array([1.0, -1.0]))

    return begin


def in_episode(particle: Particle, truncation: int) -> jax.Array:
    """Which of the next ``truncation`` steps the episode of a particle has left, bool ``[K]``.

    An episode that ends within a truncation idles until the next, where it restarts.
    """
    return particle.position + jnp.arange(truncation) < particle.horizon


def window_loss(particle: Particle, horizons: Horizons, losses: jax.Array) -> jax.Array:
    """A truncation's share of the mean per-step loss, from ``losses [..., K]`` of its steps."""
    truncation = losses.shape[-1]
    kept = jnp.where(in_episode(particle, truncation), losses, 0.0)
    return jnp.sum(kept, axis=-1) * step_weight(horizons, truncation)


def end_if_nonfinite(particle: Particle, finite: jax.Array) -> Particle:
    """Ends the episode of a particle whose loss or gradient was not finite."""
    return particle._replace(position=jnp.where(finite, particle.position, particle.horizon))
