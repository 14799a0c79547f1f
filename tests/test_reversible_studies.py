"""What the reversible studies compare with: checkpointing, and the gates of the benchmark."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from launch.benchmarks.checkpointing import binomial_schedule, binomial_vjp, nested_scan
from launch.benchmarks.reversible import Measurement, gates

pytestmark = pytest.mark.exact


def test_benchmark_gates_say_what_holds_and_what_fails():
    good = [
        Measurement("backpropagation", 1000, 150.0, 80.0, 60.0, 0.0),
        Measurement("every step recomputed", 1000, 50.0, 30.0, 18.0, 0.0),
        Measurement("reversible", 1000, 59.0, 35.0, 0.25, 1e-6),
        Measurement("binomial, 3 states", 1000, 400.0, 99.0, 0.2, 0.0),
        Measurement("binomial, 100 states", 1000, 55.0, 99.0, 2.0, 0.0),
    ]
    assert [row["holds"] for row in gates(good)] == [True] * 7
    bad = list(good)
    bad[2] = bad[2]._replace(
        milliseconds=61.0, wall_milliseconds=37.0, temporary_mib=0.4, error=np.nan
    )
    bad[3] = bad[3]._replace(milliseconds=60.0)
    assert [row["holds"] for row in gates(bad)] == [False] * 5 + [True] * 2
    json.dumps(gates(bad))


def step(theta, state, t):
    """Something nonlinear that depends on the step."""
    return jnp.tanh(theta * state + 0.1 * jnp.sin(state[::-1] + t))


@pytest.mark.parametrize(("num_steps", "num_slots"), [(1, 1), (7, 1), (30, 2), (31, 5), (12, 40)])
def test_binomial_checkpointing_equals_plain_backpropagation(num_steps, num_slots):
    theta, state = jnp.float32(0.9), jnp.array([0.5, -1.0, 2.0])

    def value(theta, state):
        for t in range(num_steps):
            state = step(theta, state, t)
        return jnp.sum(state**2)

    schedule = binomial_schedule(num_steps, num_slots)
    found = jax.jit(
        lambda theta, state: binomial_vjp(step, theta, state, schedule, lambda s: jnp.sum(s**2))
    )(theta, state)
    expected = jax.grad(value, argnums=(0, 1))(theta, state)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize(
    ("num_steps", "num_slots", "advances"), [(10, 10, 9), (10, 1, 45), (10, 3, 15)]
)
def test_binomial_schedule_takes_the_fewest_forward_steps(num_steps, num_slots, advances):
    """``r T - C(s + r, r - 1)`` with ``s`` states, ``r`` repetitions (Griewank, Walther 2000)."""
    schedule = binomial_schedule(num_steps, num_slots)
    assert schedule.advance.sum() == advances
    assert schedule.back.sum() == num_steps


def test_nested_loops_take_the_same_steps_in_order():
    state = jnp.array([0.5, -1.0, 2.0])
    nested = nested_scan(lambda s, t: step(0.9, s, t), state, (3, 4, 2))
    for t in range(24):
        state = step(0.9, state, t)
    np.testing.assert_allclose(nested, state, rtol=1e-5)
