"""Hybrid-ES: a gradient now and then, evolution around the old one in between."""

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from meta_train.checks import check_sigma, check_whole, fixed_types, is_whole
from meta_train.estimators.base import GradientEstimator, checked
from meta_train.estimators.config import NO_EXCHANGE, Exchange
from meta_train.estimators.horizons import Horizons, check_horizons
from meta_train.estimators.hybrid import noise as noises
from meta_train.estimators.hybrid.between import between
from meta_train.estimators.hybrid.compression import Compressor
from meta_train.estimators.hybrid.prediction import Predictor
from meta_train.estimators.hybrid.refresh import refresh
from meta_train.estimators.hybrid.schedule import alternating
from meta_train.estimators.hybrid.searches import Search
from meta_train.estimators.hybrid.state import SEARCH, HybridState, Shared
from meta_train.unroll import UnrolledSystem


def hybrid_es(
    system: UnrolledSystem,
    surrogate: GradientEstimator,
    *,
    horizons: Horizons,
    refresh_every: int,
    num_workers: int,
    candidates_per_worker: int,
    noise: noises.Noise,
    search: Search,
    assist: bool = False,
    num_tasks: int = 1,
    predictor: Predictor | None = None,
    compressor: Compressor | None = None,
    exchange: Exchange = NO_EXCHANGE,
    chunk: int | None = None,
) -> GradientEstimator:
    """Hybrid-ES: every ``r`` steps a gradient ``d``, in between a search around the stale one.

    In-between steps evaluate ``M = N K`` candidates of theta, all on the same tasks, starts
    and data. The cost of a candidate is its mean loss per step over whole episodes from fresh
    starts. ``search`` says where the candidates are and what step follows from their costs:
    ``select``, ``control_variate``, ``guided``, ``past_descent``, or one of the controls ``stale``
    and ``skip``, which evaluate nothing. The bias is the search's; see there.

    ``r = 1`` is ``surrogate`` itself, except with ``assist``: then the in-between step follows
    every gradient, in the same step, on other data. The surrogate's episodes advance at refreshes
    only, so a truncation of PES spans ``r`` steps of theta. A refresh that is not finite, or
    overflows what is learned from it, teaches nothing: the steps in between go on around the
    gradient before it.

    Workers are spread over devices. What crosses between them is a ``Message``: from it and
    the keys every device builds the same step, bit for bit. The arithmetic of a worker does
    not depend on what else its device does, and sums over workers are taken in pairs, so on
    1, 2, 4, ... devices (``num_workers`` a power of two) runs are equal to the bit too. With
    another number of workers the in-between steps are the same (``worker_mean`` aside), the
    refreshes to rounding, or more where each worker compresses its own.
    Metrics: ``loss`` is the mean of the costs that were exchanged (only the bests where those
    are all that a search needs), NaN where nothing was; ``refresh``, ``sigma``, ``num_losses``
    (how many costs those were) and, where candidates were evaluated, ``unperturbed``: see
    ``checked``.

    Args:
      system: what candidates run on.
      surrogate: the estimator of ``d``, over the same ``system``.
      horizons: distribution of the candidates' episode lengths.
      refresh_every: ``r``, outer steps per gradient.
      num_workers: ``N``; must divide the surrogate's particles.
      candidates_per_worker: ``K``; even where candidates come in pairs.
      noise: the perturbations; see ``Noise``.
      search: what happens between two gradients; see ``Search``.
      assist: in-between steps after the gradient steps too, with the fresh gradient.
      num_tasks: episodes averaged for a cost.
      predictor: predicts the gradient in between; its prediction is used in place of ``d``.
      compressor: of the refresh gradients, with error feedback at every worker.
      exchange: how devices exchange; ``NO_EXCHANGE`` on one.
      chunk: candidates evaluated at a time, dividing ``K``; ``None``: ``K``.

    Raises:
      ValueError: on a value out of range, arguments that exclude each other, or (from
        ``init``) sizes that do not fit theta or the population.

    Source: Bartolo, "Hybrid-ES" (poster). Differs: the poster leaves its in-between branch open.
    """
    check_horizons(horizons)
    check_settings(
        refresh_every=refresh_every,
        num_workers=num_workers,
        candidates_per_worker=candidates_per_worker,
        noise=noise,
        search=search,
        num_tasks=num_tasks,
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
    gradients = refresh(
        surrogate, search, noise, predictor=predictor, compressor=compressor, exchange=exchange
    )
    candidates = between(
        system,
        search,
        noise,
        horizons=horizons,
        num_workers=num_workers,
        candidates_per_worker=candidates_per_worker,
        num_tasks=num_tasks,
        exchange=exchange,
        chunk=chunk,
    )
    advance = alternating(
        gradients,
        candidates,
        refresh_every=refresh_every,
        assist=assist,
        predicts=predictor is not None,
    )

    def init(theta, key):
        flat = ravel_pytree(theta)[0]
        # A search that tries steps divides by no sigma.
        if search.paired and not search.stale_step and not noise.relative:
            check_sigma(noise.sigma, theta, noise.sampler)
        particles = surrogate.init(theta, key)
        num_particles = jax.tree.leaves(particles)[0].shape[0]
        if num_particles % num_workers:
            raise ValueError(
                f"`num_workers` must divide the surrogate's particles (pairs, for antithetic "
                f"estimators), got num_workers={num_workers} for {num_particles}."
            )
        noises.check_layers(noise, flat.size)
        num_rows = num_workers * candidates_per_worker // (2 if search.paired else 1)
        wanted = search.independent(num_rows) if search.independent else 0
        if wanted > flat.size:
            raise ValueError(
                f"`search` {search.name!r} needs {wanted} independent directions, but theta has "
                f"{flat.size} entries; lower `num_surrogates` or the number of candidates."
            )
        key = jax.random.fold_in(key, SEARCH)
        shared = Shared(
            jnp.zeros([], jnp.int32),
            jnp.zeros_like(flat),
            search.init(key, flat.size, flat.dtype),
            noises.init_scale(noise, flat.dtype),
            predictor.init(key, flat.size, flat.dtype) if predictor else (),
        )
        residuals = jnp.zeros((num_workers, flat.size), flat.dtype) if compressor else ()
        return HybridState(particles, jnp.arange(num_workers, dtype=jnp.int32), residuals, shared)

    def estimate(theta, state, key):
        grad, state, message, metrics = advance(
            theta, state, key, gradients.measure, candidates.measure
        )
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
    return checked("hybrid_es", system, init, estimate, axes=axes, rebuild=rebuild)


def check_settings(
    *,
    refresh_every: int,
    num_workers: int,
    candidates_per_worker: int,
    noise: noises.Noise,
    search: Search,
    num_tasks: int,
    predictor: Predictor | None,
) -> None:
    """Raises ``ValueError`` as ``hybrid_es`` says, for all that needs no system."""
    check_whole(
        refresh_every=refresh_every,
        num_workers=num_workers,
        candidates_per_worker=candidates_per_worker,
        num_tasks=num_tasks,
    )
    check_whole(**{"num_workers * candidates_per_worker": num_workers * candidates_per_worker})
    search.check(num_workers * candidates_per_worker)
    if search.paired and candidates_per_worker % 2:
        raise ValueError(
            f"`candidates_per_worker` must be even where candidates come in pairs, got "
            f"{candidates_per_worker}. Try {candidates_per_worker + 1}."
        )
    noises.check_noise(noise)
    if search.independent and (noise.mask != "none" or noise.layers):
        raise ValueError(
            f"the search {search.name!r} chooses its own directions, got a mask or layers in "
            "`noise`; use them with 'select' or 'control_variate'."
        )
    if noise.success_rate and not search.stale_step:
        raise ValueError(
            f"`success_rate` needs the search 'select', got {search.name!r}: only there a "
            "candidate is a step that may succeed. Set success_rate=0."
        )
    if search.keeps_step and predictor is not None:
        raise ValueError(
            f"`predictor` cannot be used with the search {search.name!r}, whose surrogate is its "
            "own last step; leave one of them out."
        )
