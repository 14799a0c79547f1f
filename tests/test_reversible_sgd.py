"""Runs of reversible SGD: recovered bit for bit, their hypergradients, and how they fail."""

from functools import partial

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from jax.flatten_util import ravel_pytree

from meta_train import reversible
from meta_train.reversible import DOUBLE, SINGLE, Failure, FixedPoint
from meta_train.reversible.arithmetic import snap
from meta_train.reversible.dynamics import Cotangents, reverse, run
from meta_train.reversible.sgd import _problem, naive_reversal

pytestmark = pytest.mark.exact

PARAMS = {"layer1": {"w": (3, 4), "b": (4,)}, "layer2": {"w": (4, 2)}}


def make_params(seed=0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: rng.normal(0, 0.5, shape).astype(dtype),
        PARAMS,
        is_leaf=lambda x: isinstance(x, tuple),
    )


def loss(params, theta, step):
    """A small regression; theta scales the L2 penalty and is the target."""
    x = jnp.sin(jnp.arange(24.0).reshape(8, 3) * (1.3 + step % 5)).astype(theta["target"].dtype)
    hidden = jnp.tanh(x @ params["layer1"]["w"] + params["layer1"]["b"])
    output = hidden @ params["layer2"]["w"]
    penalty = jnp.exp(theta["log_l2"]) * jnp.sum(params["layer2"]["w"] ** 2)
    return jnp.mean((output - theta["target"]) ** 2) + penalty


def objective(params, theta):
    return loss(params, theta, 7) + 0.1 * jnp.sum(theta["target"] ** 2)


def make_theta(dtype=np.float32):
    return {
        "target": np.asarray([[0.5, -0.3]] * 8, dtype),
        "log_l2": np.asarray(-4.0, dtype),
    }


def schedules(kind, num_steps, seed, dtype, params, per_layer):
    """Learning rates and momenta of one layout, with exact 1, tiny and ordinary momenta."""
    rng = np.random.default_rng(seed)

    def rates(*shape):
        return np.asarray(rng.uniform(-0.01, 0.04, shape), dtype)

    def momenta(*shape):
        m = rng.uniform(0.5, 0.999, shape)
        m = np.where(rng.uniform(size=shape) < 0.1, 1.0, m)
        m = np.where(rng.uniform(size=shape) < 0.01, 1e-5, m)
        return np.asarray(m, dtype)

    return {
        "constant": lambda: (rates(), momenta()),
        "per step": lambda: (rates(num_steps), momenta(num_steps)),
        "per layer": lambda: (
            jax.tree.map(lambda _: rates(num_steps), per_layer),
            jax.tree.map(lambda _: momenta(num_steps), per_layer),
        ),
        "per parameter": lambda: (
            jax.tree.map(lambda p: rates(num_steps, *p.shape), params),
            jax.tree.map(lambda p: momenta(num_steps, *p.shape), params),
        ),
        "per parameter, constant in time": lambda: (
            jax.tree.map(lambda p: rates(1, *p.shape), params),
            jax.tree.map(lambda p: momenta(1, *p.shape), params),
        ),
    }[kind]()


KINDS = (
    "constant",
    "per step",
    "per layer",
    "per parameter",
    "per parameter, constant in time",
)


def make_start(kind, num_steps, seed=0, dtype=np.float32):
    params, per_layer = make_params(seed, dtype), {"layer1": {"w": 0, "b": 0}, "layer2": 0}
    rates, momenta = schedules(kind, num_steps, seed, dtype, params, per_layer)
    start = reversible.setup(params, rates, momenta, make_theta(dtype))
    velocity = jax.tree.map(lambda p: np.asarray(0.1 * np.cos(p), dtype), params)
    return start._replace(velocity=velocity)


def bptt(start, num_steps, decay_bits):
    """The same objective by plain backpropagation; momenta are rounded alike."""

    def value(start):
        def at(schedule, t):
            pick = lambda s: s if s.ndim == 0 else s[t if s.shape[0] == num_steps else 0]  # noqa: E731
            return jax.tree.map(
                lambda s, covered: jax.tree.map(lambda _: pick(s), covered), schedule, start.params
            )

        def step(carry, t):
            w, v = carry
            g = jax.grad(loss)(w, start.theta, t)
            m = jax.tree.map(lambda m: snap(m, decay_bits), at(start.momenta, t))
            v = jax.tree.map(lambda v, g, m: m * v - (1 - m) * g, v, g, m)
            w = jax.tree.map(lambda w, v, a: w + a * v, w, v, at(start.learning_rates, t))
            return (w, v), None

        steps = jnp.arange(num_steps, dtype=jnp.int32)
        (w, _), _ = jax.lax.scan(step, (start.params, start.velocity), steps)
        return objective(w, start.theta)

    return jax.value_and_grad(value)(start)


def flat(tree):
    """In NumPy, which compiles nothing."""
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])


def relative_error(a, b):
    a, b = flat(a), flat(b)
    assert np.linalg.norm(b) > 1e-6, "a comparison with zero proves nothing"
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


# --- hypergradients -------------------------------------------------------------------


@pytest.mark.slow  # Of rates per layer: over a thousand steps below.
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "per step"])
def test_hypergradients_equal_bptt_in_double(kind, x64):
    num_steps = 200
    start = make_start(kind, num_steps, dtype=np.float64)
    value, grads, trained = reversible.hypergradients(
        loss, objective, start, num_steps=num_steps, fixed=DOUBLE
    )
    expected_value, expected = jax.jit(bptt, static_argnums=(1, 2))(start, num_steps, 10)
    reversible.raise_if_failed(trained.report)
    assert value == pytest.approx(float(expected_value), rel=1e-10)
    for name in start._fields:
        assert relative_error(getattr(grads, name), getattr(expected, name)) < 1e-7, name
    assert jax.tree.structure(grads) == jax.tree.structure(start)
    assert jax.tree.map(jnp.shape, grads) == jax.tree.map(jnp.shape, start)


def test_every_hypergradient_of_a_thousand_steps_equals_bptt_in_double(x64):
    """Leaf by leaf, at a rate where training descends and does not turn chaotic."""
    num_steps = 1000
    start = make_start("per layer", num_steps, dtype=np.float64)
    start = start._replace(
        learning_rates=jax.tree.map(lambda a: jnp.full_like(a, 0.05), start.learning_rates),
        momenta=jax.tree.map(lambda m: jnp.full_like(m, 0.9), start.momenta),
    )
    value, grads, trained = reversible.hypergradients(
        loss, objective, start, num_steps=num_steps, fixed=DOUBLE
    )
    assert trained.losses[-1] < 0.5 * trained.losses[0]
    assert trained.tape_bits > trained.bound_bits > 0
    expected_value, expected = jax.jit(bptt, static_argnums=(1, 2))(start, num_steps, 10)
    assert value == pytest.approx(float(expected_value), rel=1e-10)
    assert jax.tree.structure(grads) == jax.tree.structure(start)
    assert jax.tree.map(jnp.shape, grads) == jax.tree.map(jnp.shape, start)
    reversible.raise_if_failed(trained.report)
    for (path, found), right in zip(
        jax.tree_util.tree_leaves_with_path(grads), jax.tree.leaves(expected), strict=True
    ):
        error = float(jnp.linalg.norm(found - right) / jnp.linalg.norm(right))
        assert error < 1e-7, (jax.tree_util.keystr(path), error)


def test_hypergradients_equal_bptt_in_single():
    num_steps = 200
    start = make_start("per layer", num_steps)
    _, grads, trained = reversible.hypergradients(loss, objective, start, num_steps=num_steps)
    _, expected = jax.jit(bptt, static_argnums=(1, 2))(start, num_steps, 10)
    reversible.raise_if_failed(trained.report)
    for name in start._fields:
        assert relative_error(getattr(grads, name), getattr(expected, name)) < 1e-4, name
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(grads))


@jax.jit
def finely(start):
    """The value and the hypergradients of sixty steps, of momenta on a grid of ``2^-12``."""
    return reversible.hypergradients(
        loss, objective, start, num_steps=60, fixed=FixedPoint(52, 58, 12), momentum_floor=0.5
    )[:2]


@pytest.mark.parametrize("name", reversible.Setup._fields)
def test_hypergradients_equal_central_differences(name, x64):
    """Of the exact run itself, along a random direction of each kind of hyperparameter.

    A momentum can only move by a step of its grid, so the difference is of that size.
    """
    start = make_start("per layer", 60, dtype=np.float64)
    start = start._replace(momenta=jax.tree.map(lambda m: 0.5 + m / 4, start.momenta))
    at, unravel = ravel_pytree(getattr(start, name))
    direction = np.sign(np.random.default_rng(1).normal(size=at.shape))
    size = 2.0**-12 if name == "momenta" else 2.0**-14
    plus, minus = (
        finely(start._replace(**{name: unravel(at + sign * size * direction)}))[0]
        for sign in (1, -1)
    )
    difference = (plus - minus) / (2 * size)
    along = float(np.vdot(flat(getattr(finely(start)[1], name)), direction))
    assert abs(along) > 1e-4
    assert along == pytest.approx(float(difference), rel=1e-5)


def test_vmap_equals_one_at_a_time():
    num_steps = 120
    seeds = (0, 1)
    starts = [make_start("per step", num_steps, seed) for seed in seeds]

    @jax.jit
    def both(start):
        value, grads, trained = reversible.hypergradients(
            loss, objective, start, num_steps=num_steps, momentum_floor=0.0
        )
        return value, grads, trained.report

    values, grads, reports = jax.vmap(both)(jax.tree.map(lambda *x: jnp.stack(x), *starts))
    assert np.all(reports.ok)
    for i, start in enumerate(starts):
        value, expected, _ = both(start)
        assert values[i] == pytest.approx(float(value), rel=1e-5)
        assert relative_error(jax.tree.map(lambda x, i=i: x[i], grads), expected) < 1e-4


def _train_value(start):
    return objective(trained(start).params, start.theta)


def _losses_value(start):
    return jnp.sum(trained(start).losses)


def _hypergradients_value(start):
    return reversible.hypergradients(loss, objective, start, num_steps=20, momentum_floor=0.0)[0]


def trained(start):
    return reversible.train(loss, start, num_steps=20, momentum_floor=0.0)


@pytest.mark.parametrize("value", [_train_value, _losses_value, _hypergradients_value])
def test_automatic_derivatives_of_a_run_are_refused_instead_of_zero(value):
    start = make_start("per step", 20)
    for name in start._fields:
        one = lambda x, name=name: value(start._replace(**{name: x}))  # noqa: E731
        with pytest.raises(TypeError, match=r"Use `reversible.hypergradients`"):
            jax.jit(jax.grad(one))(getattr(start, name))
    with pytest.raises(TypeError, match=r"Use `reversible.hypergradients`"):
        jax.jvp(value, (start,), (start,))


def test_automatic_derivatives_by_what_the_loss_closes_over_are_refused():
    start = make_start("per step", 20)

    def value(scale):
        scaled = lambda params, theta, step: scale * loss(params, theta, step)  # noqa: E731
        ended = reversible.train(scaled, start, num_steps=20)
        return objective(ended.params, start.theta)

    assert jax.eval_shape(value, 1.0).shape == ()
    with pytest.raises(TypeError, match=r"Use `reversible.hypergradients`"):
        jax.grad(value)(1.0)


# --- recovery -------------------------------------------------------------------------


@partial(jax.jit, static_argnums=(1, 2))
def recover(start, num_steps, fixed=SINGLE):
    return reversible.hypergradients(
        loss, objective, start, num_steps=num_steps, fixed=fixed, momentum_floor=0.0
    )[1:]


shapes = st.lists(st.lists(st.integers(1, 5), max_size=3).map(tuple), min_size=1, max_size=4)


def loss_of_any_shape(params, theta, step):
    """Every weight acts on every other."""
    flat = ravel_pytree(params)[0]
    return jnp.mean(jnp.tanh(flat + jnp.sin(step + jnp.sum(flat)) * theta) ** 2)


@settings(max_examples=2, deadline=None)
@given(shapes, st.integers(1, 400), st.integers(0, 2**32 - 1), st.sampled_from(KINDS))
@example([(), (2, 3)], 1, 0, "per layer")
@example([(3,), (2, 1, 2)], 400, 1, "per parameter")
@example([(), ()], 2, 1, "per layer")  # So small that XLA wants the loop as one function.
def test_any_run_is_recovered_to_the_bit(shapes, num_steps, seed, kind):
    rng = np.random.default_rng(seed)
    params = [jnp.asarray(rng.normal(size=shape), np.float32) for shape in shapes]
    rates, momenta = schedules(kind, num_steps, seed, np.float32, params, [0] * len(params))
    start = reversible.setup(params, rates, momenta, jnp.float32(0.7))
    start = start._replace(velocity=jax.tree.map(jnp.cos, params))
    size = lambda params, theta: jnp.sum(ravel_pytree(params)[0] ** 2) * theta  # noqa: E731
    _, grads, trained = jax.jit(
        lambda start: reversible.hypergradients(
            loss_of_any_shape, size, start, num_steps=num_steps, momentum_floor=0.0
        )
    )(start)
    assert reversible.explain(trained.report) == "exact: no failure."
    assert np.any(ravel_pytree(trained.params)[0] != ravel_pytree(params)[0])
    assert np.all(np.isfinite(flat(grads)))


@pytest.mark.parametrize("num_steps", [1, 5])
@pytest.mark.parametrize("num_runs", [1, 8])
def test_tiny_runs_side_by_side_are_recovered_to_the_bit(num_runs, num_steps):
    """XLA compiles a small enough loop as one function, and unrolls a loop of one step."""

    @jax.jit
    @jax.vmap
    def failures(weights, velocity):
        start = reversible.setup(weights, 0.3, 0.7, jnp.float32(0.7))._replace(velocity=velocity)
        square = lambda params, theta: jnp.sum(params**2) * theta  # noqa: E731
        _, grads, trained = reversible.hypergradients(
            loss_of_any_shape, square, start, num_steps=num_steps, momentum_floor=0.5
        )
        return trained.report.failure, grads

    for seed in range(10):
        starts = np.random.default_rng(seed).normal(size=(2, num_runs, 3)).astype(np.float32)
        failed, grads = failures(*starts)
        assert not np.any(failed)
        assert np.all(np.isfinite(flat(grads)))


@pytest.mark.parametrize("seed", range(3))
def test_other_seeds_are_recovered_to_the_bit(seed):
    grads, trained = recover(make_start("per layer", 300, seed), 300)
    assert reversible.explain(trained.report) == "exact: no failure."
    assert np.all(np.isfinite(flat(grads)))


@pytest.mark.parametrize(
    ("kind", "fixed", "dtype"),
    [
        # Fewer steps of these layouts: `test_any_run_is_recovered_to_the_bit`.
        pytest.param("per step", SINGLE, np.float32, marks=pytest.mark.slow),
        pytest.param("per layer", SINGLE, np.float32, marks=pytest.mark.slow),
        ("per parameter", SINGLE, np.float32),
        ("per layer", DOUBLE, np.float64),
    ],
    ids=["per step", "per layer", "per parameter", "per layer, double"],
)
def test_ten_thousand_steps_are_recovered_to_the_bit(kind, fixed, dtype):
    """The integers themselves, whatever the report says of them."""
    num_steps = 10_000
    with jax.enable_x64(dtype == np.float64):
        start = make_start(kind, num_steps, dtype=dtype)
        problem = _problem(loss, start, num_steps, fixed, None)
        ended = run(*problem.arguments)
        zeros = jnp.zeros_like(problem.velocity), jnp.zeros_like(ended.losses)
        cotangents = Cotangents(jnp.ones_like(problem.weights), *zeros)
        grads, report, recovered = reverse(*problem.arguments, ended, cotangents)
        assert np.all(np.isfinite(flat(grads)))
    assert reversible.explain(report) == "exact: no failure."
    for found, begun, end, bits in (
        (recovered.weights, problem.weights, ended.weights, fixed.weight_bits),
        (recovered.accumulators, problem.velocity, ended.accumulators, fixed.accumulator_bits),
    ):
        grid = np.round(np.asarray(begun, np.float64) * 2.0**bits).astype(np.int64)
        np.testing.assert_array_equal(found, grid)
        assert found.dtype == np.int64
        assert np.all(np.asarray(end) != grid)
    np.testing.assert_array_equal(recovered.buffer, 0)
    assert np.any(np.asarray(ended.buffer) != 0)
    assert np.any(np.asarray(ended.tape)[:-1] != 0)


def elementwise_loss(params, theta, step):
    """No matrix product, so that XLA would fuse all of a step if it could."""
    w = params["w"]
    return jnp.sum(jnp.sin(3 * w + step) * w + 0.3 * w**2 * theta + jnp.exp(-w * w)) / w.size


@pytest.mark.parametrize("shape", [pytest.param((1,), marks=pytest.mark.slow), (33, 5)], ids=str)
def test_elementwise_losses_are_recovered_to_the_bit(shape):
    """The hard case for equal rounding in the two programs."""
    params = {"w": jnp.linspace(-1.0, 1.0, int(np.prod(shape))).reshape(shape)}
    start = reversible.setup(params, 0.05, 0.9, jnp.float32(0.5))
    _, grads, trained = reversible.hypergradients(
        elementwise_loss, lambda p, theta: jnp.sum(p["w"] ** 2) * theta, start, num_steps=2000
    )
    assert reversible.explain(trained.report) == "exact: no failure."
    assert np.all(np.isfinite(flat(grads)))


def test_naive_float_reversal_fails_where_the_exact_one_does_not(x64):
    start = make_start("constant", 600, dtype=np.float64)
    start = start._replace(momenta=jnp.float64(0.9), learning_rates=jnp.float64(0.1))
    drift = naive_reversal(loss, start, num_steps=600, fixed=DOUBLE)
    assert drift[-1] < 1e-12  # one step back is fine
    assert not drift[0] < 1.0
    _, grads, trained = reversible.hypergradients(
        loss, objective, start, num_steps=600, fixed=DOUBLE
    )
    assert trained.report.ok
    assert np.all(np.isfinite(flat(grads)))


def test_zero_momentum_acts_as_the_smallest_one(x64):
    start = make_start("constant", 50, dtype=np.float64)
    outcomes = [
        reversible.train(loss, start._replace(momenta=jnp.float64(m)), num_steps=50, fixed=DOUBLE)
        for m in (0.0, 2.0**-10)
    ]
    np.testing.assert_array_equal(*(ravel_pytree(o.params)[0] for o in outcomes))


def test_momentum_just_below_one_still_trains():
    """At 10 bits 0.9996 is nearest to 1, where the gradient would count nothing."""
    start = make_start("constant", 50)._replace(learning_rates=jnp.float32(1.0))
    start = start._replace(velocity=jax.tree.map(jnp.zeros_like, start.velocity))
    for momentum, moves in ((0.9996, True), (1.0, False)):
        grads, trained = recover(start._replace(momenta=jnp.float32(momentum)), 50)
        assert reversible.explain(trained.report) == "exact: no failure."
        moved = ravel_pytree(trained.params)[0] != ravel_pytree(start.params)[0]
        assert np.all(moved) if moves else not np.any(moved)
        assert np.all(np.isfinite(flat(grads)))


# --- a reversal proves itself -----------------------------------------------------------


def test_one_flipped_bit_anywhere_poisons_every_gradient():
    start = make_start("per step", 300)
    problem = _problem(loss, start, 300, SINGLE, None)
    ended = run(*problem.arguments)
    cotangents = Cotangents(
        jnp.ones_like(problem.weights), jnp.zeros_like(problem.velocity), jnp.zeros(300)
    )
    back = jax.jit(lambda ended: reverse(*problem.arguments, ended, cotangents))
    grads, report, _ = back(ended)
    assert report.ok
    assert np.all(np.isfinite(flat(grads)))
    for field in ("weights", "accumulators", "buffer", "tape"):
        with jax.enable_x64(True):
            damaged = getattr(ended, field)
            first = (0,) * damaged.ndim
            damaged = damaged.at[first].set(damaged[first] ^ 1)
        grads, report, _ = back(ended._replace(**{field: damaged}))
        assert int(report.failure) in (Failure.REPLAY, Failure.START), field
        assert np.all(np.isnan(flat(grads))), field
        assert "rounded differently" in reversible.explain(report)


# --- failures are named -----------------------------------------------------------------


HEALTHY, NOT_A_NUMBER, NO_DERIVATIVE, QUIET = range(4)


def faulty(params, theta, step):
    """The loss with the fault of that number in ``theta``, so that one program has them all."""

    def not_a_number(params):
        return jnp.where(step == 13, jnp.nan, loss(params, theta, step))

    def no_derivative(params):
        square = jnp.where(step == 4, 0.0, 1.0) * params["layer1"]["b"][2] ** 2
        return loss(params, theta, step) + jnp.sqrt(square)

    faults = (
        lambda params: loss(params, theta, step),
        not_a_number,
        no_derivative,
        lambda params: 0.0 * jnp.sum(params["layer1"]["w"]),
    )
    return jax.lax.switch(jnp.int32(theta["fault"]), faults, params)


@jax.jit
def fail(start):
    return reversible.hypergradients(faulty, objective, start, num_steps=20, momentum_floor=0.0)[1:]


def failing(fault, start):
    """The report of a run of twenty steps, and the proof that nothing finite came out of it."""
    grads, trained = fail(start._replace(theta=make_theta() | {"fault": np.float32(fault)}))
    assert np.all(np.isnan(flat(grads)))
    assert np.all(np.isnan(flat(trained.params)))
    return trained.report


def test_nan_loss_names_its_step():
    report = failing(NOT_A_NUMBER, make_start("per step", 20))
    assert (int(report.failure), int(report.step)) == (Failure.LOSS, 13)
    with pytest.raises(FloatingPointError, match="loss failure at step 13"):
        reversible.raise_if_failed(report)


def test_infinite_gradient_names_step_and_parameter():
    start = make_start("per step", 20)
    report = failing(NO_DERIVATIVE, start)
    assert (int(report.failure), int(report.step)) == (Failure.GRADIENT, 4)
    assert "['layer1']['b'] at flat index 2" in reversible.explain(report, start.params)


def test_overflowing_learning_rate_names_step_and_parameter():
    start = make_start("per layer", 20)
    layer = np.array(start.learning_rates["layer2"])
    layer[6] = 1e12
    rates = start.learning_rates | {"layer2": layer}
    report = failing(HEALTHY, start._replace(learning_rates=rates))
    assert (int(report.failure), int(report.step)) == (Failure.WEIGHT, 6)
    assert "['layer2']['w']" in reversible.explain(report, start.params)
    assert "mend or lower the learning rate of this step" in reversible.explain(report)


def test_overflowing_velocity_is_named():
    start = make_start("per step", 20)
    velocity = jax.tree.map(np.zeros_like, start.velocity)
    velocity["layer2"]["w"][1, 1] = 20000.0
    start = start._replace(velocity=velocity, momenta=jnp.ones_like(start.momenta))
    report = failing(HEALTHY, start)
    assert (int(report.failure), int(report.step)) == (Failure.ACCUMULATOR, 0)
    assert "['layer2']['w'] at flat index 3" in reversible.explain(report, start.params)


@pytest.mark.parametrize("value", [np.nan, np.inf, -1e9])
def test_weights_and_velocities_off_the_grid_from_the_start_are_named(value):
    """A grid has no NaN: rounded to it, the run would train from another start."""
    for field, failure in (("params", Failure.WEIGHT), ("velocity", Failure.ACCUMULATOR)):
        start = make_start("per step", 20)
        getattr(start, field)["layer2"]["w"][1, 1] = value
        report = failing(QUIET, start)
        assert (int(report.failure), int(report.step)) == (failure, 0)
        assert "['layer2']['w'] at flat index 3" in reversible.explain(report, start.params)


def test_momentum_below_the_planned_floor_is_reported():
    @jax.jit
    def report(momenta):
        start = make_start("per step", 20)._replace(momenta=momenta)
        _, grads, trained = reversible.hypergradients(
            loss, objective, start, num_steps=20, momentum_floor=0.5
        )
        return grads, trained.report

    grads, good = report(jnp.full(20, 0.5))
    assert good.ok
    for value in (0.4, 1.1, jnp.nan):
        grads, bad = report(jnp.full(20, 0.9).at[5].set(value))
        assert (int(bad.failure), int(bad.step)) == (Failure.DECAY, 5)
        assert np.all(np.isnan(flat(grads)))


@pytest.mark.parametrize("floor", [None, 0.0])
@pytest.mark.parametrize("momentum", [-0.1, -5.0, 1.0004, 1.5, np.nan])
def test_momentum_outside_its_interval_is_refused_or_under_jit_reported(momentum, floor):
    momenta = jnp.full(20, 0.9).at[3].set(momentum)
    start = make_start("per step", 20)
    with pytest.raises(ValueError, match=r"`momenta` must be in \[0, 1\].*step 3"):
        reversible.train(loss, start._replace(momenta=momenta), num_steps=20, momentum_floor=floor)
    _, trained = recover(start._replace(momenta=momenta), 20)
    assert (int(trained.report.failure), int(trained.report.step)) == (Failure.DECAY, 3)
    assert np.all(np.isnan(flat(trained.params)))


def test_schedule_of_a_wrong_length_is_refused():
    start = make_start("per layer", 20)
    with pytest.raises(ValueError, match=r"`learning_rates`\['layer1'\]\['b'\].*\(20,\).*\[30\]"):
        reversible.train(loss, start, num_steps=30)


@pytest.mark.parametrize("num_steps", [0, -1, 2.5])
def test_a_number_of_steps_that_is_none_is_refused(num_steps):
    with pytest.raises(ValueError, match=f"`num_steps`.*at least 1, got {num_steps}"):
        reversible.train(loss, make_start("constant", 5), num_steps=num_steps)


@pytest.mark.parametrize("dtype", [np.int32, np.complex64, np.float16, jnp.bfloat16, np.float64])
@pytest.mark.parametrize("name", ["learning_rates", "momenta", "theta"])
def test_other_dtypes_than_that_of_the_parameters_are_refused(name, dtype, x64):
    start = make_start("constant", 5)
    bad = jax.tree.map(lambda x: jnp.ones_like(x, dtype), getattr(start, name))
    expected = f"`{name}`.* must be float32 like `params`, got {np.dtype(dtype)}.*cast it"
    with pytest.raises(ValueError, match=expected):
        reversible.train(loss, start._replace(**{name: bad}), num_steps=5)


def test_a_run_in_single_precision_where_the_default_is_double(x64):
    start = make_start("constant", 5)
    good = reversible.setup(start.params, start.learning_rates, start.momenta, start.theta)
    assert reversible.train(loss, good, num_steps=5).report.ok


def test_a_loss_of_another_dtype_or_shape_is_refused(x64):
    start = make_start("constant", 5)
    wide = lambda params, theta, step: loss(params, theta, step) * np.float64(1.0)  # noqa: E731
    with pytest.raises(ValueError, match=r"`loss` must return a float32 scalar.*float64"):
        reversible.train(wide, start, num_steps=5)
    many = lambda params, theta, step: params["layer1"]["b"]  # noqa: E731
    with pytest.raises(ValueError, match=r"`loss` must return a float32 scalar.*\(4,\)"):
        reversible.train(many, start, num_steps=5)


def test_a_schedule_for_other_layers_is_refused():
    start = make_start("constant", 5)._replace(momenta={"layer1": jnp.float32(0.9)})
    with pytest.raises(ValueError, match="`momenta` must be a pytree prefix of `params`"):
        reversible.train(loss, start, num_steps=5)


def test_a_velocity_of_another_dtype_is_refused():
    start = make_start("constant", 5)
    half = jax.tree.map(lambda v: v.astype(jnp.bfloat16), start.velocity)
    with pytest.raises(ValueError, match=r"`velocity` must have the structure.*bfloat16"):
        reversible.train(loss, start._replace(velocity=half), num_steps=5)


def test_traced_momenta_need_a_floor():
    start = make_start("per step", 20)
    with pytest.raises(ValueError, match="`momentum_floor`"):
        jax.jit(lambda s: reversible.train(loss, s, num_steps=20).losses)(start)


@pytest.mark.parametrize("dtype", [np.int32, np.complex64, np.float16])
def test_parameters_that_are_not_real_floats_are_refused(dtype):
    start = reversible.setup({"w": jnp.ones(3, dtype)}, 0.1, 0.9)
    with pytest.raises(ValueError, match=f"`params`.*{np.dtype(dtype)}"):
        reversible.train(lambda p, theta, t: jnp.sum(p["w"]).real, start, num_steps=5)


# In double precision Python's numbers are of another type than the parameters.
@pytest.mark.parametrize("precise", [False, True])
def test_python_numbers_may_stand_for_arrays(precise):
    with jax.enable_x64(precise):
        _compare_python_numbers_with_arrays()


def _compare_python_numbers_with_arrays():
    start = make_start("constant", 20)
    numbers = start._replace(
        learning_rates=0.05, momenta=0.9, theta={"target": 0.5, "log_l2": -4.0}
    )
    arrays = jax.tree.map(jnp.float32, numbers)
    loss_of = lambda p, t, s: loss(p, t | {"target": jnp.full((8, 2), t["target"])}, s)  # noqa: E731
    final = lambda p, t: loss_of(p, t, 7)  # noqa: E731
    (_, a, _), (_, b, _) = (
        reversible.hypergradients(loss_of, final, start, num_steps=20)
        for start in (numbers, arrays)
    )
    np.testing.assert_array_equal(ravel_pytree(a)[0], ravel_pytree(b)[0])
    assert np.all(np.isfinite(ravel_pytree(a)[0]))


def test_theta_must_be_floats():
    start = make_start("per step", 20)._replace(theta={"labels": jnp.arange(3)})
    with pytest.raises(ValueError, match=r"`theta`.*int32.*\['labels'\].*close over"):
        reversible.train(loss, start, num_steps=20)


DEGENERATE = {
    "scalars": ({"a": 1.5, "b": np.float32([0.5, -1.0])}, 0.1),
    "empty tensor": ({"a": np.zeros((0, 3), np.float32), "b": np.ones(2, np.float32)}, 0.1),
    "empty tensor, own rates": (
        {"a": np.zeros(0, np.float32), "b": np.ones(2, np.float32)},
        {"a": np.zeros((3, 0), np.float32), "b": 0.1},
    ),
    "None": ({"a": None, "b": np.ones(2, np.float32)}, {"a": None, "b": 0.1}),
    "group of nothing": ({"a": {}, "b": np.ones(2, np.float32)}, {"a": 0.3, "b": 0.1}),
}


@pytest.mark.parametrize("case", DEGENERATE)
def test_degenerate_trees_train_as_what_is_in_them(case):
    """On a quadratic every weight goes its own way: ``w_T = p_T(rate) w_0``, so ``dw = p_T``."""
    params, rates = DEGENERATE[case]
    dtype = np.result_type(float if jax.config.values["jax_enable_x64"] else np.float32)
    params = jax.tree.map(lambda x: jnp.asarray(x, dtype), params)
    total = lambda params, theta: sum(jnp.sum(x) for x in jax.tree.leaves(params))  # noqa: E731
    square = lambda params, theta, step: total(jax.tree.map(lambda x: 0.5 * x**2, params), theta)  # noqa: E731
    start = reversible.setup(params, rates, 0.5, {"none": None, "empty": jnp.zeros(0, dtype)})
    value, grads, trained = reversible.hypergradients(square, total, start, num_steps=3)
    reversible.raise_if_failed(trained.report)
    w = v = np.poly1d([1.0])
    v = 0 * v
    for _ in range(3):  # As polynomials in the learning rate.
        v = 0.5 * v - 0.5 * w
        w = w + np.poly1d([1.0, 0.0]) * v
    factor, weights = w(0.1), flat(params)
    assert value == pytest.approx(float(factor * np.sum(weights)), rel=1e-5)
    np.testing.assert_allclose(ravel_pytree(grads.params)[0], factor, rtol=1e-5)
    rate_of = grads.learning_rates
    rate_of = rate_of["b"] if isinstance(rate_of, dict) else rate_of
    assert rate_of == pytest.approx(float(w.deriv()(0.1) * np.sum(weights)), rel=1e-4)
    assert jax.tree.map(jnp.shape, grads) == jax.tree.map(jnp.shape, start)
    assert np.all(np.isfinite(flat(grads)))


@pytest.mark.parametrize("params", [{}, None, {"a": np.zeros((0, 3), np.float32)}])
def test_parameters_that_hold_nothing_are_refused(params):
    with pytest.raises(ValueError, match="`params` must hold at least one number"):
        reversible.train(loss, reversible.Setup(params, 0.1, 0.9, params), num_steps=5)
