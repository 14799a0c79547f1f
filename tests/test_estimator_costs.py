"""Compute and memory grow as Table 1 of the PES paper says, read off the programs."""

import functools

import jax
import jax.numpy as jnp
import pytest

from launch.studies.pes.table1 import COST_BASE, COST_SIZES, SIGMA
from launch.studies.pes.table1_rows import ROWS
from launch.studies.shared import cost
from learned_opt import reversible_mlp_optimizer
from meta_train.estimators import bptt, fixed_horizon, reversible
from meta_train.reversible.inner import reversible_inner_training
from meta_train.reversible.system import plan
from tasks.data.images import load_images
from tasks.mlp import mlp_classifier


@functools.cache
def measured(measure, name, at):
    """The cost at these sizes; what grows is compared with one base."""
    sizes = dict(at)
    system = cost.dense_system(sizes["S"])
    estimator = ROWS[name].build(system, sizes["N"], sizes["T"], sizes["K"], SIGMA)
    return measure(estimator, jnp.zeros(sizes["P"]))


def fitted(name, symbol, measure, sizes=None, **base):
    """The exponent of ``symbol`` in the cost of one outer step of the estimator ``name``."""
    sizes = sizes or COST_SIZES[symbol]
    at = COST_BASE | base
    costs = [measured(measure, name, tuple((at | {symbol: size}).items())) for size in sizes]
    return cost.exponent(sizes, costs)


@pytest.mark.parametrize("name", ["BPTT", "TBPTT", "RTRL", "UORO", "ES", "PES"])
def test_compute(name):
    expected = ROWS[name].flops
    found = {symbol: fitted(name, symbol, cost.flops) for symbol in COST_SIZES}
    print(name, {symbol: f"{x:.2f}/{expected.get(symbol, 0)}" for symbol, x in found.items()})
    for symbol, value in found.items():
        assert value == pytest.approx(expected.get(symbol, 0), abs=0.15), (name, symbol)


@pytest.mark.parametrize(
    ("name", "symbol"),
    [
        ("BPTT", "T"),
        ("BPTT", "S"),
        ("TBPTT", "K"),
        ("RTRL", "K"),
        ("RTRL", "P"),
        ("RTRL", "S"),
        ("UORO", "K"),
        ("ES", "T"),
        ("PES", "K"),
        ("PES", "S"),
        ("PES", "N"),
    ],
)
def test_memory(name, symbol):
    value = fitted(name, symbol, cost.memory)
    assert value == pytest.approx(ROWS[name].bytes.get(symbol, 0), abs=0.3)


@pytest.mark.parametrize("name", ["PES", "NRES", "UORO", "forward gradient"])
def test_memory_grows_with_theta_and_not_with_its_product_with_the_state(name):
    assert fitted(name, "P", cost.memory, sizes=(2048, 4096), S=8) == pytest.approx(1, abs=0.1)
    assert ROWS[name].bytes["S"] == 1
    both = fitted(name, "S", cost.memory, sizes=(8, 16), P=2048)
    assert both < 0.2


def test_compute_of_a_window_is_that_of_its_forward_unrolls():
    """The step dominates: PES costs 2 N K forward steps, truncated ES 3 N K."""
    forward = 2 * COST_BASE["S"] ** 2 * COST_BASE["N"] * COST_BASE["K"]
    for name, unrolls in {"PES": 2, "NRES": 2, "truncated ES": 3}.items():
        estimator = ROWS[name].build(
            cost.dense_system(COST_BASE["S"]), COST_BASE["N"], COST_BASE["T"], COST_BASE["K"], SIGMA
        )
        ratio = cost.flops(estimator, jnp.zeros(COST_BASE["P"])) / (unrolls * forward)
        assert 1 <= ratio < 1.1, name


def test_memory_of_thousands_of_inner_steps_is_far_below_backpropagation():
    """Compiled only. ``bptt`` stores the states alone, and recomputes every step."""
    task = mlp_classifier(load_images("digits", None), hidden_sizes=(32,), batch_size=8)
    optimizer = reversible_mlp_optimizer((8,))
    system = reversible_inner_training(task, optimizer)
    theta = optimizer.init(jax.random.key(0))
    ours, theirs = (
        cost.memory(kind(system, num_particles=1, horizons=fixed_horizon(2000)), theta)
        for kind in (reversible, bptt)
    )
    assert theirs > 50 * ours, (theirs, ours)
    tape = 2410 * plan(system.reversible, 2000).tape_bits / 8
    assert ours < 3 * tape + 2**20, (ours, tape)
