"""Hybrid-ES: a gradient now and then, evolution around the old one in between."""

import math
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from meta_train.checks import check_sigma, check_whole, fixed_types, is_whole, lost_share
from meta_train.compression import COMPRESSORS, Compressor, with_feedback
from meta_train.estimators import base
from meta_train.estimators import noise as noises
from meta_train.estimators.backprop import TBPTT
from meta_train.estimators.config import ONE_DEVICE, EstimatorConfig, Shards
from meta_train.estimators.messages import (
    ALONE,
    IDLE,
    Costs,
    Exchange,
    Message,
    bests_suffice,
    mean_in_pairs,
)
from meta_train.estimators.prediction import Predictor, learned_features
from meta_train.reversible.isolation import always, isolated
from meta_train.samplers import BLOCK, sampler_named
from meta_train.unroll import UnrolledSystem, unroll

MODES = ("select", "control_variate", "guided", "past_descent", "stale", "skip")
COMBINES = ("argmin", "worker_mean", "top", "rank")
PAIRED = ("control_variate", "guided", "past_descent")  # Modes of antithetic pairs.
# The address of the candidates' draws; no particle has this id.
SEARCH = 2**32 - 2


class Shared(NamedTuple):
    """What every device knows; all of it follows from the messages.

    Attributes:
      step: int32, outer steps done.
      surrogate: the stale gradient ``d``, or what is predicted in its place, ``[P]``.
      past: the last surrogates, ``[k, P]``, at first random (mode ``guided``; else ``()``).
      scale: what sigma has learned.
      prediction: the predictor's state, or ``()``.
    """

    step: jax.Array
    surrogate: jax.Array
    past: Any
    scale: noises.Scale
    prediction: Any


class HybridState(NamedTuple):
    """The state of ``hybrid_es``.

    Attributes:
      particles: the surrogate estimator's population.
      workers: int32 ``[N]``, global worker ids.
      residuals: what compression left out, ``[N, P]``; ``()`` without.
      shared: replicated.
    """

    particles: Any
    workers: jax.Array
    residuals: Any
    shared: Shared


class _Setting(NamedTuple):
    """What all candidates of a step share: the surrogate, sigma and whether perturbed, each
    ``[P]``, what the sampler's rows share, and the directions of ``guided`` (a basis) and
    ``past_descent`` (the rows themselves)."""

    surrogate: jax.Array
    sigma: jax.Array
    allowed: jax.Array
    block: Any
    directions: Any


def hybrid_es(
    system: UnrolledSystem,
    surrogate: base.GradientEstimator,
    *,
    horizons: base.Horizons,
    refresh_every: int,
    num_workers: int,
    candidates_per_worker: int,
    noise: noises.Noise,
    step_size: float = 1.0,
    mode: str = "select",
    combine: str = "argmin",
    top: int = 1,
    antithetic: bool = False,
    assist: bool = False,
    num_tasks: int = 1,
    num_surrogates: int = 1,
    alpha: float = 0.5,
    predictor: Predictor | None = None,
    compressor: Compressor | None = None,
    exchange: Exchange = ALONE,
    chunk: int | None = None,
) -> base.GradientEstimator:
    """Hybrid-ES: every ``r`` steps a gradient ``d``, in between evolution around the stale one.

    In-between steps evaluate ``M = N K`` candidates of theta, all on the same tasks, starts
    and data. The cost of a candidate is its mean loss per step over whole episodes from fresh
    starts. With perturbations ``e_c`` of standard deviation ``sigma``:

    - ``select`` (the poster): candidates ``theta - a (d + e_c)`` with ``a = step_size``, and
      ``g = d + sum_c w_c e_c``. ``combine`` chooses the weights: ``argmin`` the best of all,
      ``worker_mean`` the best of each worker alike, ``top`` the best ``m`` alike, ``rank``
      logarithmic in the rank over the better half. A search, not an estimate: biased to lower
      cost after a step of plain gradient descent at rate ``a``.
    - ``control_variate``: ``g = d + mean_p ((L(theta + e_p) - L(theta - e_p)) / 2 - d . e_p)
      e_p / sigma^2`` over ``M / 2`` pairs: unbiased for the gradient of the loss smoothed by the
      perturbation, whatever ``d``; its variance grows with ``|grad L - d|^2``, to leading order
      in sigma. Entries that a mask leaves out are ``d``'s, so those are biased.
    - ``guided``: ``g = mean_p (L(theta + e_p) - L(theta - e_p)) / 2 * e_p / sigma^2`` with
      ``e ~ N(0, sigma^2 [alpha I + (1 - alpha) P/k U U^T])``, ``U`` the span of the last ``k``
      surrogates: the smoothed gradient stretched along ``U``.
    - ``past_descent``: central differences along ``d`` and ``M / 2 - 1`` random directions, all
      orthonormal and of length ``sigma``; ``g`` is the projection of the gradient on their
      span, and the next ``d``.
    - ``stale``: ``g = d``. ``skip``: ``g = 0`` (with which a meta-optimizer of momentum still
      moves). The controls, which evaluate nothing.

    A candidate whose cost is not finite is never chosen, and a pair with one contributes
    zero; if no candidate is finite, ``select`` gives zero. ``r = 1`` is ``surrogate`` itself,
    except with ``assist``: then the in-between step follows every gradient, in the same step,
    on other data. The surrogate's episodes advance at refreshes only, so a truncation of PES
    spans ``r`` steps of theta. A refresh that is not finite, or overflows what is learned from it,
    teaches nothing: the steps in between go on around the gradient before it.

    Workers are spread over devices. What crosses between them is a ``Message``: from it and
    the keys every device builds the same step, bit for bit. The arithmetic of a worker does
    not depend on what else its device does, and sums over workers are taken in pairs, so on
    1, 2, 4, ... devices (``num_workers`` a power of two) runs are equal to the bit too. With
    another number of workers the in-between steps are the same (``worker_mean`` aside), the
    refreshes to rounding, or more where each worker compresses its own.
    Metrics: ``loss`` is the mean of the costs that were exchanged (for ``argmin`` and
    ``worker_mean`` only the bests), NaN where nothing was; ``refresh``, ``sigma`` and, where
    candidates were evaluated, ``unperturbed``: see ``base.checked``.

    Args:
      system: what candidates run on.
      surrogate: the estimator of ``d``, over the same ``system``.
      horizons: distribution of the candidates' episode lengths.
      refresh_every: ``r``, outer steps per gradient.
      num_workers: ``N``; must divide the surrogate's particles.
      candidates_per_worker: ``K``; even where candidates come in pairs.
      noise: the perturbations; see ``Noise``.
      step_size: ``a``, the meta-optimizer's learning rate (``select``).
      mode: one of ``MODES``.
      combine: one of ``COMBINES`` (``select``).
      top: ``m`` (``combine="top"``).
      antithetic: candidates ``2 p`` and ``2 p + 1`` are mirrored (``select``; the paired modes
        always are).
      assist: in-between steps after the gradient steps too, with the fresh gradient.
      num_tasks: episodes averaged for a cost.
      num_surrogates: ``k`` (``guided``).
      alpha: isotropic share, in ``(0, 1]`` (``guided``).
      predictor: predicts the gradient in between; its prediction is used in place of ``d``.
      compressor: of the refresh gradients, with error feedback at every worker.
      exchange: how devices exchange; ``ALONE`` on one.
      chunk: candidates evaluated at a time, dividing ``K``; ``None``: ``K``.

    Raises:
      ValueError: on a value out of range, arguments that exclude each other, or (from
        ``init``) sizes that do not fit theta or the population.

    Source: Bartolo, "Hybrid-ES" (poster); guided: Maheswaranathan et al. 2019; past descent:
    Meier et al. 2019; recombination weights: Hansen and Ostermeier 2001. Differs: the poster
    leaves its combination and its in-between branch open. Meier et al. take the derivative
    along ``d`` as given; here it is a central difference, exact for quadratics.
    """
    spec = noise
    num_candidates = num_workers * candidates_per_worker
    paired = mode in PAIRED or (mode == "select" and antithetic)
    best_only = bests_suffice(mode, combine)
    check_settings(
        refresh_every=refresh_every,
        num_workers=num_workers,
        candidates_per_worker=candidates_per_worker,
        noise=noise,
        step_size=step_size,
        mode=mode,
        combine=combine,
        top=top,
        antithetic=antithetic,
        num_tasks=num_tasks,
        num_surrogates=num_surrogates,
        alpha=alpha,
        predictor=predictor,
    )
    if surrogate.axes != 0:
        raise ValueError("`surrogate` must keep its whole state in particles, as all but hybrids.")
    chunk = candidates_per_worker if chunk is None else chunk
    if not is_whole(chunk) or chunk < 1 or candidates_per_worker % chunk:
        raise ValueError(
            f"`chunk` must divide `candidates_per_worker`, got chunk={chunk}, "
            f"candidates_per_worker={candidates_per_worker}."
        )
    num_rows = num_candidates // 2 if paired else num_candidates
    weights = _weights(combine, num_workers, num_candidates, top)
    block, row = sampler_named(spec.sampler)

    def init(theta, key):
        flat = ravel_pytree(theta)[0]
        if mode in PAIRED and not spec.relative:
            check_sigma(spec.sigma, flat)
        particles = surrogate.init(theta, key)
        num_particles = jax.tree.leaves(particles)[0].shape[0]
        if num_particles % num_workers:
            raise ValueError(
                f"`num_workers` must divide the surrogate's particles (pairs, for antithetic "
                f"estimators), got num_workers={num_workers} for {num_particles}."
            )
        noises.check_layers(spec, flat.size)
        wanted = {"guided": num_surrogates, "past_descent": num_rows}.get(mode, 0)
        if wanted > flat.size:
            raise ValueError(
                f"`mode` {mode!r} needs {wanted} independent directions, but theta has "
                f"{flat.size} entries; lower `num_surrogates` or the number of candidates."
            )
        # Random before they are gradients: a basis of zeros would not be.
        key = jax.random.fold_in(key, SEARCH)
        past = jax.random.normal(key, (num_surrogates, flat.size), flat.dtype)
        shared = Shared(
            jnp.zeros([], jnp.int32),
            jnp.zeros_like(flat),
            past if mode == "guided" else (),
            noises.init_scale(spec, flat.dtype),
            predictor.init(key, flat.size, flat.dtype) if predictor else (),
        )
        residuals = jnp.zeros((num_workers, flat.size), flat.dtype) if compressor else ()
        return HybridState(particles, jnp.arange(num_workers, dtype=jnp.int32), residuals, shared)

    # The refresh: every worker's gradient, then what all make of them.

    def measure_gradient(theta, state, key):
        """This device's part: the new state, what is sent, metrics."""

        def one(shard):
            particles, residual = shard

            def run(theta, particles, residual, key):
                grad, particles, metrics = surrogate.estimate(theta, particles, key)
                grad = ravel_pytree(grad)[0]
                if compressor:
                    grad, residual = with_feedback(compressor, grad, residual)
                return grad, particles, residual, metrics

            return isolated(always(state.shared.step), run, theta, particles, residual, key)

        shards = state.workers.shape[0]
        split = jax.tree.map(
            lambda x: x.reshape(shards, x.shape[0] // shards, *x.shape[1:]), state.particles
        )
        sent, particles, residuals, metrics = jax.lax.map(one, (split, state.residuals))
        particles = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), particles)
        if compressor:
            metrics = exchange.mean(mean_in_pairs(metrics))
            sent = exchange.gather(sent)
        else:
            sent, metrics = exchange.mean(mean_in_pairs((sent, metrics)))
        return state._replace(particles=particles, residuals=residuals), sent, metrics

    def absorb_gradient(shared, sent):
        """What every device makes of the refresh."""
        size, dtype = shared.surrogate.shape[0], shared.surrogate.dtype
        if compressor:
            sent = mean_in_pairs(jax.vmap(lambda code: compressor.decode(code, size, dtype))(sent))
        past = shared.past
        if mode == "guided":
            past = jnp.concatenate([sent[None], past[:-1]])
        prediction = predictor.learn(shared.prediction, sent) if predictor else ()
        fresh = Shared(
            shared.step,
            # What it is made from stays the same until the next refresh, so it does too.
            predictor.predict(prediction) if predictor else sent,
            past,
            noises.observe_gradient(spec, shared.scale, sent),
            prediction,
        )
        usable = [jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves((sent, fresh))]
        return sent, base.select(jnp.all(jnp.array(usable)), fresh, shared)

    # In between: the candidates, their costs, and the step all make of them.

    def keys_of(key):
        return jax.random.split(jax.random.fold_in(key, SEARCH), 3)  # Noise, mask, tasks.

    def prepare(shared, key):
        key_noise, key_mask, _ = keys_of(key)
        d = shared.surrogate
        directions: Any = ()
        shared_rows = block(jax.random.fold_in(key_noise, BLOCK), num_rows, d.size, d.dtype)
        if mode == "guided":
            directions = jnp.linalg.qr(shared.past.T)[0].T
        if mode == "past_descent":
            random = [unit(shared_rows, key_noise, p, d) for p in range(1, num_rows)]
            directions = jnp.linalg.qr(jnp.stack([d, *random], axis=1))[0].T
        return _Setting(
            d,
            noises.standard_deviation(spec, shared.scale, d.size),
            noises.mask(spec, key_mask, d),
            shared_rows,
            directions,
        )

    def unit(shared_rows, key_noise, index, like):
        key = jax.random.fold_in(key_noise, index)
        return row(shared_rows, key, index, like.size, like.dtype)

    def direction(setting, key_noise, index):
        """The perturbation of row ``index``, ``[P]``."""
        d = setting.surrogate
        if mode == "past_descent":
            return setting.sigma * setting.directions[index]
        eps = unit(setting.block, key_noise, index, d)
        if mode == "guided":
            key = jax.random.fold_in(jax.random.fold_in(key_noise, index), 1)
            within = jax.random.normal(key, (num_surrogates,), d.dtype)
            stretch = jnp.sqrt((1 - alpha) * d.size / num_surrogates)
            eps = jnp.sqrt(alpha) * eps + stretch * within @ setting.directions
        return jnp.where(setting.allowed, setting.sigma * eps, 0.0)

    def candidate(flat, setting, key_noise, index):
        """Theta of candidate ``index``."""
        if paired:
            sign = (1 - 2 * (index % 2)).astype(flat.dtype)
            eps = sign * direction(setting, key_noise, index // 2)
        else:
            eps = direction(setting, key_noise, index)
        return flat - step_size * (setting.surrogate + eps) if mode == "select" else flat + eps

    def cost_of(unravel, key_tasks, flat):
        """Mean loss per step of ``num_tasks`` episodes; inf if not finite."""

        def episode(index):
            key_restart, key_data = jax.random.split(jax.random.fold_in(key_tasks, index))
            key_horizon, key_begin = jax.random.split(key_restart)
            theta = unravel(flat)
            losses = unroll(system, theta, system.init(theta, key_begin), key_data, horizons.max)[1]
            return base.episode_loss(losses, horizons, key_horizon)

        cost = jnp.mean(jax.vmap(episode)(jnp.arange(num_tasks, dtype=jnp.int32)))
        return jnp.where(jnp.isfinite(cost), cost, jnp.inf)

    def measure_costs(theta, state, setting, key):
        """What crosses between the workers."""
        flat, unravel = ravel_pytree(theta)
        key_noise, _, key_tasks = keys_of(key)
        cost = partial(cost_of, unravel)

        def some(flat, setting, key_noise, key_tasks, indices):
            place = partial(candidate, flat, setting, key_noise)
            return jax.vmap(lambda i: cost(key_tasks, place(i)))(indices)

        def one(indices):
            return isolated(
                always(state.shared.step), some, flat, setting, key_noise, key_tasks, indices
            )

        first = state.workers[:, None] * candidates_per_worker
        indices = first + jnp.arange(candidates_per_worker, dtype=jnp.int32)
        costs = jax.lax.map(one, indices.reshape(-1, chunk)).reshape(indices.shape)
        successes: Any = ()
        if spec.success_rate:
            # Every worker can do this on its own; it costs one episode more, and no message.
            unperturbed = isolated(
                always(state.shared.step), cost, key_tasks, flat - step_size * setting.surrogate
            )
            successes = jnp.sum(costs < unperturbed, axis=1, dtype=jnp.int32)
        if not best_only:
            return exchange.gather(Costs((), costs.reshape(-1), successes))
        best = jnp.argmin(costs, axis=1)[:, None]
        sent = Costs(
            jnp.take_along_axis(indices, best, axis=1)[:, 0].astype(jnp.uint32),
            jnp.take_along_axis(costs, best, axis=1)[:, 0],
            successes,
        )
        return exchange.gather(sent)

    def weighted_sum(setting, key_noise, indices, coefficients):
        """``sum_i coefficients[i] * direction(indices[i])``, one direction in memory at a time."""

        def add(total, term):
            index, coefficient = term
            return total + coefficient * direction(setting, key_noise, index), None

        zeros = jnp.zeros_like(setting.surrogate)
        return jax.lax.scan(add, zeros, (indices, coefficients))[0]

    def selected(setting, key_noise, sent):
        order = jnp.argsort(sent.costs)[: len(weights)]
        kept = jnp.where(jnp.isfinite(sent.costs[order]), weights, 0.0)
        kept = kept.astype(setting.surrogate.dtype)
        total = jnp.sum(kept)
        kept = kept * (1 / jnp.where(total > 0, total, 1.0))  # See `estimated`.
        chosen = (sent.ids[order] if best_only else order).astype(jnp.int32)
        if paired:
            kept, chosen = kept * (1 - 2 * (chosen % 2)), chosen // 2
        d = setting.surrogate
        step = jnp.where(setting.allowed, d + weighted_sum(setting, key_noise, chosen, kept), d)
        return jnp.where(total > 0, step, 0.0)

    def estimated(setting, key_noise, sent):
        d = setting.surrogate
        slopes = ((sent.costs[0::2] - sent.costs[1::2]) / 2).astype(d.dtype)
        rows = jnp.arange(num_rows, dtype=jnp.int32)
        if mode == "control_variate":
            expected = jax.lax.map(lambda i: jnp.vdot(d, direction(setting, key_noise, i)), rows)
            slopes = slopes - expected
        slopes = jnp.where(jnp.isfinite(slopes), slopes, 0.0)
        total = weighted_sum(setting, key_noise, rows, slopes)
        if mode != "past_descent":
            total = total * (1 / num_rows)
        # XLA may turn a division by one number into a product, in one program and not another.
        total = jnp.where(setting.sigma > 0, total * (1 / setting.sigma**2), 0.0)
        total = d + total if mode == "control_variate" else total
        return jnp.where(setting.allowed, total, d)

    def follow_costs(shared, setting, key, sent):
        """What every device makes of the costs: the step, the new shared state, metrics."""
        key_noise = keys_of(key)[0]
        if mode == "skip":
            grad = jnp.zeros_like(setting.surrogate)
        elif mode == "stale":
            grad = setting.surrogate
        else:
            grad = (selected if mode == "select" else estimated)(setting, key_noise, sent)
        scale = shared.scale
        if spec.success_rate:
            share = jnp.sum(sent.successes) / num_candidates
            scale = noises.observe_success(spec, scale, share.astype(grad.dtype))
        surrogate = grad if mode == "past_descent" else shared.surrogate
        metrics = {
            "loss": jnp.full([], jnp.nan),
            "finite": jnp.ones([]),
            "grad_sq_norm": jnp.vdot(grad, grad),
            "sigma": jnp.mean(setting.sigma),
        }
        if mode not in IDLE:
            finite = jnp.isfinite(sent.costs)
            metrics["loss"] = jnp.mean(jnp.where(finite, sent.costs, 0.0))
            metrics["finite"] = jnp.mean(finite.astype(sent.costs.dtype))
        return grad, shared._replace(surrogate=surrogate, scale=scale), metrics

    # The two kinds of step, from what was sent; and how it is obtained and sent.

    def refreshed(theta, state, key, obtain_gradient, obtain_costs):
        state, sent, metrics = obtain_gradient(theta, state, key)
        step = state.shared.step
        grad, shared = isolated(always(step), absorb_gradient, state.shared, sent)
        state = state._replace(shared=shared)
        if not assist:
            return grad, state, sent, None, metrics
        around = state
        if predictor:  # Its prediction is for the steps in between.
            around = state._replace(shared=shared._replace(surrogate=grad))
        grad, state, costs, more = searched(theta, around, key, obtain_costs)
        if predictor:
            state = state._replace(shared=state.shared._replace(surrogate=shared.surrogate))
        return grad, state, sent, costs, metrics | {"sigma": more["sigma"]}

    def searched(theta, state, key, obtain_costs):
        step = state.shared.step
        setting = isolated(always(step), prepare, state.shared, key)
        costs = Costs() if mode in IDLE else obtain_costs(theta, state, setting, key)
        grad, shared, metrics = isolated(
            always(step), follow_costs, state.shared, setting, key, costs
        )
        if mode not in IDLE:
            length = step_size if mode == "select" else 1.0
            flat = ravel_pytree(theta)[0]
            metrics["unperturbed"] = lost_share(flat, length * setting.sigma)
        return grad, state._replace(shared=shared), costs, metrics

    def advance(theta, state, key, obtain_gradient, obtain_costs):
        """One step of either kind: the gradient, state, message, metrics."""
        unravel = ravel_pytree(theta)[1]

        def with_gradient(state):
            return refreshed(theta, state, key, obtain_gradient, obtain_costs)

        def without(state):
            return searched(theta, state, key, obtain_costs)

        # What the kind of step that is not taken would have sent, as zeros; as metrics, NaN.
        spec_with = jax.eval_shape(with_gradient, state)
        spec_without = jax.eval_shape(without, state)
        names = spec_with[4] | spec_without[3]

        def complete(metrics, refresh):
            filled = {
                name: jnp.asarray(metrics.get(name, jnp.nan), leaf.dtype)
                for name, leaf in names.items()
            }
            return filled | {"refresh": jnp.asarray(refresh, jnp.float32)}

        def full_with(state):
            grad, state, sent, costs, metrics = with_gradient(state)
            costs = _zeros(spec_without[2]) if costs is None else costs
            message = Message(jnp.array(True), sent, jnp.array(assist), costs)
            return grad, state, message, complete(metrics, 1)

        def full_without(state):
            grad, state, costs, metrics = without(state)
            sent = _zeros(spec_with[2])
            message = Message(jnp.array(False), sent, jnp.array(True), costs)
            return grad, state, message, complete(metrics, 0)

        if refresh_every == 1:
            grad, state, message, metrics = full_with(state)
        else:
            grad, state, message, metrics = jax.lax.cond(
                state.shared.step % refresh_every == 0, full_with, full_without, state
            )
        shared = state.shared._replace(step=state.shared.step + 1)
        return unravel(grad), state._replace(shared=shared), message, metrics

    def estimate(theta, state, key):
        grad, state, message, metrics = advance(theta, state, key, measure_gradient, measure_costs)
        return grad, state, metrics | {"message": message}

    def rebuild(theta, state, key, message):
        """``estimate`` from its message; the population stays where it was."""

        def gradient(theta, state, key):
            return state, message.gradient, {}

        def costs(theta, state, setting, key):
            return message.costs

        grad, state, _, _ = advance(fixed_types(theta), state, key, gradient, costs)
        return grad, state

    axes = HybridState(surrogate.axes, 0, 0, None)  # type: ignore[arg-type]
    return base.checked("hybrid_es", system, init, estimate, axes=axes, rebuild=rebuild)


def _zeros(shapes: Any) -> Any:
    return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)


def _weights(combine: str, num_workers: int, num_candidates: int, top: int) -> np.ndarray:
    """The weights of the best candidates, best first."""
    if combine == "rank" and num_candidates > 1:
        num = max(1, num_candidates // 2)
        logs = math.log(num_candidates / 2 + 0.5) - np.log(np.arange(1, num + 1))
        return logs / logs.sum()
    num = {"argmin": 1, "worker_mean": num_workers, "top": top, "rank": 1}[combine]
    return np.full(num, 1 / num)


def check_settings(
    *,
    refresh_every,
    num_workers,
    candidates_per_worker,
    noise,
    step_size,
    mode,
    combine,
    top,
    antithetic,
    num_tasks,
    num_surrogates,
    alpha,
    predictor,
) -> None:
    """Raises ``ValueError`` as ``hybrid_es`` says, for all that needs no system."""
    if mode not in MODES:
        raise ValueError(f"`mode` must be one of {list(MODES)}, got {mode!r}.")
    if combine not in COMBINES:
        raise ValueError(f"`combine` must be one of {list(COMBINES)}, got {combine!r}.")
    check_whole(
        refresh_every=refresh_every,
        num_workers=num_workers,
        candidates_per_worker=candidates_per_worker,
        top=top,
        num_tasks=num_tasks,
        num_surrogates=num_surrogates,
    )
    total = num_workers * candidates_per_worker
    check_whole(**{"num_workers * candidates_per_worker": total})
    if top > num_workers * candidates_per_worker:
        raise ValueError(
            f"`top` must be at most the number of candidates, got top={top} for "
            f"{num_workers} x {candidates_per_worker}."
        )
    if (mode in PAIRED or (mode == "select" and antithetic)) and candidates_per_worker % 2:
        raise ValueError(
            f"`candidates_per_worker` must be even where candidates come in pairs, got "
            f"{candidates_per_worker}. Try {candidates_per_worker + 1}."
        )
    base.check_positive(step_size=step_size)
    noises.check_noise(noise)
    if mode in ("guided", "past_descent") and (noise.mask != "none" or noise.layers):
        raise ValueError(
            f"`mode` {mode!r} chooses its own directions, got a mask or layers in `noise`; "
            "use them with 'select' or 'control_variate'."
        )
    if mode != "select" and noise.success_rate:
        raise ValueError(
            f"`success_rate` needs mode='select', got mode={mode!r}: only there a candidate is a "
            "step that may succeed. Set success_rate=0."
        )
    if mode == "past_descent" and predictor is not None:
        raise ValueError(
            "`predictor` cannot be used with mode='past_descent', whose surrogate is its own last "
            "step; leave one of them out."
        )
    if antithetic and mode != "select":
        raise ValueError(
            f"`antithetic` is for mode='select', got mode={mode!r}; the other modes that "
            "evaluate candidates always pair them. Leave it out."
        )
    if not 0 < alpha <= 1:
        raise ValueError(f"`alpha` must be above 0 and at most 1, got alpha={alpha}.")


@dataclass(frozen=True)
class HybridES(EstimatorConfig):
    """See ``hybrid_es``.

    Attributes:
      base: the estimator of the gradients.
      refresh_every: outer steps per gradient.
      assist: search after the gradient steps too.
      num_workers: split over the devices; must divide the base's particles (or pairs).
      candidates_per_worker: candidates a worker evaluates in an in-between step.
      num_tasks: episodes averaged for a candidate's cost.
      mode: select, control_variate, guided, past_descent, stale or skip.
      combine: what select makes of the costs: argmin, worker_mean, top or rank.
      top: how many the combination top averages.
      antithetic: mirrored candidates, in mode select.
      num_surrogates: past gradients that guide, in mode guided.
      alpha: share of the isotropic part, in mode guided, in (0, 1].
      sigma: standard deviation of the candidates' perturbations.
      sampler: their distribution.
      relative_sigma: sigma in units of the gradient's own spread.
      per_layer: sigma (if relative) and the mask by layers of theta.
      success_rate: speed of the 1/5th success rule, in mode select; 0: off.
      mask: which entries are perturbed: none (all), random, layers or largest.
      fraction: of the entries or layers perturbed.
      predict: in between, a learned prediction in place of the stale gradient.
      compression: of the gradients: none, int8 or top_k.
      kept: share of the entries that top_k keeps.
      replay_log: write WORKDIR/replay.log, from which the weights can be rebuilt.
    """

    base: EstimatorConfig = field(default_factory=TBPTT)
    refresh_every: int = 5
    assist: bool = False
    num_workers: int = 8
    candidates_per_worker: int = 4
    num_tasks: int = 1
    mode: str = "control_variate"
    combine: str = "argmin"
    top: int = 1
    antithetic: bool = False
    num_surrogates: int = 4
    alpha: float = 0.5
    sigma: float = 0.01
    sampler: str = "normal"
    relative_sigma: bool = False
    per_layer: bool = False
    success_rate: float = 0.0
    mask: str = "none"
    fraction: float = 1.0
    predict: bool = False
    compression: str = "none"
    kept: float = 0.01
    replay_log: bool = False

    def __post_init__(self):
        size = self.base.population.size
        if isinstance(self.base, HybridES):
            raise ValueError("`base` must be an estimator of its own, got hybrid_es.")
        check_whole(num_workers=self.num_workers)
        if size % self.num_workers:
            raise ValueError(
                f"`num_workers` must divide the population of `base`, {size} "
                f"{self.base.population.unit}, got num_workers={self.num_workers}: every worker "
                "computes a part of the gradient."
            )
        if self.mask == "layers" and not self.per_layer:
            raise ValueError("`mask`='layers' needs `per_layer`=true.")
        if self.compression not in COMPRESSORS:
            raise ValueError(
                f"`compression` must be one of {sorted(COMPRESSORS)}, got {self.compression!r}."
            )
        base.check_positive(kept=self.kept)
        check_settings(**self._settings(ONE_DEVICE))

    @property
    def num_particles(self) -> int:
        """Inner runs of the base."""
        return self.base.population.size * self.base.population.runs

    @property
    def needs_reversible(self):
        return self.base.needs_reversible

    @property
    def plain_descent(self):
        return self.mode == "select"

    @property
    def keeps_log(self):
        return self.replay_log

    @property
    def population(self):
        return self.base.population

    @property
    def shards(self):
        return Shards(self.num_workers, "num_workers", 1)

    @property
    def horizon_multiple(self):
        return self.base.horizon_multiple

    def inner_steps(self, horizon):
        candidates = self.num_workers * self.candidates_per_worker
        candidates += self.num_workers if self.success_rate else 0
        if self.mode in IDLE:
            candidates = 0
        searches = 1.0 if self.assist else 1 - 1 / self.refresh_every
        gradients = self.base.inner_steps(horizon) / self.refresh_every
        return gradients + searches * candidates * self.num_tasks * horizon

    def _settings(self, context):
        """The arguments of ``hybrid_es`` that are mere values."""
        return {
            "refresh_every": self.refresh_every,
            "num_workers": self.num_workers,
            "candidates_per_worker": self.candidates_per_worker,
            "noise": noises.Noise(
                self.sigma,
                self.sampler,
                self.relative_sigma,
                context.layers if self.per_layer else (),
                self.success_rate,
                self.mask,
                self.fraction,
            ),
            "step_size": context.learning_rate,
            "mode": self.mode,
            "combine": self.combine,
            "top": self.top,
            "antithetic": self.antithetic,
            "num_tasks": self.num_tasks,
            "num_surrogates": self.num_surrogates,
            "alpha": self.alpha,
            "predictor": learned_features() if self.predict else None,
        }

    def make(self, system, horizons, context=ONE_DEVICE):
        return hybrid_es(
            system,
            self.base.make(system, horizons, context),
            horizons=horizons,
            exchange=context.exchange,
            compressor=COMPRESSORS[self.compression](self.kept),
            assist=self.assist,
            **self._settings(context),
        )
