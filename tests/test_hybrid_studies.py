"""The clock of the simulated study of Hybrid-ES against closed forms."""

import numpy as np
import pytest

from launch import cluster_sim as sim
from launch.studies.hybrid_es import cluster_clock as clocks
from launch.studies.hybrid_es import hybrid_es_cluster as cluster
from launch.studies.hybrid_es import hybrid_training as training


@pytest.mark.parametrize("num", [1, 2, 30, 1000])
@pytest.mark.parametrize("ring", [True, False])
def test_the_event_clock_of_equal_workers_is_the_closed_form(num, ring):
    problem = training.problem(None)
    assert problem.num_weights == 2410
    exchange = sim.ring_all_reduce if ring else sim.halving_doubling
    workers = sim.homogeneous(num, speed=clocks.SPEED, latency=clocks.LATENCY, bandwidth=1e5)
    for recipe in cluster.RECIPES:
        found = clocks.simulated(problem, recipe, workers, exchange)
        expected = clocks.closed_form(problem, recipe, num, 1e5, ring)
        np.testing.assert_allclose(found, expected, rtol=1e-10)


def test_time_to_target_counts_the_gradients():
    clock = clocks.Clock(gradient=5.0, between=1.0)
    recipe = training.Recipe("stale", 3, 1.0)
    assert [clock.at(recipe, steps) for steps in (1, 3, 4, 6)] == [5, 7, 12, 14]
    assert cluster.steps_to_target(np.array([0.5, 0.97, 0.985, 0.97])) == 3
    assert clock.at(recipe, cluster.steps_to_target(np.array([0.5]))) == float("inf")
