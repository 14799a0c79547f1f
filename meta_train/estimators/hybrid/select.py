"""The search of the Hybrid-ES poster: steps are tried, and the best are followed."""

import math

import jax.numpy as jnp
import numpy as np

from meta_train.checks import check_positive, check_whole
from meta_train.estimators.hybrid.messages import Sends
from meta_train.estimators.hybrid.searches import Search, weighted_sum

COMBINES = ("argmin", "worker_mean", "top", "rank")


def select(
    *, step_size: float, combine: str = "argmin", top: int = 1, antithetic: bool = False
) -> Search:
    """Candidates are ``theta - a (d + e_c)``, steps at rate ``a``, and ``g = d + sum_c w_c e_c``.

    ``combine`` chooses the weights: ``argmin`` the best of all, ``worker_mean`` the best of each
    worker alike, ``top`` the best ``m`` alike, ``rank`` logarithmic in the rank over the better
    half. A search, not an estimate: biased to lower cost after a step of plain gradient descent at
    rate ``a``. A candidate whose cost is not finite is never chosen; if none is, ``g = 0``.

    Args:
      step_size: ``a``, the meta-optimizer's learning rate.
      combine: one of ``COMBINES``.
      top: ``m`` (``combine="top"``).
      antithetic: candidates ``2 p`` and ``2 p + 1`` are mirrored.

    Raises:
      ValueError: on a value out of range.

    Source: Bartolo, "Hybrid-ES" (poster); recombination weights: Hansen and Ostermeier 2001.
    Differs: the poster leaves its combination open.
    """
    if combine not in COMBINES:
        raise ValueError(f"`combine` must be one of {list(COMBINES)}, got {combine!r}.")
    check_whole(top=top)
    check_positive(step_size=step_size)
    bests_suffice = combine in ("argmin", "worker_mean")

    def check(num_candidates):
        if top > num_candidates:
            raise ValueError(
                f"`top` must be at most the number of candidates, got top={top} for "
                f"{num_candidates}."
            )

    def stale_step(theta, d):
        return theta - step_size * d

    def step(setting, direction, sent):
        weights = _weights(combine, top, len(sent.costs))
        order = jnp.argsort(sent.costs)[: len(weights)]
        kept = jnp.where(jnp.isfinite(sent.costs[order]), weights, 0.0)
        kept = kept.astype(setting.surrogate.dtype)
        total = jnp.sum(kept)
        # XLA may turn a division by one number into a product, in one program and not another.
        kept = kept * (1 / jnp.where(total > 0, total, 1.0))
        chosen = (sent.ids[order] if bests_suffice else order).astype(jnp.int32)
        if antithetic:
            kept, chosen = kept * (1 - 2 * (chosen % 2)), chosen // 2
        d = setting.surrogate
        found = d + weighted_sum(setting, direction, chosen, kept)
        return jnp.where(total > 0, jnp.where(setting.allowed, found, d), 0.0)

    return Search(
        "select",
        Sends.BESTS if bests_suffice else Sends.ALL,
        step,
        paired=antithetic,
        check=check,
        place=lambda theta, d, eps: stale_step(theta, d + eps),
        stale_step=stale_step,
    )


def _weights(combine: str, top: int, num_costs: int) -> np.ndarray:
    """The weights of the best, best first, of the costs that were sent: all, or the workers'."""
    if combine == "rank" and num_costs > 1:
        num = max(1, num_costs // 2)
        logs = math.log(num_costs / 2 + 0.5) - np.log(np.arange(1, num + 1))
        return logs / logs.sum()
    num = {"argmin": 1, "worker_mean": num_costs, "top": top, "rank": 1}[combine]
    return np.full(num, 1 / num)
