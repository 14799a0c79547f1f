"""What every gradient estimator is, and the episode bookkeeping the truncated ones share."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Literal
from jax.flatten_util import ravel_pytree

from meta_train.samplers import BLOCK, sampler_named
from meta_train.unroll import UnrolledSystem

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


class Horizons(NamedTuple):
    """Episode lengths: ``values`` int ``[H]``, ascending, with probabilities ``probs`` ``[H]``."""

    values: np.ndarray
    probs: np.ndarray

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
    """Every episode lasts ``horizon`` steps."""
    return Horizons(np.array([horizon]), np.array([1.0]))


def log_uniform_horizons(minimum: int, maximum: int, multiple: int) -> Horizons:
    """``exp(U(ln minimum, ln maximum))`` rounded up to a multiple of ``multiple``.

    The usual curriculum of learned-optimizer training (Metz et al. 2019 and after); the
    rounding lets resets fall between truncations.

    Raises:
      ValueError: if ``0 < minimum < maximum`` fails, or ``maximum`` is not a multiple.
    """
    if not 0 < minimum < maximum:
        raise ValueError(
            f"`min_horizon` must be positive and below `horizon`, got min_horizon={minimum}, "
            f"horizon={maximum}; leave it 0 for a fixed horizon."
        )
    check_multiple(maximum, multiple)
    values = np.arange(math.ceil(minimum / multiple), maximum // multiple + 1) * multiple
    edges = np.log(np.concatenate([[minimum], values]))
    return Horizons(values, np.diff(edges) / (edges[-1] - edges[0]))


def check_multiple(horizon: int, truncation: int) -> None:
    """Raises ``ValueError`` unless ``horizon`` is a positive multiple of ``truncation``."""
    if truncation < 1 or horizon < 1 or horizon % truncation:
        near = max(1, round(horizon / max(truncation, 1))) * max(truncation, 1)
        raise ValueError(
            f"`horizon` must be a positive multiple of `truncation`, got horizon={horizon}, "
            f"truncation={truncation}; after its end an episode would idle to the end of its "
            f"truncation. Try horizon={near}."
        )


def check_truncation(horizons: Horizons, truncation: int) -> None:
    """Raises ``ValueError`` unless ``1 <= truncation <= horizons.max``."""
    if not 1 <= truncation <= horizons.max:
        raise ValueError(
            f"`truncation` must be at least 1 and at most the longest horizon, got truncation="
            f"{truncation}, horizon={horizons.max}; further steps would always be idle."
        )


def num_windows(horizon: Any, truncation: int) -> Any:
    """Truncations that an episode of ``horizon`` steps takes; the last may be a part of one."""
    return -(-horizon // truncation)


def check_positive(**values: float) -> None:
    """Raises ``ValueError`` naming the first argument that is not a finite positive number."""
    for name, value in values.items():
        if isinstance(value, jax.core.Tracer):
            continue
        if not (np.isfinite(value) and value > 0):
            raise ValueError(f"`{name}` must be a finite number above 0, got {name}={value}.")


def check_whole(minimum: int = 1, /, **values: Any) -> None:
    """Raises ``ValueError`` naming the first argument that is no whole number from ``minimum``."""
    for name, value in values.items():
        whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
        if not whole or value < minimum:
            raise ValueError(
                f"`{name}` must be a whole number of at least {minimum}, got {name}={value!r}."
            )


def float_leaves(tree: Any) -> list[jax.Array]:
    """The leaves a derivative exists for; counters and PRNG keys are left out."""
    return [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.floating)]


def replace_floats(tree: Any, floats: list[jax.Array]) -> Any:
    """``tree`` with its float leaves replaced, in order."""
    leaves, structure = jax.tree.flatten(tree)
    new = iter(floats)
    return jax.tree.unflatten(
        structure, [next(new) if jnp.issubdtype(x.dtype, jnp.floating) else x for x in leaves]
    )


def step_on_floats(system: UnrolledSystem, state: Any, key: jax.Array) -> Callable:
    """A step to differentiate: ``(theta, floats) -> ((new_floats, loss), new_state)``.

    ``floats`` stands for ``float_leaves(state)``; the whole new state is the auxiliary output.
    """

    def step(theta, floats):
        new_state, loss = system.step(theta, replace_floats(state, floats), key)
        return (float_leaves(new_state), loss), new_state

    return step


def _reached(jaxpr, sources: set) -> list[bool]:
    """Which outputs of ``jaxpr`` depend on any of the variables ``sources``."""
    reached = set(sources)

    def depends(value):
        return not isinstance(value, Literal) and value in reached

    for equation in jaxpr.eqns:
        if any(map(depends, equation.invars)):
            reached.update(equation.outvars)
    return [depends(value) for value in jaxpr.outvars]


def check_differentiable(name: str, system: UnrolledSystem, theta: Theta, key: jax.Array) -> None:
    """Raises ``ValueError`` if the loss has no derivative, or one that is zero everywhere.

    Linearizes the start and one step (nothing is computed), and asks whether the tangent of the
    loss depends on that of theta, directly or through states that themselves depend on it: that
    of a count, an accuracy or a discrete action does not.
    """

    def tangents(key, dtheta, dfloats):
        def start(theta):
            return float_leaves(system.init(theta, key))

        initial = system.init(theta, key)
        step = step_on_floats(system, initial, key)
        begun = jax.linearize(start, theta)[1](dtheta)
        _, pushforward, _ = jax.linearize(step, theta, float_leaves(initial), has_aux=True)
        return begun, pushforward(dtheta, dfloats)

    state = jax.eval_shape(system.init, theta, key)
    loss = jax.eval_shape(system.step, theta, state, key)[1]
    if jnp.issubdtype(loss.dtype, jnp.floating):
        num = len(float_leaves(state))
        jaxpr = jax.make_jaxpr(tangents)(key, theta, float_leaves(state)).jaxpr
        thetas, floats = jaxpr.invars[1 : len(jaxpr.invars) - num], jaxpr.invars[-num:]
        moved: set = set()  # States that move with theta, after some step or other.
        while True:
            reached = _reached(jaxpr, {*thetas, *(floats[i] for i in moved)})
            if reached[-1]:
                return
            more = {i for i in range(num) if reached[i] or reached[num + i]}
            if more <= moved:
                break
            moved |= more
    raise ValueError(
        f"`{name}` differentiates the loss, but the derivative of this loss (dtype "
        f"{loss.dtype}) is zero wherever it exists; use an estimator that only evaluates "
        "it, such as `pes`, `nres` or `full_es`."
    )


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
        position = truncation * (windows - windows * index // num_particles)
        return Particle(index, begin(key_begin), position, horizon, memory)

    return jax.vmap(one)(jnp.arange(num_particles, dtype=jnp.int32))


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
    horizon = horizons.draw(key)

    def step(theta, state, key):
        inner, position = state
        moved, loss = system.step(theta, inner, key)
        return (select(position + 1 < horizon, moved, inner), position + 1), loss

    return UnrolledSystem(lambda theta, key: (system.init(theta, key), jnp.int32(0)), step)


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
            return unravel(sigma * row(shared, particle_key, particle_id, flat.size, flat.dtype))

        return perturb

    return at_step


def perturbation(key: jax.Array, theta: Theta, sigma) -> Theta:
    """``eps ~ N(0, sigma^2 I)``, shaped like ``theta``; one draw whatever the number of leaves."""
    flat, unravel = ravel_pytree(theta)
    return unravel(sigma * jax.random.normal(key, flat.shape, flat.dtype))


def add_scaled(theta: Theta, scale, direction: Theta) -> Theta:
    """``theta + scale * direction``."""
    return jax.tree.map(lambda t, d: t + scale * d, theta, direction)


def scaled(scale, tree: Theta) -> Theta:
    """``scale * tree``."""
    return jax.tree.map(lambda x: scale * x, tree)


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
