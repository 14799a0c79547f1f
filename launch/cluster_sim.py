"""A cluster of unequal workers on a simulated clock, running a real algorithm.

The clock decides how long a step takes and whose work arrives; what the step computes from
that is the algorithm's own business (``simulate`` calls it). Step: every worker does its share
of the work, the results are exchanged, and every worker finishes the step on its own.
"""

import heapq
import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, cast

import jax
import numpy as np
import simpy


class Cluster(NamedTuple):
    """Workers, each field ``[N]``; in any order, since everything is addressed by ``id``.

    Attributes:
      id: int, distinct.
      speed: FLOP/s.
      latency: seconds a message takes however short it is.
      bandwidth: bytes/s of the worker's link.
      dropout: probability that the worker is lost in a step. In the next one it is back,
        having read what it missed (for Hybrid-ES: seeds and costs).
    """

    id: np.ndarray
    speed: np.ndarray
    latency: np.ndarray
    bandwidth: np.ndarray
    dropout: np.ndarray


class Work(NamedTuple):
    """What one step asks of a cluster.

    Attributes:
      units: equal pieces, each done by one worker, whichever.
      unit_flops: floating-point operations of one.
      rounds: ``num_workers -> bytes`` each of them sends in every round of the exchange; see
        ``ring_all_reduce`` and ``all_gather``.
      after_flops: what every worker does after the exchange.
      redo: whether lost pieces are done again by the others, or are missing from the step.
    """

    units: int
    unit_flops: float
    rounds: Callable[[int], list[float]]
    after_flops: float = 0.0
    redo: bool = False


class Step(NamedTuple):
    """What became of a step: its length, and which pieces arrived, bool ``[units]``."""

    seconds: float
    arrived: np.ndarray


class ClusterRun(NamedTuple):
    """A simulated run: the algorithm's last state, what it recorded of each step, and the
    simulated time at the end of each step, ``[T]`` seconds."""

    state: Any
    records: list[Any]
    clock: np.ndarray


def homogeneous(
    num: int, *, speed: float, latency: float, bandwidth: float, dropout: float = 0.0
) -> Cluster:
    """``num`` equal workers."""
    values = (np.full(num, x, float) for x in (speed, latency, bandwidth, dropout))
    return Cluster(np.arange(num), *values)


def ring_all_reduce(size: float) -> Callable[[int], list[float]]:
    """The sum of everyone's ``size`` bytes: ``2 (N - 1)`` rounds of a part of ``1 / N``.

    The least traffic there is; in a homogeneous cluster ``2 (N - 1) (latency + size / (N
    bandwidth))``. Source: Patarasuk and Yuan 2009.
    """
    return lambda num: [size / num] * (2 * (num - 1))


def all_gather(size: float) -> Callable[[int], list[float]]:
    """Everyone's part of ``size`` bytes to everyone, in ``ceil(log2 N)`` rounds of doubling.

    In a homogeneous cluster ``ceil(log2 N) latency + (N - 1) / N size / bandwidth``.
    """

    def rounds(num):
        held = [2**k for k in range(math.ceil(math.log2(num)))]
        return [size / num * min(parts, num - parts) for parts in held]

    return rounds


def halving_doubling(size: float) -> Callable[[int], list[float]]:
    """The sum of everyone's ``size`` bytes, in fewer rounds than around a ring.

    An all-gather backwards and forwards; in a homogeneous cluster ``2 ceil(log2 N) latency + 2
    (N - 1) / N size / bandwidth``. Source: Thakur, Rabenseifner, Gropp 2005.
    """
    gather = all_gather(size)
    return lambda num: gather(num)[::-1] + gather(num)


def silence(num: int) -> list[float]:
    """No exchange."""
    del num
    return []


def allot(units: int, speed: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Pieces of work for each worker, int ``[N]``, so that the last is done as early as possible.

    Proportional to speed, up to whole pieces; ties go to the lowest id.
    """
    counts = np.floor(units * (speed / speed.sum()) * (1 - 1e-12)).astype(int)
    heap = [((counts[n] + 1) / speed[n], int(ids[n]), n) for n in range(len(speed))]
    heapq.heapify(heap)
    for _ in range(units - counts.sum()):
        _, worker, n = heapq.heappop(heap)
        counts[n] += 1
        heapq.heappush(heap, ((counts[n] + 1) / speed[n], worker, n))
    return counts


def simulate_step(
    cluster: Cluster,
    work: Work,
    *,
    lost: np.ndarray | None = None,
    patience: float = math.inf,
    proportional: bool = True,
) -> Step:
    """One step on the event clock.

    When half of the workers with a share are done with it, the others get ``patience`` times as
    long again; those not done by then (the lost, and the slow) are left behind in this step.
    A round of the exchange ends when the slowest link is through. If everyone is lost, the
    step takes as long as the slowest share and the patience; nothing arrives, and ``redo`` is
    done by all.

    Args:
      lost: bool ``[N]``, workers whose results never arrive.
      patience: as a multiple of the time the first half took.
      proportional: shares by speed, or equal.

    Raises:
      ValueError: if workers are lost and the patience for them is infinite.
    """
    num = len(cluster.id)
    lost = np.zeros(num, bool) if lost is None else lost
    if lost.any() and not math.isfinite(patience):
        raise ValueError(
            "`patience` must be finite where workers can be lost, got patience=inf; "
            "nobody would ever stop waiting for them."
        )
    everyone = np.ones(num, bool)
    speed = cluster.speed if proportional else np.ones(num)
    counts = allot(work.units, speed, cluster.id)
    env = simpy.Environment()

    def step():
        arrived = yield from _compute(env, cluster, counts, work.unit_flops, lost, patience)
        present = arrived if arrived.any() else everyone
        missing = int(counts[~arrived].sum())
        if work.redo and missing:
            again = np.zeros(num, int)
            again[present] = allot(missing, speed[present], cluster.id[present])
            yield from _compute(env, cluster, again, work.unit_flops, ~everyone, math.inf)
            arrived = everyone
        for sent in work.rounds(int(present.sum())):
            yield env.timeout(np.max(cluster.latency[present] + sent / cluster.bandwidth[present]))
        yield env.timeout(work.after_flops / cluster.speed[present].min())
        return arrived

    arrived = cast(np.ndarray, env.run(env.process(step())))
    order = np.argsort(cluster.id)
    owner = np.repeat(order, counts[order])
    return Step(float(env.now), arrived[owner])


def _compute(env, cluster, counts, unit_flops, lost, patience):
    """A process: everyone works on their share; returns who is there then, bool ``[N]``."""
    start, inbox = env.now, simpy.Store(env)
    seconds = counts * unit_flops / cluster.speed
    busy = np.flatnonzero(counts)
    arrived = ~lost & (counts == 0)
    num_alive = int(np.sum(~lost[busy]))
    if len(busy) and not num_alive:
        yield env.timeout((1 + patience) * seconds.max())

    def worker(n):
        yield env.timeout(seconds[n])
        if not lost[n]:
            inbox.put(n)

    for n in busy:
        env.process(worker(n))
    half = math.ceil(len(busy) / 2)
    deadline = env.event()
    for done in range(1, (len(busy) if num_alive else 0) + 1):
        result = inbox.get()
        yield result | deadline
        if not result.triggered:
            result.cancel()
            break
        arrived[result.value] = True
        if done == min(half, num_alive) and math.isfinite(patience):
            deadline = env.timeout(patience * (env.now - start))
    return arrived


def lost_workers(cluster: Cluster, seed: int, step: int) -> np.ndarray:
    """Who is lost in a step, bool ``[N]``: a draw for each worker id, step and seed."""
    if not cluster.dropout.any():
        return np.zeros(len(cluster.id), bool)
    return np.asarray(_uniform(seed, step, cluster.id)) < cluster.dropout


@jax.jit
def _uniform(seed, step, ids):
    key = jax.random.fold_in(jax.random.key(seed), step)
    return jax.vmap(lambda i: jax.random.uniform(jax.random.fold_in(key, i)))(ids)


def simulate(
    cluster: Cluster,
    plan: Callable[[int], Work],
    num_steps: int,
    advance: Callable[[Any, np.ndarray], tuple[Any, Any]],
    state: Any,
    *,
    seed: int = 0,
    patience: float = math.inf,
    proportional: bool = True,
) -> ClusterRun:
    """Runs an algorithm step by step, with what arrives in time.

    Args:
      plan: ``step -> Work``.
      advance: ``(state, arrived) -> (state, record)``, the algorithm's step without the pieces
        of work that did not arrive. It never sees the cluster, so a run in which everything
        arrives is the same on every cluster.
      state: the algorithm's state at the start.
      seed: of the workers' losses.

    Raises, other arguments: see ``simulate_step``.
    """
    known: dict[Any, Step] = {}
    records, clock, now = [], [], 0.0
    for index in range(num_steps):
        work, lost = plan(index), lost_workers(cluster, seed, index)
        run = partial(simulate_step, cluster, work, patience=patience, proportional=proportional)
        case = (work, lost.tobytes())
        if case not in known:
            known[case] = run(lost=lost)
        state, record = advance(state, known[case].arrived)
        now += known[case].seconds
        records.append(record)
        clock.append(now)
    return ClusterRun(state, records, np.array(clock))
