"""What every gradient estimator is, and the episode bookkeeping the truncated ones share."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from meta_train.checks import (
    MAX_LENGTH,
    check_sigma,
    check_system,
    check_whole,
    fixed_types,
    is_whole,
    lost_share,
)
from meta_train.checks import check_multiple as check_multiple
from meta_train.checks import check_positive as check_positive
from meta_train.estimators.derivatives import check_differentiable
from meta_train.samplers import BLOCK, sampler_named
from meta_train.unroll import UnrolledSystem, unroll

Theta = Any
Metrics = dict[str, jax.Array]


class GradientEstimator(NamedTuple):
    """An estimator of ``d/dtheta`` of the mean per-step loss of an ``UnrolledSystem``.

    The mean per-step loss is ``F(theta) = E[sum of L_t over an episode] / E[horizon]``,
    so estimates have one scale and learning rates carry over between estimators.

    Arrays of the estimator state have a leading particle axis ``[N, ...]`` (all of them,
    unless ``axes`` says otherwise), and every particle carries its global id; each draw is
    keyed by ``fold_in(key, id)``. So the state may be split over devices along that axis: each
    shard's estimate is the mean over its own particles, and the mean of equal shards is the
    whole estimate.

    Attributes:
      init: ``(theta, key) -> state``.
      estimate: ``(theta, state, key) -> (grad, state, metrics)``. ``key`` is different
        at every outer step. ``metrics`` holds means over particles: those of
        ``population_mean`` and whatever else the estimator reports.
      axes: a prefix of the state's pytree: 0 where a leaf has the particle axis, None where
        every device holds the whole leaf.
      rebuild: None, or ``(theta, state, key, message) -> (grad, state)`` of an estimator that
        exchanges its own messages: its estimates are over all devices already, its metrics
        hold the ``message``, and from it the estimate can be had again without a loss.
    """

    init: Callable[[Theta, jax.Array], Any]
    estimate: Callable[[Theta, Any, jax.Array], tuple[Theta, Any, Metrics]]
    axes: Any = 0
    rebuild: Callable[[Theta, Any, jax.Array, Any], tuple[Theta, Any]] | None = None


def checked(
    name: str,
    system: UnrolledSystem,
    init: Callable,
    estimate: Callable,
    *,
    differentiates: bool = False,
    sigma: Any = None,
    **more: Any,
) -> GradientEstimator:
    """The estimator, which first asks whether it can be used on this system and this theta.

    Every estimator ends with this. Numbers in theta become arrays, as do those of the state.

    Args:
      init, estimate: of the estimator; ``more``: what else it has.
      differentiates: whether it needs a loss with a derivative.
      sigma: the smallest standard deviation of the perturbations that its estimates are divided
        by; ``None`` if there is none. Then the metric ``unperturbed`` says what share of theta's
        entries have grown too large for it; see ``checks.lost_share``.

    Raises:
      ValueError: (from ``init``) as ``checks.check_system``; on a loss without a derivative where
        one is needed; and, unless theta is traced, on a sigma that its dtype does not resolve.
    """

    def init_checked(theta, key):
        check_system(system, theta, key)
        theta = fixed_types(theta)
        if differentiates:
            check_differentiable(name, system, theta, key)
        if sigma is not None:
            check_sigma(sigma, theta)
        return fixed_types(init(theta, key))

    def estimate_checked(theta, state, key):
        theta = fixed_types(theta)
        grad, state, metrics = estimate(theta, state, key)
        if sigma is not None:
            metrics = metrics | {"unperturbed": lost_share(theta, sigma)}
        return grad, state, metrics

    return GradientEstimator(init_checked, estimate_checked, **more)


@dataclass(frozen=True, eq=False)
class Horizons:
    """Episode lengths: ``values`` int ``[H]``, ascending, with probabilities ``probs`` ``[H]``.

    Raises:
      ValueError: unless the lengths are whole numbers from 1 to 2^30, strictly ascending, and the
        probabilities are as many and sum to 1.
    """

    values: np.ndarray
    probs: np.ndarray

    def __post_init__(self):
        values, probs = np.asarray(self.values), np.asarray(self.probs)
        whole = np.issubdtype(values.dtype, np.integer) and values.ndim == 1 and values.size
        if (
            not whole
            or values.min() < 1
            or values.max() > MAX_LENGTH
            or np.any(np.diff(values) < 1)
        ):
            raise ValueError(
                f"`horizon` must be a whole number from 1 to {MAX_LENGTH}, or several in ascending "
                f"order, got {values.tolist()}. For episodes without an end take {MAX_LENGTH}, "
                "which is never reached."
            )
        real = np.issubdtype(probs.dtype, np.number) and np.isrealobj(probs)
        if not (
            real
            and probs.shape == values.shape
            and np.all(probs >= 0)
            and abs(probs.sum(dtype=np.float64) - 1) <= 1e-6
        ):
            raise ValueError(
                f"`probs` must be {values.size} probabilities that sum to 1, one a horizon, got "
                f"{probs.tolist()}; divide them by their sum."
            )
        object.__setattr__(self, "values", values.astype(np.int64))
        object.__setattr__(self, "probs", probs.astype(np.float64))

    @property
    def mean(self) -> float:
        return float(np.sum(self.values * self.probs))

    @property
    def max(self) -> int:
        return int(self.values[-1])

    def draw(self, key: jax.Array) -> jax.Array:
        """One episode length, int32 scalar."""
        values = jnp.asarray(self.values, jnp.int32)
        if len(self.values) == 1:
            return values[0]
        return jax.random.choice(key, values, p=jnp.asarray(self.probs, jnp.float32))


def fixed_horizon(horizon: int) -> Horizons:
    """Every episode lasts ``horizon`` steps, at most 2^30.

    Raises:
      ValueError: on anything else.
    """
    check_whole(maximum=MAX_LENGTH, horizon=horizon)
    return Horizons(np.array([horizon]), np.array([1.0]))


def log_uniform_horizons(minimum: int, maximum: int, multiple: int) -> Horizons:
    """``exp(U(ln minimum, ln maximum))`` rounded up to a multiple of ``multiple``.

    The usual curriculum of learned-optimizer training (Metz et al. 2019 and after); the
    rounding lets resets fall between truncations.

    Raises:
      ValueError: if ``0 < minimum < maximum`` fails, or ``maximum`` is not a multiple.
    """
    if not is_whole(minimum) or not is_whole(maximum) or not 0 < minimum < maximum:
        raise ValueError(
            f"`min_horizon` must be positive and below `horizon`, got min_horizon={minimum}, "
            f"horizon={maximum}; leave it 0 for a fixed horizon."
        )
    check_multiple(maximum, multiple)
    values = np.arange(math.ceil(minimum / multiple), maximum // multiple + 1) * multiple
    edges = np.log(np.concatenate([[minimum], values]))
    return Horizons(values, np.diff(edges) / (edges[-1] - edges[0]))


def check_population(num: int, chunk: int | None, unit: str = "particles") -> None:
    """Raises ``ValueError`` unless ``num_UNIT`` is a whole number, and ``chunk`` one or None."""
    check_whole(**{f"num_{unit}": num})
    if chunk is not None:
        check_whole(chunk=chunk)


def check_truncation(horizons: Horizons, truncation: int) -> None:
    """Raises ``ValueError`` unless ``1 <= truncation <= horizons.max``, a whole number."""
    if not is_whole(truncation) or not 1 <= truncation <= horizons.max:
        raise ValueError(
            f"`truncation` must be at least 1 and at most the longest horizon, a whole number, got "
            f"truncation={truncation}, horizon={horizons.max}; further steps would always be idle."
        )


def num_windows(horizon: Any, truncation: int) -> Any:
    """Truncations that an episode of ``horizon`` steps takes; the last may be a part of one."""
    return -(-horizon // truncation)


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


def init_particles(
    num_particles: int,
    horizons: Horizons,
    truncation: int,
    key: jax.Array,
    begin: Callable[[jax.Array], Any],
    memory: Any,
) -> Particle:
    """A population with phases spread evenly over the truncations of the episode.

    Particle ``i`` starts in a fresh state, but its first episode is cut short, so that
    from the first outer step on the population restarts at evenly spread times instead
    of all at once. (Shifting a step counter inside a fresh state would instead make the
    first episode one that no real run has.) Phase 0 restarts in the first truncation.
    Until all have restarted once, the start of the episode is seen more often than its end.

    Args:
      begin: ``key -> states``, the states at the start of an episode.
      memory: zeros, the memory at the start of an episode.
    """

    def one(index):
        key_horizon, key_begin = jax.random.split(jax.random.fold_in(key, index))
        horizon = horizons.draw(key_horizon)
        windows = num_windows(horizon, truncation)
        position = truncation * (windows - _part(windows, index, num_particles))
        return Particle(index, begin(key_begin), position, horizon, memory)

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
    begin: Callable[[jax.Array], Any],
) -> Particle:
    """The particle at the start of a truncation: a fresh episode if the last one is over."""
    key_horizon, key_begin = jax.random.split(key)
    fresh = Particle(
        particle.id,
        begin(key_begin),
        jnp.zeros_like(particle.position),
        horizons.draw(key_horizon),
        jax.tree.map(jnp.zeros_like, particle.memory),
    )
    return select(particle.position >= particle.horizon, fresh, particle)


def in_episode(particle: Particle, truncation: int) -> jax.Array:
    """Which of the next ``truncation`` steps the episode of a particle has left, bool ``[K]``.

    An episode that ends within a truncation idles until the next, where it restarts.
    """
    return particle.position + jnp.arange(truncation) < particle.horizon


def step_weight(horizons: Horizons, truncation: int) -> float:
    """What a step counts in its truncation, ``E[truncations of an episode] / E[horizon]``.

    So that the mean over truncations is the sum over an episode by ``E[horizon]``. It is
    ``1 / truncation`` if all horizons are multiples of it.
    """
    return float(num_windows(horizons.values, truncation) @ horizons.probs) / horizons.mean


def window_loss(particle: Particle, horizons: Horizons, losses: jax.Array) -> jax.Array:
    """A truncation's share of the mean per-step loss, from ``losses [..., K]`` of its steps."""
    truncation = losses.shape[-1]
    kept = jnp.where(in_episode(particle, truncation), losses, 0.0)
    return jnp.sum(kept, axis=-1) * step_weight(horizons, truncation)


def end_if_nonfinite(particle: Particle, finite: jax.Array) -> Particle:
    """Ends the episode of a particle whose loss or gradient was not finite."""
    return particle._replace(position=jnp.where(finite, particle.position, particle.horizon))


def population_mean(contributions: Theta, losses: jax.Array) -> tuple[Theta, jax.Array, Metrics]:
    """The mean contribution of the particles, under the project's one rule for non-finite values.

    A particle whose loss or contribution is not finite contributes zero (the mean still
    divides by all particles) and its episode ends; it is counted, never hidden.

    Args:
      contributions: each particle's gradient estimate, leaves ``[N, ...]``.
      losses: each particle's mean per-step loss, ``[N]``.

    Returns:
      The mean over particles, shaped like theta; which particles were finite, bool
      ``[N]``; and metrics, each a mean over particles with zero for the non-finite ones:
      ``loss``, ``finite`` (1 each) and ``grad_sq_norm`` (squared norm of the contribution).
    """
    finite = jnp.isfinite(losses)
    for leaf in jax.tree.leaves(contributions):
        finite &= jnp.all(jnp.isfinite(leaf.reshape(leaf.shape[0], -1)), axis=1)
    contributions = jax.vmap(lambda ok, g: select(ok, g, jax.tree.map(jnp.zeros_like, g)))(
        finite, contributions
    )
    sq_norms = sum(
        jnp.sum(jnp.square(leaf.reshape(leaf.shape[0], -1)), axis=1)
        for leaf in jax.tree.leaves(contributions)
    )
    metrics = {
        "loss": jnp.mean(jnp.where(finite, losses, 0.0)),
        "finite": jnp.mean(finite.astype(losses.dtype)),
        "grad_sq_norm": jnp.mean(sq_norms),
    }
    return jax.tree.map(lambda g: jnp.mean(g, axis=0), contributions), finite, metrics


def episode_loss(losses: jax.Array, horizons: Horizons, key: jax.Array) -> jax.Array:
    """One episode's share of the mean per-step loss: ``sum_{t<h} L_t / E[h]`` with ``h`` drawn.

    ``losses`` is float ``[horizons.max]``. The expectation over ``h`` weighs every inner
    step alike, as the truncated estimators do.
    """
    kept = jnp.arange(horizons.max) < horizons.draw(key)
    return jnp.sum(jnp.where(kept, losses, 0.0)) / horizons.mean


def ending(system: UnrolledSystem, horizons: Horizons, key: jax.Array) -> UnrolledSystem:
    """The system, resting in the last state of an episode of the length ``key`` draws.

    For backpropagation: ``episode_loss`` masks the losses of later steps, but a derivative of
    theirs that is not finite would make its product with zero not a number.
    """
    if len(horizons.values) == 1:
        return system
    run = _resting(system, horizons.draw(key))
    return run._replace(init=lambda theta, key: (system.init(theta, key), jnp.int32(0)))


def unroll_window(
    system: UnrolledSystem,
    theta: Theta,
    particle: Particle,
    horizons: Horizons,
    key: jax.Array,
    truncation: int,
) -> tuple[Any, jax.Array]:
    """``unroll`` through a particle's next truncation, for backpropagation: see ``ending``.

    Where its episode ends within the truncation, the system rests.
    """
    if not np.any(horizons.values % truncation):
        return unroll(system, theta, particle.states, key, truncation)
    run = _resting(system, particle.horizon)
    start = particle.states, particle.position
    (state, _), losses = unroll(run, theta, start, key, truncation)
    return state, losses


def _resting(system: UnrolledSystem, horizon: jax.Array) -> UnrolledSystem:
    """The system with states ``(state, position)``, which takes the last of ``horizon`` steps
    again and again: what is finite there stays so."""

    def step(theta, state, key):
        inner, position = state
        moved, loss = system.step(theta, inner, key)
        return (select(position + 1 < horizon, moved, inner), position + 1), loss

    return UnrolledSystem(system.init, step)


def map_particles(fn: Callable[[Any], Any], particles: Any, chunk: int | None) -> Any:
    """``vmap(fn)`` over the leading axis, ``chunk`` particles at a time (``None``: all).

    A chunk whose work fits the cache runs faster on a CPU, and memory grows with the
    chunk instead of the population; results differ by rounding at most. The chunk is
    lowered to the nearest divisor of the number of particles.
    """
    num = jax.tree.leaves(particles)[0].shape[0]
    if chunk is None or chunk >= num:
        return jax.vmap(fn)(particles)
    chunk = max(size for size in range(1, chunk + 1) if num % size == 0)
    return jax.lax.map(fn, particles, batch_size=chunk)


def estimate_windows(window: Callable, chunk: int | None) -> Callable:
    """``GradientEstimator.estimate`` from what one particle does in one truncation.

    Args:
      window: ``(theta, key, particle) -> (contribution, particle, loss)``.
      chunk: particles computed at a time; see ``map_particles``.
    """

    def estimate(theta, particles, key):
        contributions, particles, losses = map_particles(
            partial(window, theta, key), particles, chunk
        )
        grad, finite, metrics = population_mean(contributions, losses)
        return grad, end_if_nonfinite(particles, finite), metrics

    return estimate


def estimate_perturbed_windows(
    window: Callable, perturbations: Callable, chunk: int | None
) -> Callable:
    """``estimate_windows`` for a window that also takes this step's ``perturb``, first.

    Args:
      window: ``(perturb, theta, key, particle) -> (contribution, particle, loss)``.
      perturbations: from ``perturbations``.
      chunk: particles computed at a time; see ``map_particles``.
    """

    def estimate(theta, particles, key):
        perturb = perturbations(theta, key)
        return estimate_windows(partial(window, perturb), chunk)(theta, particles, key)

    return estimate


def perturbations(sampler: str, num: int, sigma) -> Callable:
    """The perturbations of ``num`` particles: zero mean, covariance ``sigma^2 I``.

    Args:
      sampler: a name of ``samplers.SAMPLERS``; ``normal`` is the Gaussian of the papers. With
        others estimates are unbiased as stated for losses quadratic in theta; beyond that only
        ``normal`` and ``sobol`` smooth the loss as the papers do.
      num: particles (or pairs) that draw together, on all devices.

    Returns:
      ``(theta, key) -> perturb`` with the ``key`` all particles share, which gives
      ``perturb(particle_key, particle_id) -> eps``, shaped like theta. What the rows of a block
      have in common is computed by the first call, once for all particles.

    Raises:
      ValueError: on an unknown sampler.
    """
    block, row = sampler_named(sampler)

    def at_step(theta, key):
        flat, unravel = ravel_pytree(theta)
        shared = block(jax.random.fold_in(key, BLOCK), num, flat.size, flat.dtype)

        def perturb(particle_key, particle_id):
            eps = sigma * row(shared, particle_key, particle_id, flat.size, flat.dtype)
            return unravel(eps.astype(flat.dtype))

        return perturb

    return at_step


def perturbation(key: jax.Array, theta: Theta, sigma) -> Theta:
    """``eps ~ N(0, sigma^2 I)``, shaped like ``theta``; one draw whatever the number of leaves."""
    flat, unravel = ravel_pytree(theta)
    return unravel(sigma * jax.random.normal(key, flat.shape, flat.dtype))


def add_scaled(theta: Theta, scale, direction: Theta) -> Theta:
    """``theta + scale * direction``, in the dtypes of theta."""
    return jax.tree.map(lambda t, d: (t + scale * d).astype(t.dtype), theta, direction)


def scaled(scale, tree: Theta) -> Theta:
    """``scale * tree``, in its dtypes."""
    return jax.tree.map(lambda x: (scale * x).astype(x.dtype), tree)


def inner(a: Theta, b: Theta) -> jax.Array:
    """The inner product of two equal pytrees."""
    return jax.tree.reduce(jnp.add, jax.tree.map(jnp.vdot, a, b))


def select(condition: jax.Array, on_true: Any, on_false: Any) -> Any:
    """Elementwise ``where`` over two equal pytrees, for a scalar condition."""
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), on_true, on_false)


def antithetic_starts(
    system: UnrolledSystem, theta: Theta, eps: Theta
) -> Callable[[jax.Array], Any]:
    """``key -> states [2, ...]``: the halves of a pair start from the same draw.

    The start is the first thing theta enters, so each half starts under its own theta:
    ``theta + eps`` and ``theta - eps``.
    """

    def begin(key):
        signs = jnp.array([1.0, -1.0])
        return jax.vmap(lambda sign: system.init(add_scaled(theta, sign, eps), key))(signs)

    return begin
