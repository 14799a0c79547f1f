"""The simulated cluster: closed forms, independence of order and split, slow and lost workers."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from launch import cluster_sim as sim
from launch.studies.hybrid_es.unequal_workers import estimate_without
from meta_train import estimators as est
from meta_train.estimators.hybrid import Noise, hybrid_es, select
from meta_train.unroll import UnrolledSystem

LINK = {"speed": 2e9, "latency": 1e-3, "bandwidth": 1e6}


def share(units, num):
    return math.ceil(units / num) * 3e6 / 2e9


@pytest.mark.parametrize("num", [1, 2, 7, 64, 1000])
def test_homogeneous_gradient_descent_is_its_closed_form(num):
    work = sim.Work(100, 3e6, sim.ring_all_reduce(9640.0), after_flops=5e3)
    found = sim.simulate_step(sim.homogeneous(num, **LINK), work).seconds
    ring = 2 * (num - 1) * (1e-3 + 9640.0 / num / 1e6)
    assert found == pytest.approx(share(100, num) + ring + 5e3 / 2e9, rel=1e-10)


@pytest.mark.parametrize("num", [1, 2, 7, 64, 1000])
def test_homogeneous_hybrid_es_is_its_closed_form(num):
    work = sim.Work(96, 3e6, sim.all_gather(384.0), after_flops=5e6)
    found = sim.simulate_step(sim.homogeneous(num, **LINK), work).seconds
    gather = math.ceil(math.log2(num)) * 1e-3 + (num - 1) / num * 384.0 / 1e6
    assert found == pytest.approx(share(96, num) + gather + 5e6 / 2e9, rel=1e-10)


@pytest.mark.parametrize("units", [0, 1, 5, 17])
def test_no_allotment_is_done_earlier(units):
    speed, ids = np.array([1.0, 0.25, 2.0]), np.arange(3)
    counts = sim.allot(units, speed, ids)
    assert counts.sum() == units
    every = [c for c in itertools.product(range(units + 1), repeat=3) if sum(c) == units]
    best = min(np.max(np.array(c) / speed) for c in every)
    assert np.max(counts / speed) == pytest.approx(best)


def unequal(num, dropout=0.0):
    rng = np.random.default_rng(0)
    return sim.Cluster(
        rng.permutation(num),
        2e9 * rng.uniform(0.2, 2, num),
        1e-3 * rng.uniform(0.2, 2, num),
        1e6 * rng.uniform(0.2, 2, num),
        np.full(num, dropout),
    )


WORK = sim.Work(96, 3e6, sim.all_gather(384.0), after_flops=5e6)


def test_the_order_of_workers_does_not_matter():
    cluster = unequal(12, dropout=0.3)
    order = np.random.default_rng(1).permutation(12)
    shuffled = sim.Cluster(*(field[order] for field in cluster))
    seen = set()
    for index in range(6):
        steps = [
            sim.simulate_step(c, WORK, lost=sim.lost_workers(c, 5, index), patience=1.0)
            for c in (cluster, shuffled)
        ]
        assert steps[0].seconds == steps[1].seconds
        np.testing.assert_array_equal(steps[0].arrived, steps[1].arrived)
        seen.add(steps[0].arrived.tobytes())
    assert len(seen) > 3


def test_a_slow_worker_costs_little_with_proportional_shares():
    even = sim.homogeneous(8, **LINK)
    slow = even._replace(speed=even.speed * np.where(np.arange(8) == 3, 0.25, 1.0))
    work = sim.Work(64, 3e6, sim.all_gather(256.0), after_flops=1e5)
    seconds = sim.simulate_step(even, work).seconds
    proportional = sim.simulate_step(slow, work).seconds
    equal = sim.simulate_step(slow, work, proportional=False).seconds
    assert 1 < proportional / seconds < 1.3
    assert 2.5 < equal / seconds < 4
    # Or it is left behind: everyone waits twice as long, and its candidates are missing.
    left = sim.simulate_step(slow, work, patience=1.0, proportional=False)
    np.testing.assert_array_equal(np.flatnonzero(~left.arrived), np.arange(24, 32))
    assert left.seconds < 2.1 * seconds


def test_lost_workers_are_waited_for_and_then_missing_or_made_up_for():
    cluster = sim.homogeneous(4, **LINK)
    lost = np.array([False, True, False, False])
    seconds = sim.simulate_step(cluster, WORK).seconds
    step = sim.simulate_step(cluster, WORK, lost=lost, patience=1.0)
    np.testing.assert_array_equal(step.arrived, np.repeat(~lost, 24))
    assert step.seconds == pytest.approx(seconds + 24 * 3e6 / 2e9, rel=0.01)
    redone = sim.simulate_step(cluster, WORK._replace(redo=True), lost=lost, patience=1.0)
    assert redone.arrived.all()
    assert redone.seconds == pytest.approx(step.seconds + 8 * 3e6 / 2e9, rel=1e-6)
    for redo in (True, False):
        none = sim.simulate_step(cluster, WORK._replace(redo=redo), lost=lost | True, patience=1.0)
        assert none.arrived.all() == redo and none.arrived.any() == redo
    with pytest.raises(ValueError, match=r"`patience` must be finite .* got patience=inf"):
        sim.simulate_step(cluster, WORK, lost=lost)


def test_the_idle_are_not_the_first_to_be_done():
    """More workers than work: patience is counted from those who have some."""
    slow = sim.homogeneous(100, **LINK)
    slow = slow._replace(speed=slow.speed * np.where(np.arange(100) % 2, 0.6, 1.0))
    work = WORK._replace(units=80)
    step = sim.simulate_step(slow, work, patience=1.0)
    assert step.arrived.all()
    assert step.seconds == sim.simulate_step(slow, work).seconds
    nothing = sim.simulate_step(slow, WORK._replace(units=0), patience=1.0)
    assert nothing.arrived.shape == (0,)


def test_workers_are_lost_as_often_as_they_should_be():
    cluster = unequal(50, dropout=0.1)
    lost = np.array([sim.lost_workers(cluster, 0, step) for step in range(200)])
    assert abs(lost.mean() - 0.1) < 4.5 * np.sqrt(0.1 * 0.9 / lost.size)
    assert (lost.mean(axis=0) > 0).all() and (lost.mean(axis=1) < 0.5).all()
    np.testing.assert_array_equal(lost[7], sim.lost_workers(cluster, 0, 7))


# The real algorithm on the simulated clock.

CANDIDATES, SIZE, RATE, EVERY = 16, 12, 0.2, 4


def quadratic():
    """``|a theta - y|^2 / 2`` plus noise shared by all candidates of a step."""
    rng = np.random.default_rng(0)
    a, y = jnp.asarray(rng.normal(size=(SIZE, SIZE)) / 4), jnp.asarray(rng.normal(size=SIZE))

    def step(theta, state, key):
        return state, jnp.sum((a @ theta - y - 0.01 * jax.random.normal(key, (SIZE,))) ** 2) / 2

    return UnrolledSystem(lambda theta, key, horizon: (), step)


def build(num_workers):
    """Hybrid-ES with all candidates split over some workers."""
    system, horizons = quadratic(), est.fixed_horizon(1)
    return hybrid_es(
        system,
        est.bptt(system, num_particles=16, horizons=horizons),
        horizons=horizons,
        refresh_every=EVERY,
        num_workers=num_workers,
        candidates_per_worker=CANDIDATES // num_workers,
        noise=Noise(2.0, relative=True),
        search=select(step_size=RATE, combine="rank"),
    )


@pytest.fixture(scope="module")
def algorithm():
    """A state and ``advance`` for ``simulate``: Hybrid-ES without the costs that are missing."""
    estimator, theta = build(1), jnp.zeros(SIZE)

    @jax.jit
    def step(theta, state, index, arrived):
        grad, state = estimate_without(estimator, theta, state, jax.random.key(index), arrived)
        return theta - RATE * grad, state

    def advance(state, arrived):
        theta, inner, index = state
        theta, inner = step(theta, inner, index, jnp.asarray(arrived))
        return (theta, inner, index + 1), np.asarray(theta)

    return (theta, estimator.init(theta, jax.random.key(100)), 0), advance, step


def plan(step):
    """A refresh and the search in units of one candidate."""
    return WORK._replace(units=CANDIDATES, redo=step % EVERY == 0)


def run(algorithm, cluster, **how):
    return sim.simulate(cluster, plan, 60, algorithm[1], algorithm[0], **how)


def test_a_run_is_the_same_on_every_cluster_on_which_all_arrives(algorithm):
    runs = [
        run(algorithm, cluster)
        for cluster in (sim.homogeneous(1, **LINK), sim.homogeneous(7, **LINK), unequal(20))
    ]
    for other in runs[1:]:
        np.testing.assert_array_equal(other.records, runs[0].records)
    assert len({float(r.clock[-1]) for r in runs}) == 3
    assert runs[1].clock[-1] < runs[0].clock[-1]


def test_the_algorithm_is_the_same_however_candidates_are_split():
    """What the simulation rests on: the costs of a step do not depend on who computes them."""
    theta, messages = jnp.zeros(SIZE), []
    for estimator in map(build, (1, 4)):
        step = jax.jit(estimator.estimate)
        state = estimator.init(theta, jax.random.key(100))
        for index in range(2):
            grad, state, metrics = step(theta, state, jax.random.key(index))
        messages.append((metrics["message"].costs.costs, grad))
    for a, b in zip(*messages, strict=True):
        assert np.std(a) > 0
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_what_arrives_is_all_that_counts(algorithm):
    """With one candidate's cost left, the step is that candidate's; with all, the estimate."""
    (theta, state, _), _, step = algorithm
    everything = jnp.ones(CANDIDATES, bool)
    theta, state = step(theta, state, 0, everything)  # A refresh.
    moved = {tuple(np.asarray(step(theta, state, 1, everything)[0]))}
    for kept in range(3):
        only = jnp.arange(CANDIDATES) == kept
        moved.add(tuple(np.asarray(step(theta, state, 1, only)[0])))
    assert len(moved) == 4
    none = step(theta, state, 1, ~everything)[0]
    np.testing.assert_array_equal(none, theta)


def test_a_tenth_lost_hardly_slows_the_descent(algorithm):
    lossy = sim.homogeneous(8, dropout=0.1, **LINK)
    whole = run(algorithm, lossy._replace(dropout=0 * lossy.dropout))
    lost = run(algorithm, lossy, patience=1.0)
    system = quadratic()

    def loss(theta):
        return float(system.step(theta, (), jax.random.key(0))[1])

    first, last, with_losses = loss(0 * whole.records[0]), loss(whole.records[-1]), None
    with_losses = loss(lost.records[-1])
    assert last < 0.2 * first
    assert first - with_losses > 0.95 * (first - last)
    assert not np.array_equal(whole.records[-1], lost.records[-1])
