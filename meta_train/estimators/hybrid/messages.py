"""What crosses between the workers of Hybrid-ES, how, and how many bytes that is."""

from enum import Enum
from typing import Any, NamedTuple

from meta_train.estimators.hybrid.compression import Compressor


class Sends(Enum):
    """What the workers tell each other of the costs in an in-between step.

    ``NOTHING``: no candidate is evaluated. ``BESTS``: each worker's best candidate and its cost.
    ``ALL``: the costs of all candidates, whose ids are known.
    """

    NOTHING = "nothing"
    BESTS = "bests"
    ALL = "all"


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


class Traffic(NamedTuple):
    """Bytes sent in one step, all workers together: a ``refresh`` and an in-between step."""

    refresh: int
    between: int


def traffic(
    size: int,
    *,
    num_workers: int,
    candidates_per_worker: int,
    sends: Sends = Sends.BESTS,
    success_rule: bool = False,
    compressor: Compressor | None = None,
    itemsize: int = 4,
) -> Traffic:
    """What ``hybrid_es`` sends, by formula, for a theta of ``size`` entries.

    A refresh: each worker's gradient, once. (``devices.device_mean`` adds those of a device
    first; then each device sends less than twice the sum. Compressed ones all cross.)
    In between: what the search ``sends``; with the success rule 4 bytes a worker more.
    """
    gradient = compressor.num_bytes(size) if compressor else itemsize * size
    rule = 4 if success_rule else 0
    per_worker = {
        Sends.NOTHING: 0,
        Sends.BESTS: 4 + itemsize + rule,
        Sends.ALL: candidates_per_worker * itemsize + rule,
    }[sends]
    return Traffic(num_workers * gradient, num_workers * per_worker)
