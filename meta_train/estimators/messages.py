"""What crosses between the workers of Hybrid-ES, how, and how many bytes that is."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from meta_train.compression import Compressor

IDLE = ("stale", "skip")  # Modes that evaluate no candidate, so send nothing in between.


class Exchange(NamedTuple):
    """How devices exchange.

    Attributes:
      mean: the mean of a tree over devices, summed in pairs.
      gather: leaves ``[n, ...]`` of every device, in order, as ``[devices * n, ...]``.
    """

    mean: Callable[[Any], Any]
    gather: Callable[[Any], Any]


ALONE = Exchange(lambda tree: tree, lambda tree: tree)


class Costs(NamedTuple):
    """What the workers tell each other in an in-between step, and nothing else.

    Attributes:
      ids: uint32 ``[N]``, the best candidate of each worker; ``()`` if all costs are sent.
      costs: the best candidates' costs ``[N]``, or those of all candidates ``[M]``; inf where
        not finite; ``()`` if none was evaluated.
      successes: int32 ``[N]``, how many of a worker's candidates beat the stale step; ``()``
        without the success rule.
    """

    ids: Any = ()
    costs: Any = ()
    successes: Any = ()


class Message(NamedTuple):
    """All that crosses between workers in one step, and all a replay needs.

    Attributes:
      refreshed: bool, whether ``gradient`` was sent (else it is zeros).
      gradient: the refresh gradient ``[P]``, or each shard's compressed one, ``[N, ...]``.
      searched: bool, whether ``costs`` were sent (else they are zeros).
      costs: see ``Costs``.
    """

    refreshed: Any
    gradient: Any
    searched: Any
    costs: Costs


def bests_suffice(mode: str, combine: str) -> bool:
    """Whether a worker need send its best candidate only, not the costs of all."""
    return mode == "select" and combine in ("argmin", "worker_mean")


def mean_in_pairs(tree: Any) -> Any:
    """The mean over the leading axis; neighbours are added, then pairs of neighbours, and so on.

    So the sum of a part of the axis is a term of the sum of the whole, to the bit, if both
    lengths are powers of two. Other lengths are summed in some order.
    """

    def one(x):
        num = x.shape[0]
        if num & (num - 1):
            return jnp.mean(x, axis=0)
        while x.shape[0] > 1:
            x = x[0::2] + x[1::2]
        return x[0] / num

    return jax.tree.map(one, tree)


class Traffic(NamedTuple):
    """Bytes sent in one step, all workers together: a ``refresh`` and an in-between step."""

    refresh: int
    between: int


def traffic(
    size: int,
    *,
    num_workers: int,
    candidates_per_worker: int,
    mode: str = "select",
    combine: str = "argmin",
    success_rule: bool = False,
    compressor: Compressor | None = None,
    itemsize: int = 4,
) -> Traffic:
    """What ``hybrid_es`` sends, by formula, for a theta of ``size`` entries.

    A refresh: each worker's gradient, once. (``devices.device_tree_mean`` adds those of a device
    first; then each device sends the sum ``log2(devices)`` times. Compressed ones all cross.)
    In between: the best candidate's id and cost of each
    worker where the combination needs only those, else the costs of all candidates (their
    ids are known); 4 bytes a worker more for the success rule; nothing in ``stale`` and
    ``skip``.
    """
    gradient = compressor.num_bytes(size) if compressor else itemsize * size
    per_worker = candidates_per_worker * itemsize
    if bests_suffice(mode, combine):
        per_worker = 4 + itemsize
    if success_rule:
        per_worker += 4
    if mode in IDLE:
        per_worker = 0
    return Traffic(num_workers * gradient, num_workers * per_worker)
