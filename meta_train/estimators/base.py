"""What every gradient estimator is, and the population's mean that its estimate is."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from meta_train.checks import check_sigma, check_system, fixed_types, lost_share
from meta_train.compiled_apart import compiled_apart
from meta_train.estimators.derivatives import check_differentiable
from meta_train.estimators.particles import end_if_nonfinite
from meta_train.estimators.perturbations import Theta
from meta_train.unroll import UnrolledSystem

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
    sampler: str = "normal",
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
      sampler: the distribution of the perturbations.

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
            check_sigma(sigma, theta, sampler)
        return fixed_types(init(theta, key))

    def estimate_checked(theta, state, key):
        theta = fixed_types(theta)
        grad, state, metrics = estimate(theta, state, key)
        if sigma is not None:
            metrics = metrics | {"unperturbed": lost_share(theta, sigma, sampler)}
        return grad, state, metrics

    return GradientEstimator(init_checked, estimate_checked, **more)


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
    zeros = jax.tree.map(lambda g: jnp.zeros_like(g[0]), contributions)
    kept = jax.vmap(lambda ok, g: optax.tree.where(ok, g, zeros))
    contributions = kept(finite, contributions)
    sq_norms = sum(
        jnp.sum(jnp.square(leaf.reshape(leaf.shape[0], -1)), axis=1)
        for leaf in jax.tree.leaves(contributions)
    )
    metrics = {
        "loss": jnp.where(finite, losses, 0.0),
        "finite": finite.astype(losses.dtype),
        "grad_sq_norm": sq_norms,
    }
    grad, metrics = mean_in_pairs((contributions, metrics))
    return grad, finite, metrics


def mean_in_pairs(tree: Any) -> Any:
    """The mean over the leading axis; neighbours are added, then pairs of neighbours, and so on.

    So the sum of a half, a quarter, ... of the axis is a term of the sum of the whole, to the
    bit, and ``devices.device_mean`` of such parts the mean of the whole. What is odd of a length
    is averaged first: 12 as the mean of 4 means of 3. What is narrower than float32 is added in
    that.

    Args:
      tree: leaves are floating, ``[N, ...]``.
    """

    def one(x):
        num = x.shape[0]
        power = num & -num  # The largest power of two that divides it: dividing by it is exact.
        odd = num // power
        rows = x.reshape(power, odd, *x.shape[1:])
        rows = rows.astype(jnp.promote_types(x.dtype, jnp.float32))
        while rows.shape[1] > 1:  # In pairs too, the last one alone.
            last = rows[:, rows.shape[1] // 2 * 2 :]
            rows = jnp.concatenate([rows[:, 0:-1:2] + rows[:, 1::2], last], axis=1)
        total = rows[:, 0] / odd
        while total.shape[0] > 1:
            total = total[0::2] + total[1::2]
        return (total[0] / power).astype(x.dtype)

    return jax.tree.map(one, tree)


def map_particles(fn: Callable[[Any], Any], particles: Any, chunk: int | None) -> Any:
    """``vmap(fn)`` over the leading axis, ``chunk`` particles at a time (``None``: all).

    A chunk whose work fits the cache runs faster on a CPU, and memory grows with the
    chunk instead of the population; results differ by rounding at most. The chunk is
    lowered to the nearest divisor of the number of particles. Chunks of one size are rounded
    alike, however many there are.

    Args:
      particles: leaves ``[N, ...]``, the first of them numbers that come with the run.
    """
    num = jax.tree.leaves(particles)[0].shape[0]
    if chunk is None:
        return jax.vmap(fn)(particles)
    size = max(size for size in range(1, min(chunk, num) + 1) if num % size == 0)

    def of_chunk(part):
        return compiled_apart(jax.vmap(fn), part, witness=jax.tree.leaves(part)[0])

    chunks = jax.tree.map(lambda x: x.reshape(num // size, size, *x.shape[1:]), particles)
    found = jax.lax.map(of_chunk, chunks)
    return jax.tree.map(lambda x: x.reshape(num, *x.shape[2:]), found)


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
