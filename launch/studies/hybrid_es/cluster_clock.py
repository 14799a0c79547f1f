"""What a step of Hybrid-ES takes on a cluster: by the event clock, and in closed form."""

import math
from typing import NamedTuple

from launch import cluster_sim as sim
from launch.studies.hybrid_es.hybrid_training import BATCH, Problem, Recipe

# A worker: a small embedded processor on a radio link, unless the bandwidth is swept.
SPEED = 1e9  # FLOP/s
LATENCY = 1e-3  # s
BANDWIDTH = 1e4  # bytes/s
# One normal number against one multiply or add of the network: 4.1 and 0.011 ns measured on
# one core of a two-core x86 machine, float32.
DRAW_FLOPS = 400


def works(
    problem: Problem, recipe: Recipe, num_workers: int, exchange=sim.halving_doubling
) -> tuple[sim.Work, sim.Work]:
    """A step with a gradient, and one between two.

    Gradient: examples are shared out, their gradients summed; lost ones are done again. Forward
    and backward take 6 operations a weight and example, the update 2 a weight.

    Search: candidates are shared out (or parts of their batches, where there are more workers),
    all costs are sent to all (and summed), and everyone draws the best again.
    """
    size, candidates = problem.num_weights, recipe.num_candidates
    gradient = sim.Work(BATCH, 6.0 * size, exchange(4.0 * size), 2.0 * size, redo=True)
    if recipe.mode != "select":
        return gradient, sim.Work(0, 0.0, sim.silence, 2.0 * size)
    parts = min(BATCH, math.ceil(num_workers / candidates))
    flops = DRAW_FLOPS * size + 2.0 * size * BATCH / parts
    after = recipe.top * DRAW_FLOPS * size + 2.0 * size
    gather = sim.all_gather if parts == 1 else sim.halving_doubling
    return gradient, sim.Work(candidates * parts, flops, gather(4.0 * candidates), after)


class Clock(NamedTuple):
    """Seconds of a step with a gradient, and of a step between two."""

    gradient: float
    between: float

    def at(self, recipe: Recipe, num_steps: float) -> float:
        """The simulated time after ``num_steps`` steps."""
        if not math.isfinite(num_steps):
            return math.inf
        gradients = math.ceil(num_steps / recipe.refresh_every)
        return gradients * self.gradient + (num_steps - gradients) * self.between


def simulated(problem, recipe, cluster, exchange) -> Clock:
    """By the event clock."""
    of = works(problem, recipe, len(cluster.id), exchange)
    return Clock(*(sim.simulate_step(cluster, work).seconds for work in of))


def closed_form(problem, recipe, num: int, bandwidth: float, ring: bool) -> Clock:
    """For a homogeneous cluster."""
    size = problem.num_weights
    doublings, sent = math.ceil(math.log2(num)) * LATENCY, 4 * (num - 1) / num / bandwidth
    hops = 2 * (num - 1) * LATENCY if ring else 2 * doublings
    compute = math.ceil(BATCH / num) * 6 * size + 2 * size
    gradient = compute / SPEED + hops + 2 * size * sent
    if recipe.mode != "select":
        return Clock(gradient, 2 * size / SPEED)
    candidates = recipe.num_candidates
    parts = min(BATCH, math.ceil(num / candidates))
    share = math.ceil(candidates * parts / num)
    flops = share * (DRAW_FLOPS * size + 2 * size * BATCH / parts)
    flops += recipe.top * DRAW_FLOPS * size + 2 * size
    return Clock(
        gradient, flops / SPEED + (1 if parts == 1 else 2) * (doublings + candidates * sent)
    )
