"""A mixture: several estimators of the same theta, whose gradients are averaged."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from meta_train.checks import check_positive, check_whole
from meta_train.estimators.base import GradientEstimator
from meta_train.estimators.perturbations import add_scaled

_DECAY = 0.99  # Of the running squared norm, per step in which the part ran.
_DRAW = 2**32 - 3  # The address of the draw of parts; no particle has this id.


class Norms(NamedTuple):
    """Running squared norms ``mean`` ``[K]`` of the parts' gradients, from zero, and how many
    gradients each has ``seen``, int32 ``[K]``."""

    mean: jax.Array
    seen: jax.Array


class MixtureState(NamedTuple):
    """The state of a mixture: those of its ``parts``, a tuple, and their ``norms``."""

    parts: tuple
    norms: Norms


class Mixture(NamedTuple):
    """A mixture in the pieces that a program each can be made of.

    Attributes:
      estimator: the whole, as one estimator (and so one program).
      size: ``K``, the number of parts.
      drawn: ``key -> bool [K]``, which parts run in the step of that key.
      part: ``(index, theta, part state, key) -> (grad, part state, metrics)``.
      combine: ``(norms, grads, metrics, ran) -> (grad, norms, metrics)``: lists of ``K``, of
        gradients that are means over all devices already; what did not run is ignored.
    """

    estimator: GradientEstimator
    size: int
    drawn: Callable[[jax.Array], jax.Array]
    part: Callable[..., tuple]
    combine: Callable[..., tuple]


def mixture(
    estimators: Sequence[GradientEstimator],
    *,
    names: Sequence[str],
    weights: Sequence[float] = (),
    drawn: int = 0,
    normalize: bool = False,
    cut: float = 0.0,
    device_mean: Callable[[Any], Any] = lambda tree: tree,
) -> Mixture:
    """The weighted mean of the gradients of several estimators over one theta.

    ``g = sum_i w_i g_i`` with weights that sum to 1; its expectation is the same mean of what the
    parts estimate. If only ``drawn`` parts run in a step, uniform without replacement, each
    counts ``K / drawn`` times as much, so the expectation stays. With ``normalize`` each ``g_i``
    is first divided by the root of its running mean square norm (decay 0.99, this gradient
    included): scales are then alike, and the expectation is no longer that of the mean loss.
    With ``cut`` a gradient above ``cut`` times the running norm before it counts as that, also in
    the running norm, which one spike would otherwise leave too large for hundreds of steps.
    A part whose gradient is not finite contributes zero and teaches its norm nothing.

    Metrics: those of the whole as for any estimator (``loss`` is the weighted mean over the parts
    that ran); and for each part ``meta_loss/NAME``, ``meta_grad_norm/NAME`` and
    ``nonfinite/NAME``, NaN where it did not run.

    Args:
      estimators: the parts, of systems of any shape over one theta; each draws with keys of its
        own.
      names: what the metrics call them.
      weights: what each counts, above 0; empty: all alike.
      drawn: parts that run in a step; 0: all.
      normalize: divide each gradient by its running norm.
      cut: running norms that a gradient counts as at most; 0: none is cut.
      device_mean: the mean over devices, where the estimator runs on several.

    Raises:
      ValueError: on no parts, names or weights of another number, a weight that is not positive,
        more parts drawn than there are, or parts that exchange their own messages.
    """
    size = len(estimators)
    if not size or len(names) != size or len(weights) not in (0, size):
        raise ValueError(
            f"`estimators` must have a name each, and a weight each or none, got {size} "
            f"estimators, {len(names)} names, {len(weights)} weights."
        )
    check_positive(**{f"weights[{i}]": weight for i, weight in enumerate(weights)})
    check_whole(0, drawn=drawn)
    if drawn > size:
        raise ValueError(f"`drawn` must be at most the number of parts, {size}, got {drawn}.")
    if any(part.rebuild is not None or part.axes != 0 for part in estimators):
        raise ValueError(
            "`estimators` of a mixture must leave the mean over devices to the trainer; hybrid_es "
            "exchanges its own messages and cannot be mixed."
        )
    num_run = drawn or size
    share = np.asarray(weights or [1.0] * size, np.float64)
    share = share / share.sum() * (size / num_run)

    def init(theta, key):
        parts = tuple(
            part.init(theta, jax.random.fold_in(key, i)) for i, part in enumerate(estimators)
        )
        return MixtureState(parts, Norms(jnp.zeros(size), jnp.zeros(size, jnp.int32)))

    def choose(key):
        if num_run == size:
            return jnp.ones(size, bool)
        return jax.random.permutation(jax.random.fold_in(key, _DRAW), size) < num_run

    def run_part(index, theta, state, key):
        return estimators[index].estimate(theta, state, jax.random.fold_in(key, index))

    def combine(running, grads, metrics, ran):
        norms = jnp.stack([optax.tree.norm(grad) for grad in grads])
        usable = ran & jnp.isfinite(norms)
        before = _root_mean_square(running)
        cuts = bool(cut) & (running.seen > 0) & (before > 0) & (norms > cut * before)
        counted = jnp.where(cuts, cut * before, norms)
        mean = _DECAY * running.mean + (1 - _DECAY) * jnp.square(counted)
        running = Norms(
            jnp.where(usable, mean, running.mean).astype(running.mean.dtype), running.seen + usable
        )
        factors = jnp.asarray(share, norms.dtype)
        if normalize:
            typical = _root_mean_square(running)
            factors = factors / jnp.where(typical > 0, typical, 1.0)
        factors = jnp.where(cuts, factors * (counted / norms), factors)
        zeros = jax.tree.map(jnp.zeros_like, grads[0])
        grad = zeros
        for i in range(size):
            grad = add_scaled(grad, factors[i], optax.tree.where(usable[i], grads[i], zeros))

        def of(name):
            return jnp.stack([entry[name] for entry in metrics])

        finite, losses = of("finite"), of("loss") / of("finite")
        spread = jnp.maximum(of("grad_sq_norm") - jnp.square(norms), 0.0)
        weight = jnp.where(ran, jnp.asarray(share, finite.dtype), 0.0)
        # A part without a finite particle has no loss; the whole has that of the others.
        shares = jnp.where(ran & (finite > 0), jnp.asarray(share, finite.dtype), 0.0)
        mean_loss = jnp.sum(jnp.where(shares > 0, losses, 0.0) * shares) / jnp.sum(shares)
        mean_finite = jnp.sum(jnp.where(ran, finite, 0.0) * weight) / jnp.sum(weight)
        variance = jnp.sum(jnp.where(usable, jnp.square(factors) * spread, 0.0))
        found = {
            "loss": jnp.where(mean_finite > 0, mean_loss * mean_finite, 0.0),
            "finite": mean_finite,
            "grad_sq_norm": jnp.square(optax.tree.norm(grad)) + variance,
        }
        for i, name in enumerate(names):
            for metric, values in (
                ("meta_loss", losses),
                ("meta_grad_norm", norms),
                ("nonfinite", 1 - finite),
            ):
                found[f"{metric}/{name}"] = jnp.where(ran[i], values[i], jnp.nan)
        return grad, running, found

    def estimate(theta, state, key):
        ran = choose(key)
        parts, grads, metrics = [], [], []
        for i in range(size):
            run = partial(run_part, i, theta)
            if num_run < size:
                run = partial(_if_drawn, ran[i], run)
            grad, part, found = run(state.parts[i], key)
            grad, found = device_mean((grad, found))
            grads.append(grad)
            parts.append(part)
            metrics.append(found)
        grad, norms, found = combine(state.norms, grads, metrics, ran)
        return grad, MixtureState(tuple(parts), norms), found

    axes: Any = MixtureState(0, None)  # type: ignore[arg-type]
    whole = GradientEstimator(init, estimate, axes)
    return Mixture(whole, size, choose, run_part, combine)


def _root_mean_square(norms: Norms) -> jax.Array:
    """Of each part's gradients so far, ``[K]``; 0 where there were none."""
    return jnp.sqrt(norms.mean / (1 - _DECAY ** jnp.maximum(norms.seen, 1)))


def _if_drawn(drawn: jax.Array, run: Callable, state: Any, key: jax.Array) -> tuple:
    """``run``, or the state as it is with zeros for the gradient and metrics."""
    spec = jax.eval_shape(run, state, key)

    def skip(state, key):
        del key
        grad, metrics = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), (spec[0], spec[2]))
        return grad, state, metrics

    return jax.lax.cond(drawn, run, skip, state, key)
