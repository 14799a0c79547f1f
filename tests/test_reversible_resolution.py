"""Runs that the fixed-point grid rounds away say so; those with little to lose are left alone."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from meta_train import reversible
from meta_train.estimators import fixed_horizon
from meta_train.estimators import reversible as reversible_estimator
from meta_train.reversible import DOUBLE, SINGLE, Dynamics, Failure
from meta_train.reversible.resolution import accumulator_noise
from meta_train.reversible.system import Start, reversible_system

pytestmark = pytest.mark.exact

NUM_STEPS = 20
TOLERANCE = 0.01
LOST = np.array([[1.5, 0.3, -0.2], [0.3, 0.8, 0.1], [-0.2, 0.1, 1.1]])


def loss(params, theta, step):
    """A small network; the tensor called ``unused`` has a gradient of exactly zero."""
    hidden = jnp.tanh(LOST.astype(theta.dtype) @ params["a"] + params["b"] + 0.1 * (step % 3))
    return jnp.sum((hidden - theta) ** 2) + 0.0 * jnp.sum(params["unused"])


def objective(params, theta):
    return jnp.sum(params["a"] ** 2) + jnp.sum(params["b"] * theta)


def test_the_noise_of_a_step_is_the_digits_it_exchanges_and_half_a_unit():
    decays = jnp.array([1.0, 0.5, 1 / 1024])
    units = accumulator_noise(decays, SINGLE) * 2.0**SINGLE.accumulator_bits
    np.testing.assert_array_equal(units, [0.5, 512.5, 1.5])


def start_of(dtype, rates=0.1):
    params = {
        "a": jnp.array([0.3, -0.5, 0.8], dtype),
        "b": jnp.zeros(3, dtype),
        "unused": jnp.ones(2, dtype),
    }
    return reversible.setup(params, rates, 0.9, jnp.array([0.4, -0.2, 0.1], dtype))


@partial(jax.jit, static_argnames="fixed")
def scaled(start, scale, fixed):
    """The same run, whatever the scales ``[T]``: the loss times, the learning rates over them."""
    rates = jax.tree.map(lambda rate: rate / scale, start.learning_rates)
    _, grads, trained = reversible.hypergradients(
        lambda params, theta, step: loss(params, theta, step) * scale[step],
        objective,
        start._replace(learning_rates=rates),
        num_steps=NUM_STEPS,
        fixed=fixed,
        momentum_floor=0.5,
    )
    # By the learning rate that was scaled.
    rates = jax.tree.map(lambda d: d / scale, grads.learning_rates)
    return (grads.params, rates, grads.momenta, grads.theta), trained


def scaled_runs(fixed, dtype, scales):
    with jax.enable_x64(dtype == np.float64):
        start = start_of(dtype)
        found = [scaled(start, jnp.asarray(scale, dtype), fixed) for scale in scales]
        return jax.tree.map(np.asarray, found)


def right_or_reported(found, right):
    """Whether exact; then every part must be right, or else every number NaN."""
    grads, trained = found
    if trained.report.failure:
        assert np.all(np.isnan(ravel_pytree(grads)[0]))
        return False
    for a, b in zip(grads, right, strict=True):
        a, b = np.asarray(ravel_pytree(a)[0]), np.asarray(ravel_pytree(b)[0])
        assert np.linalg.norm(a - b) < TOLERANCE * np.linalg.norm(b)
    return True


@pytest.mark.parametrize(("fixed", "dtype"), [(SINGLE, np.float32), (DOUBLE, np.float64)])
def test_a_scaled_run_is_right_or_reported(fixed, dtype):
    """In turn times ``10^-k`` throughout: right while it can be, reported from then on."""
    scales = [np.full(NUM_STEPS, 10.0**-k) for k in range(13)]
    runs = scaled_runs(fixed, dtype, scales)
    exact = [right_or_reported(found, runs[0][0]) for found in runs]
    assert sum(exact) >= 6, "reported too early"
    assert exact == sorted(exact, reverse=True)
    assert not exact[-1]
    for ok, (_, trained) in zip(exact, runs, strict=True):
        assert int(trained.report.failure) == (Failure.NONE if ok else Failure.UNDERFLOW)
        assert np.all(np.isnan(trained.params["a"])) != ok
    said = reversible.explain(runs[-1][1].report, runs[-1][1].params)
    assert said.startswith("underflow failure over the whole run, tensor of parameter ['")
    assert "raise `accumulator_bits`" in said


@partial(jax.jit, static_argnames="fixed")
def still(params, rate, scale, aim, fixed):
    """Ten steps of a quadratic, ``scale`` times; the objective is least at ``aim``."""
    return reversible.hypergradients(
        lambda p, theta, step: theta * jnp.sum(p["w"] ** 2),
        lambda p, theta: jnp.sum((p["w"] - aim) ** 2),
        reversible.setup(params, rate / scale, 0.5, scale),
        num_steps=10,
        fixed=fixed,
        momentum_floor=0.5,
    )


@pytest.mark.parametrize("rate", [0.1, 0.0])
@pytest.mark.parametrize(("fixed", "dtype"), [(SINGLE, np.float32), (DOUBLE, np.float64)])
def test_a_run_that_never_moves_since_all_is_rounded_away_is_reported(fixed, dtype, rate):
    """Not even where the objective is stationary at the start, or the rate is 0."""
    with jax.enable_x64(dtype == np.float64):
        params = {"w": np.array([3.0, 0.125], dtype)}
        for aim in (params["w"], np.zeros(2, dtype)):
            for scale in (1e-16, 1e-20, 1e-25):
                _, grads, trained = still(params, dtype(rate), dtype(scale), aim, fixed)
                assert int(trained.report.failure) == Failure.UNDERFLOW
                assert np.isnan(grads.learning_rates) and np.isnan(trained.params["w"]).all()
            assert still(params, dtype(rate), dtype(1.0), aim, fixed)[2].report.ok


@jax.jit
def in_floats(start, scale):
    """The gradients of the scaled run by backpropagation."""

    def value(start):
        def step(carry, xs):
            (w, v), (t, rate, scale) = carry, xs
            g = jax.grad(lambda w: loss(w, start.theta, t) * scale)(w)
            m = start.momenta
            v = jax.tree.map(lambda v, g: m * v - (1 - m) * g, v, g)
            return (jax.tree.map(lambda w, v: w + rate * v, w, v), v), None

        steps = jnp.arange(NUM_STEPS, dtype=jnp.int32)
        begin = start.params, start.velocity
        w = jax.lax.scan(step, begin, (steps, start.learning_rates, scale))[0][0]
        return objective(w, start.theta)

    grads = jax.grad(value)(start._replace(learning_rates=start.learning_rates / scale))
    return grads.params, grads.learning_rates / scale, grads.momenta, grads.theta


def test_a_run_scaled_in_part_is_right_or_reported():
    """The velocities of the rest are large; what is lost moves the weights as far as they do."""
    scales = np.ones((13, NUM_STEPS))
    scales[:, : NUM_STEPS // 2] = 10.0 ** -np.arange(13.0)[:, None]
    start = start_of(np.float32)._replace(momenta=jnp.float32(0.5))
    exact = [
        right_or_reported(scaled(start, jnp.float32(scale), SINGLE), in_floats(start, scale))
        for scale in scales.astype(np.float32)
    ]
    assert exact == sorted(exact, reverse=True)
    assert exact[2]
    assert not exact[-1]


@partial(jax.jit, static_argnums=(1, 2, 3))
def trained_by(start, fixed, loss, num_steps):
    return reversible.train(loss, start, num_steps=num_steps, fixed=fixed, momentum_floor=0.5)


def report_of(start, fixed=SINGLE, loss=loss, num_steps=NUM_STEPS):
    trained = trained_by(start, fixed, loss, num_steps)
    assert bool(jnp.all(jnp.isfinite(ravel_pytree(trained.params)[0]))) == bool(trained.report.ok)
    return trained.report


def test_a_layer_scaled_away_is_named_when_its_rate_is_its_own():
    def one_small(params, theta, step):
        return loss(params, theta, step) + 1e-12 * jnp.sum(params["unused"] ** 2)

    start = start_of(np.float32)
    assert report_of(start, loss=one_small).ok  # Nothing beside the others, with one rate.
    rates = {"a": 0.1, "b": 0.1, "unused": 1e11}
    start = start_of(np.float32, rates)
    report = report_of(start, loss=one_small)
    assert int(report.failure) == Failure.UNDERFLOW
    assert "tensor of parameter ['unused']" in reversible.explain(report, start.params)


@pytest.mark.parametrize("bits", [8, pytest.param(12, marks=pytest.mark.slow), 44])
def test_moves_that_round_to_nothing_or_a_few_units_are_reported(bits):
    fixed = SINGLE._replace(weight_bits=bits)
    assert report_of(start_of(np.float32, 0.1), fixed).ok == (bits == 44)
    report = report_of(start_of(np.float32, 0.1 * 2.0 ** (bits - 44 - 40)), fixed)
    assert int(report.failure) == Failure.UNDERFLOW
    assert "raise `weight_bits`" in reversible.explain(report)


def test_a_start_that_the_grid_takes_away_is_reported():
    start = start_of(np.float32, 0.0)
    tiny = start._replace(params=jax.tree.map(lambda x: 1e-14 * x, start.params))
    assert int(report_of(tiny).failure) == Failure.UNDERFLOW
    pushed = tiny._replace(learning_rates=jnp.float32(0.1))  # Training adds far more than it loses.
    assert report_of(pushed).ok


def test_what_has_nothing_to_lose_is_no_failure():
    start = start_of(np.float32)
    nothing = lambda params, theta, step: 0.0 * jnp.sum(params["a"])  # noqa: E731
    square = lambda params, theta, step: 0.5 * jnp.sum(params["a"] ** 2)  # noqa: E731
    assert report_of(start, loss=nothing).ok
    assert report_of(start._replace(learning_rates=jnp.float32(0.0))).ok
    assert report_of(start._replace(momenta=jnp.float32(1.0))).ok
    own = {"a": 0.1, "b": 0.0, "unused": 0.3}
    assert report_of(start_of(np.float32, own)).ok
    warm = np.where(np.arange(NUM_STEPS) < 15, 1e-20, 0.1)  # Sums, so that no step counts alone.
    assert report_of(start._replace(learning_rates=jnp.float32(warm))).ok
    # Converged to the last bit long before the end.
    assert report_of(start_of(np.float32, 0.5), loss=square, num_steps=2000).ok
    # A few entries of a tensor alone have a gradient; others see it once.
    sparse = lambda params, theta, step: jnp.where(step == 3, 1.0, 0.0) * params["a"][1] ** 2  # noqa: E731
    assert report_of(start, loss=sparse).ok


def quadratic_system(scale):
    """Plain SGD on a quadratic, as a system; theta is the log of its learning rate."""
    dynamics = Dynamics(
        lambda theta, w, x: scale * 0.5 * w @ jnp.asarray(LOST, w.dtype) @ w,
        decay=lambda theta, hyper: jnp.full((1, 1), 0.5),
        absorb=lambda theta, hyper, gradient, x: -0.5 * gradient[None],
        move=lambda theta, hyper, velocity, x: jnp.exp(theta) / scale * velocity[0],
    )
    return reversible_system(
        lambda theta, key, horizon: Start((), jnp.array([1.0, -0.5, 0.3]), jnp.zeros((1, 3))),
        lambda context: dynamics,
        np.array([0.5]),
    )


def test_episodes_of_a_system_are_right_or_reported():
    @jax.jit
    def estimate(scale):
        system = quadratic_system(scale)
        estimator = reversible_estimator(system, num_particles=1, horizons=fixed_horizon(20))
        theta = jnp.float32(-2.0)
        ids = estimator.init(theta, jax.random.key(0))
        grad, _, metrics = estimator.estimate(theta, ids, jax.random.key(1))
        return grad / scale, metrics  # The mean loss is scaled, too.

    found = [estimate(jnp.float32(10.0**-k)) for k in range(13)]
    exact = [float(metrics["exact"]) for _, metrics in found]
    assert exact == sorted(exact, reverse=True)
    assert exact[5] == 1.0
    assert exact[-1] == 0.0
    for ok, (grad, metrics) in zip(exact, found, strict=True):
        assert metrics["failed_underflow"] == 1.0 - ok
        assert metrics["finite"] == ok
        if ok:
            assert float(grad) == pytest.approx(float(found[0][0]), rel=TOLERANCE)


@pytest.mark.parametrize(("fixed", "dtype"), [(SINGLE, np.float32), (DOUBLE, np.float64)])
def test_a_small_tensor_that_the_objective_hangs_on(fixed, dtype):
    """Beside a large one at the same rate: the right derivatives, or none.

    The objective is ``sum(b) / scale``, and ``b`` moves by ``scale`` times what it would at 1.
    """
    rates, reports = [], []
    with jax.enable_x64(dtype == np.float64):

        @jax.jit
        def run(scale):
            params = {"a": jnp.array([1.0, 2.0], dtype), "b": jnp.array([1.0, -1.0], dtype)}
            _, grads, trained = reversible.hypergradients(
                lambda p, theta, t: (
                    jnp.sum(p["a"] ** 2) / 2 + scale * theta * jnp.sum(jnp.sin(p["b"]))
                ),
                lambda p, theta: jnp.sum(p["b"]) / scale,
                reversible.setup(params, 0.1, 0.5, jnp.asarray(0.7, dtype)),
                num_steps=6,
                fixed=fixed,
                momentum_floor=0.5,
            )
            return grads.learning_rates, trained.report.failure

        for exponent in range(4, 20):
            rate, failure = run(jnp.asarray(10.0**-exponent, dtype))
            rates.append(float(rate))
            reports.append(int(failure))
    right = np.array(reports) == Failure.NONE
    np.testing.assert_allclose(np.array(rates)[right], -3.794, rtol=1e-2)
    assert np.all(np.isnan(np.array(rates)[~right]))
    assert 3 <= right.sum() <= 13 and np.all(np.diff(right.astype(int)) <= 0)
