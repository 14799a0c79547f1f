"""A step of Hybrid-ES between two gradients: candidates, their costs, what all make of them."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from meta_train.checks import lost_share
from meta_train.compiled_apart import compiled_apart
from meta_train.estimators.base import Metrics
from meta_train.estimators.config import Exchange
from meta_train.estimators.horizons import Horizons, episode_loss
from meta_train.estimators.hybrid import noise as noises
from meta_train.estimators.hybrid.messages import Costs, Sends
from meta_train.estimators.hybrid.searches import Draws, Search, Setting
from meta_train.estimators.hybrid.state import SEARCH, HybridState, Shared
from meta_train.samplers import BLOCK, sampler_named
from meta_train.unroll import UnrolledSystem, unroll


class Between(NamedTuple):
    """The parts of a step between two gradients.

    Attributes:
      prepare: ``(shared, key) -> Setting``.
      measure: ``(theta, state, setting, key) -> Costs``, what crosses between the workers.
      unperturbed: ``(theta [P], setting) -> share`` of theta's entries that no candidate moves, see
        ``checks.lost_share``; None where there are no candidates.
      follow: ``(shared, setting, key, costs) -> (gradient [P], shared, metrics)``, what every
        device makes of it.
    """

    prepare: Callable[[Shared, jax.Array], Setting]
    measure: Callable[[Any, HybridState, Setting, jax.Array], Costs]
    unperturbed: Callable[[jax.Array, Setting], jax.Array] | None
    follow: Callable[[Shared, Setting, jax.Array, Costs], tuple[jax.Array, Shared, Metrics]]


def between(
    system: UnrolledSystem,
    search: Search,
    noise: noises.Noise,
    *,
    horizons: Horizons,
    num_workers: int,
    candidates_per_worker: int,
    num_tasks: int,
    exchange: Exchange,
    chunk: int,
) -> Between:
    """The steps in between of ``hybrid_es``; see there for the arguments."""
    num_candidates = num_workers * candidates_per_worker
    num_rows = num_candidates // 2 if search.paired else num_candidates
    block, sample = sampler_named(noise.sampler)

    def keys_of(key):
        return jax.random.split(jax.random.fold_in(key, SEARCH), 3)  # Noise, mask, tasks.

    def draws(shared_rows, key_noise, like):
        def row(index):
            key = jax.random.fold_in(key_noise, index)
            return sample(shared_rows, key, index, like.size, like.dtype)

        return Draws(key_noise, row)

    def direction(setting, key_noise):
        numbers = draws(setting.block, key_noise, setting.surrogate)
        return partial(search.direction, setting, numbers)

    def prepare(shared, key):
        key_noise, key_mask, _ = keys_of(key)
        d = shared.surrogate
        shared_rows = block(jax.random.fold_in(key_noise, BLOCK), num_rows, d.size, d.dtype)
        return Setting(
            d,
            noises.standard_deviation(noise, shared.scale, d.size),
            noises.mask(noise, key_mask, d),
            shared_rows,
            search.directions(shared.past, d, draws(shared_rows, key_noise, d), num_rows),
        )

    def candidate(flat, setting, key_noise, index):
        """Theta of candidate ``index``."""
        if search.paired:
            sign = (1 - 2 * (index % 2)).astype(flat.dtype)
            eps = sign * direction(setting, key_noise)(index // 2)
        else:
            eps = direction(setting, key_noise)(index)
        return search.place(flat, setting.surrogate, eps)

    def cost_of(unravel, key_tasks, flat):
        """Mean loss per step of ``num_tasks`` episodes; inf if not finite."""

        def episode(index):
            key_restart, key_data = jax.random.split(jax.random.fold_in(key_tasks, index))
            key_horizon, key_begin = jax.random.split(key_restart)
            horizon = horizons.draw(key_horizon)
            theta = unravel(flat)
            losses = unroll(
                system, theta, system.init(theta, key_begin, horizon), key_data, horizons.max
            )[1]
            return episode_loss(losses, horizons, horizon)

        cost = jnp.mean(jax.vmap(episode)(jnp.arange(num_tasks, dtype=jnp.int32)))
        return jnp.where(jnp.isfinite(cost), cost, jnp.inf)

    def measure(theta, state, setting, key):
        if search.sends is Sends.NOTHING:
            return Costs()
        flat, unravel = ravel_pytree(theta)
        key_noise, _, key_tasks = keys_of(key)
        cost = partial(cost_of, unravel)

        def some(flat, setting, key_noise, key_tasks, indices):
            place = partial(candidate, flat, setting, key_noise)
            return jax.vmap(lambda i: cost(key_tasks, place(i)))(indices)

        def one(indices):
            return compiled_apart(
                some, flat, setting, key_noise, key_tasks, indices, witness=state.shared.step
            )

        first = state.workers[:, None] * candidates_per_worker
        indices = first + jnp.arange(candidates_per_worker, dtype=jnp.int32)
        costs = jax.lax.map(one, indices.reshape(-1, chunk)).reshape(indices.shape)
        successes: Any = ()
        if noise.success_rate and search.stale_step:
            # Every worker can do this on its own; it costs one episode more, and no message.
            stale = search.stale_step(flat, setting.surrogate)
            unperturbed = compiled_apart(cost, key_tasks, stale, witness=state.shared.step)
            successes = jnp.sum(costs < unperturbed, axis=1, dtype=jnp.int32)
        if search.sends is Sends.ALL:
            return exchange.gather(Costs((), costs.reshape(-1), successes))
        best = jnp.argmin(costs, axis=1)[:, None]
        sent = Costs(
            jnp.take_along_axis(indices, best, axis=1)[:, 0].astype(jnp.uint32),
            jnp.take_along_axis(costs, best, axis=1)[:, 0],
            successes,
        )
        return exchange.gather(sent)

    def follow(shared, setting, key, sent):
        grad = search.step(setting, direction(setting, keys_of(key)[0]), sent)
        scale = shared.scale
        if noise.success_rate:
            share = jnp.sum(sent.successes) / num_candidates
            scale = noises.observe_success(noise, scale, share.astype(grad.dtype))
        surrogate = grad if search.keeps_step else shared.surrogate
        metrics = {
            "loss": jnp.full([], jnp.nan),
            "finite": jnp.ones([]),
            "grad_sq_norm": jnp.vdot(grad, grad),
            "sigma": jnp.mean(setting.sigma),
            "num_losses": jnp.zeros([]),
        }
        if search.sends is not Sends.NOTHING:
            finite = jnp.isfinite(sent.costs)
            metrics["loss"] = jnp.mean(jnp.where(finite, sent.costs, 0.0))
            metrics["num_losses"] = jnp.full([], float(finite.size))
            metrics["finite"] = jnp.mean(finite.astype(sent.costs.dtype))
        return grad, shared._replace(surrogate=surrogate, scale=scale), metrics

    def unperturbed(flat, setting):
        zeros = jnp.zeros_like(flat)
        return lost_share(flat, jnp.abs(search.place(zeros, zeros, setting.sigma)))

    evaluates = search.sends is not Sends.NOTHING
    return Between(prepare, measure, unperturbed if evaluates else None, follow)
