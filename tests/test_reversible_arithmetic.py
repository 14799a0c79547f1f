"""The exact product, its inverse and the spill plan, against Python's unbounded integers."""

from functools import partial

import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings

from meta_train.reversible import arithmetic

pytestmark = pytest.mark.exact

DECAY_BITS = (1, 8, 10, 16, 20)
multiply = jax.jit(arithmetic.multiply, static_argnums=3)
divide = jax.jit(arithmetic.divide, static_argnums=3)
SIZE = 16

extremes = st.sampled_from([0, 1, -1, 2**61, -(2**61), 2**62 - 1, -(2**62) + 1, 1023, -1024])
values = hnp.arrays(
    np.int64, SIZE, elements=st.one_of(extremes, st.integers(-(2**62) + 1, 2**62 - 1))
)


def buffers(bits):
    top = 2 ** (62 - bits) - 1
    return hnp.arrays(
        np.int64, SIZE, elements=st.one_of(st.just(top), st.just(0), st.integers(0, top))
    )


def numerators(bits):
    ends = st.sampled_from([1, 2**bits, 2**bits - 1])
    return hnp.arrays(np.int64, SIZE, elements=st.one_of(ends, st.integers(1, 2**bits)))


@settings(max_examples=150, deadline=None)
@given(st.data(), st.sampled_from(DECAY_BITS))
def test_product_matches_algorithm_3_in_python_integers_and_divides_back(data, bits):
    v, i, n = data.draw(values), data.draw(buffers(bits)), data.draw(numerators(bits))
    with jax.enable_x64(True):
        product, buffer = multiply(v, i, n, bits)
        back, buffer_back = divide(product, buffer, n, bits)
    product, buffer, d = np.asarray(product), np.asarray(buffer), 2**bits
    for j in range(SIZE):
        vj, ij, nj = int(v[j]), int(i[j]), int(n[j])
        ij = ij * d + vj % d
        assert int(product[j]) == vj // d * nj + ij % nj
        assert int(buffer[j]) == ij // nj
        assert abs(int(product[j]) - vj * nj / d) <= max(d, abs(vj) * 2.0**-50)
    np.testing.assert_array_equal(back, v)
    np.testing.assert_array_equal(buffer_back, i)


@settings(max_examples=150, deadline=None)
@given(values, numerators(20))
@example(np.full(SIZE, 2**62 - 1), np.full(SIZE, 1))
def test_division_by_floats_is_floor_division(x, n):
    with jax.enable_x64(True):
        quotient, remainder = jax.jit(arithmetic.divmod_exact)(x, n)
    np.testing.assert_array_equal(quotient, x // n)
    np.testing.assert_array_equal(remainder, x % n)


@settings(max_examples=50, deadline=None)
@given(values, buffers(10))
def test_decay_one_changes_nothing(v, i):
    with jax.enable_x64(True):
        product, buffer = multiply(v, i, np.full(SIZE, 1024), 10)
    np.testing.assert_array_equal(product, v)
    np.testing.assert_array_equal(buffer, i)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(DECAY_BITS),
    st.integers(1, 400),
    st.integers(0, 2**32 - 1),
    st.sampled_from(["low", "high", "any", "ends"]),
)
@example(16, 400, 0, "low")
def test_plan_keeps_the_worst_buffer_below_its_limit(bits, num_steps, seed, kind):
    """The worst case: all digits shifted out are ones, and nothing larger ever could be."""
    d, rng = 2**bits, np.random.default_rng(seed)
    n = {
        "low": rng.integers(1, min(d, 3) + 1, num_steps),
        "high": rng.integers(max(1, d - 3), d + 1, num_steps),
        "any": rng.integers(1, d + 1, num_steps),
        "ends": rng.choice([1, d], num_steps),
    }[kind]
    plan = arithmetic.plan_spills(n[:, None], bits)
    worst, spilled = 0, 0
    for t in range(num_steps):
        if plan.slots[t, 0] < plan.num_rows:
            assert plan.slots[t, 0] == spilled  # rows are filled in order, none twice
            spilled += 1
            assert worst << bits >= 2**61  # not earlier than about necessary
            worst >>= 32
        assert worst << bits < 2**62
        worst = (worst * d + d - 1) // int(n[t])
        assert worst < 2**62
    assert spilled == plan.num_rows


@settings(max_examples=12, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([8, 10, 16]))
def test_long_products_with_two_spilling_accumulators_are_undone_exactly(seed, bits):
    num_steps, rng = 600, np.random.default_rng(seed)
    n = rng.integers(1, 2**bits + 1, (num_steps, 2)) // np.array([1, 3]) + 1
    n = np.minimum(n, 2**bits)
    start = rng.integers(-(2**61), 2**61, (2, 5))
    plan = arithmetic.plan_spills(n, bits)
    assert plan.num_rows > 10

    with jax.enable_x64(True):
        after, tape = _forward(bits, plan.num_rows, start, n, plan.slots)
        value, buffer = _backward(bits, plan.num_rows, after, tape, n, plan.slots)
    assert not np.array_equal(after[0], start)
    np.testing.assert_array_equal(value, start)
    np.testing.assert_array_equal(buffer, 0)


@partial(jax.jit, static_argnums=(0, 1))
def _forward(bits, num_rows, start, n, slots):
    def step(carry, xs):
        (value, buffer), tape = carry
        buffer, tape = arithmetic.spill(buffer, tape, xs[1], num_rows)
        # Something is added between products, as in training.
        value, buffer = arithmetic.multiply(value, buffer, xs[0][:, None], bits)
        return ((value + 12345678901, buffer), tape), None

    empty = jnp.zeros((num_rows + 1, start.shape[1]), jnp.uint32)
    begin = (start, jnp.zeros(start.shape, jnp.int64)), empty
    return jax.lax.scan(step, begin, (n, slots))[0]


@partial(jax.jit, static_argnums=(0, 1))
def _backward(bits, num_rows, after, tape, n, slots):
    def step(carry, xs):
        value, buffer = carry
        value, buffer = arithmetic.divide(value - 12345678901, buffer, xs[0][:, None], bits)
        return (value, arithmetic.unspill(buffer, tape, xs[1], num_rows)), None

    return jax.lax.scan(step, after, (n, slots), reverse=True)[0]


@pytest.mark.parametrize(
    ("num_steps", "most"), [(1000, 1.6), (10_000, 1.1)], ids=["T=1000", "T=10000"]
)
def test_tape_is_near_the_information_bound(num_steps, most):
    plan = arithmetic.plan_spills(np.full((num_steps, 1), round(0.9 * 1024)), 10)
    bound = num_steps * np.log2(1 / 0.9)
    assert plan.bound_bits == pytest.approx(bound, rel=0.01)
    assert bound <= plan.tape_bits <= most * bound


def test_decay_one_needs_no_tape():
    plan = arithmetic.plan_spills(np.full((5000, 1), 1024), 10)
    assert plan.num_rows == 0
    assert plan.bound_bits == 0


@settings(max_examples=100, deadline=None)
@given(st.floats(0, 1), st.sampled_from(DECAY_BITS))
@example(0.9996, 10)
@example(float(np.nextafter(1, 0)), 20)
@example(1.0, 10)
def test_snap_is_the_nearest_positive_multiple_with_derivative_one(decay, bits):
    """Only 1 is 1: below it a gradient must count for something."""
    with jax.enable_x64(True):
        snapped, slope = jax.value_and_grad(arithmetic.snap)(jnp.float64(decay), bits)
    snapped, slope = float(snapped), float(slope)
    ends = (2.0**-bits, 1 - 2.0**-bits) if decay < 1 else (1.0, 1.0)
    assert (snapped * 2**bits).is_integer()
    assert ends[0] <= snapped <= ends[1]
    assert abs(snapped - np.clip(decay, *ends)) <= 2.0 ** -(bits + 1)
    assert slope == 1.0


@pytest.mark.parametrize("decay", [-1e-9, -0.1, -5.0, 1 + 2.0**-23, 1.0004, 3.0, np.inf, np.nan])
def test_snap_leaves_what_is_no_decay_off_every_plan(decay):
    n = float(arithmetic.snap(jnp.float32(decay), 10)) * 1024
    assert not 1 <= n <= 1024


def test_quantize_rounds_to_nearest_and_back(x64):
    x = jnp.array([0.1, -0.1, 3.0, -1e-9, 2.0**-41])
    grid = arithmetic.quantize(x, 40)
    assert grid.dtype == jnp.int64
    np.testing.assert_array_equal(grid[2:], [3 << 40, -1100, 0])  # half rounds to even
    np.testing.assert_allclose(arithmetic.dequantize(grid, 40, x.dtype), x, rtol=0, atol=2.0**-41)


@pytest.mark.parametrize("field", ["weight_bits", "accumulator_bits", "decay_bits"])
def test_impossible_formats_are_refused(field):
    with pytest.raises(ValueError, match=f"{field}=64"):
        arithmetic.check_fixed_point(arithmetic.FixedPoint(**{field: 64}))
