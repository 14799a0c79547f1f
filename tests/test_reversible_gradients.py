"""Exact derivatives for losses whose gradient is not that of a smooth function.

Training follows the gradient that a loss gives out; the Jacobian of that map is symmetric only if
the loss leaves its gradient alone. Compared with backpropagation through the run and, where the
forward computation hides nothing from it, with central differences.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from meta_train import reversible
from meta_train.reversible import DOUBLE, Dynamics
from meta_train.reversible.system import Start, episode_gradient, reversible_system

pytestmark = pytest.mark.exact

NUM_STEPS = 8


def relative_error(a, b):
    # In NumPy, which compiles nothing.
    a, b = (np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)]) for tree in (a, b))
    assert np.linalg.norm(b) > 1e-6, "a comparison with zero proves nothing"
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


CURVATURE = np.array([[2.0, 1.0, -0.4], [1.0, 3.0, 0.2], [-0.4, 0.2, 1.5]])
MIXING = np.array([[1.0, 0.6, 0.0], [-0.2, 0.8, 0.3], [0.5, 0.0, 1.1]])


@jax.custom_vjp
def clipped(x):
    return x


clipped.defvjp(lambda x: (x, None), lambda _, g: (jnp.clip(g, -1.0, 1.0),))


@jax.custom_vjp
def reversed_gradient(x):
    return jnp.sin(x)


reversed_gradient.defvjp(
    lambda x: (jnp.sin(x), x), lambda x, g: (-0.3 * g * jnp.roll(jnp.cos(x), 1),)
)


@jax.custom_vjp
def normalized(x):
    return x


normalized.defvjp(lambda x: (x, None), lambda _, g: (g / jnp.sqrt(1.0 + jnp.sum(g**2)),))


@jax.custom_jvp
def mixed(x):
    return x


mixed.defjvp(lambda primals, tangents: (primals[0], MIXING @ tangents[0]))


@jax.custom_jvp
def rounded(x):
    return jnp.round(4.0 * x) / 4.0


rounded.defjvp(lambda primals, tangents: (rounded(primals[0]), tangents[0]))


def quadratic(x):
    return 0.5 * x @ CURVATURE @ x


LOSSES = {
    "smooth": lambda w, th: quadratic(jnp.tanh(w)) + th[0] * jnp.sum(w**3) + th[1] * w[0],
    "clipped": lambda w, th: 0.5 * clipped(w) @ CURVATURE @ clipped(w) + th @ clipped(w)[:2],
    "clipped inside": lambda w, th: (
        quadratic(clipped(jnp.tanh(3 * w) * (1 + th[0]))) + th[1] * w[1]
    ),
    "reversed": lambda w, th: quadratic(w) + th[0] * jnp.sum(reversed_gradient(w * th[1])),
    "normalized": lambda w, th: quadratic(normalized(w) + th[0]) + th[1] * normalized(w)[1] ** 3,
    "mixed": lambda w, th: quadratic(mixed(w) * th[0]) + jnp.sum(jnp.sin(mixed(w) + th[1])),
    "stopped": lambda w, th: quadratic(w * jax.lax.stop_gradient(w[::-1] + th[0])) + th[1] * w[2],
    "semi-gradient": lambda w, th: (
        0.5 * (w @ MIXING[0] - th[0] - 0.9 * jax.lax.stop_gradient(w @ MIXING[1])) ** 2
        + 0.1 * th[1] * w @ w
    ),
    "straight through": lambda w, th: (
        quadratic(w * th[0] + jax.lax.stop_gradient(jnp.round(w) - w)) + th[1] * w[0] * w[1]
    ),
    "rounded": lambda w, th: quadratic(rounded(w) * th[0]) + th[1] * jnp.sum(w**2 * w[::-1]),
    "ReLU": lambda w, th: quadratic(jax.nn.relu(MIXING @ w + th[0])) + th[1] * jnp.sum(w),
    "logits": lambda w, th: jax.nn.logsumexp(3 * w * th[0]) - w[0] + th[1] * w @ w,
}
ASYMMETRIC = ("clipped", "reversed", "normalized", "mixed")
# The others stop a derivative on the way forward, or step: backpropagation is their only truth.
FORWARD_TELLS = ("smooth", "clipped", "clipped inside", "reversed", "normalized", "mixed", "logits")


def objective(w, theta):
    return jnp.sum(w**2) + 0.3 * w[0] * theta[1] + theta[0] ** 2


def start_of_run():
    rng = np.random.default_rng(0)
    return reversible.Setup(
        jnp.array([1.3, 0.12, -0.7]),
        jnp.asarray(rng.uniform(0.05, 0.15, NUM_STEPS)),
        jnp.asarray(rng.integers(300, 900, NUM_STEPS) / 1024),
        jnp.array([0.2, -0.1, 0.3]),
        jnp.array([0.4, 0.7]),
    )


NAMES = list(LOSSES)


def loss_of(index, w, theta, step):
    """The loss of that index; so one program serves them all."""
    return jax.lax.switch(index, list(LOSSES.values()), w, theta) + 0.1 * jnp.sin(step) * w[1]


def final_value(index, start):
    """The same run in plain floats."""

    def step(carry, xs):
        w, v = carry
        t, rate, m = xs
        v = m * v - (1 - m) * jax.grad(lambda w: loss_of(index, w, start.theta, t))(w)
        return (w + rate * v, v), None

    steps = jnp.arange(NUM_STEPS, dtype=jnp.int32)
    xs = (steps, start.learning_rates, start.momenta)
    (w, _), _ = jax.lax.scan(step, (start.params, start.velocity), xs)
    return objective(w, start.theta)


@jax.jit
def by_every_method(index, start):
    """Exactly, by backpropagation, by differences; and how asymmetric the Jacobian is."""
    exact = reversible.hypergradients(
        lambda w, theta, step: loss_of(index, w, theta, step),
        objective,
        start,
        num_steps=NUM_STEPS,
        fixed=DOUBLE,
        momentum_floor=0.25,
    )
    expected = jax.value_and_grad(final_value, argnums=1)(index, start)
    flat, unravel = ravel_pytree(start)

    def slope(direction):
        plus, minus = (final_value(index, unravel(flat + s * direction)) for s in (1e-6, -1e-6))
        return (plus - minus) / 2e-6

    differences = jax.lax.map(slope, jnp.eye(flat.size))
    jacobian = jax.jacrev(jax.grad(lambda w: loss_of(index, w, start.theta, jnp.int32(0))))
    at_start = jacobian(start.params)
    asymmetry = jnp.linalg.norm(at_start - at_start.T) / jnp.linalg.norm(at_start)
    return exact, expected, differences, asymmetry


@pytest.mark.parametrize("name", NAMES)
def test_hypergradients_equal_backpropagation_and_central_differences(name, x64):
    start = start_of_run()
    (value, grads, trained), (expected_value, expected), differences, asymmetry = by_every_method(
        NAMES.index(name), start
    )
    assert reversible.explain(trained.report) == "exact: no failure."
    assert value == pytest.approx(float(expected_value), rel=1e-10)
    for field in start._fields:
        assert relative_error(getattr(grads, field), getattr(expected, field)) < 1e-9, field
    if name in ASYMMETRIC:
        assert asymmetry > 0.01, "a symmetric case proves nothing"
    if name in FORWARD_TELLS:
        np.testing.assert_allclose(ravel_pytree(grads)[0], differences, rtol=1e-6, atol=1e-7)


def system_of(index):
    """Two accumulators, a nonlinear move, theta in all of them."""
    dynamics = Dynamics(
        lambda theta, w, x: loss_of(index, w, theta["loss"], x[0]),
        decay=lambda theta, hyper: jnp.array([[0.5], [0.75]]),
        absorb=lambda theta, hyper, g, x: jnp.stack([-g, 0.25 * g**2 * theta["gain"]]),
        move=lambda theta, hyper, a, x: theta["rate"] * a[0] / jnp.sqrt(0.1 + a[1]),
    )
    return reversible_system(
        lambda theta, key, horizon: Start((), jnp.array([1.3, 0.12, -0.7]), jnp.full((2, 3), 0.1)),
        lambda context: dynamics,
        np.array([0.5, 0.75]),
        DOUBLE,
    )


@jax.jit
def episodes(index, theta):
    system, key = system_of(index), jax.random.key(0)
    keys = jax.random.split(jax.random.key(1), NUM_STEPS)

    def by_backpropagation(theta):
        state = system.init(theta, key, len(keys))
        return jnp.mean(jax.lax.scan(lambda s, k: system.step(theta, s, k), state, keys)[1])

    exact = episode_gradient(system.reversible, theta, key, len(keys), keys, jnp.mean)
    return exact, jax.value_and_grad(by_backpropagation)(theta)


@pytest.mark.parametrize("name", NAMES)
def test_episodes_of_a_system_equal_backpropagation(name, x64):
    """Training losses count, so that the loss is differentiated beside its gradient."""
    theta = {"loss": jnp.array([0.4, 0.7]), "gain": jnp.float64(1.2), "rate": jnp.float64(0.06)}
    (value, grad, report), (expected_value, expected) = episodes(NAMES.index(name), theta)
    assert reversible.explain(report) == "exact: no failure."
    assert value == pytest.approx(float(expected_value), rel=1e-10)
    for part in theta:
        assert relative_error(grad[part], expected[part]) < 1e-9, part


def test_clipping_inside_the_loss_by_its_numbers(x64):
    """Found in use: with the symmetric product the learning rate's was -34.13, theta's -1.03."""
    matrix = jnp.array([[2.0, 1.0], [1.0, 3.0]])
    loss = lambda w, theta, step: (  # noqa: E731
        0.5 * clipped(w) @ matrix @ clipped(w) + theta * jnp.sum(clipped(w))
    )
    start = reversible.setup(jnp.array([3.0, 0.1]), 0.1, 0.5, jnp.float64(0.1))
    size = lambda w, theta: jnp.sum(w**2)  # noqa: E731
    run = partial(
        reversible.hypergradients, loss, size, num_steps=10, fixed=DOUBLE, momentum_floor=0.5
    )
    _, grads, _ = jax.jit(run)(start)
    assert float(grads.learning_rates) == pytest.approx(-43.8186, abs=1e-4)
    assert float(grads.theta) == pytest.approx(-1.58769, abs=1e-5)
    np.testing.assert_allclose(grads.params, [2.47723, -0.03025], atol=1e-5)


def test_a_gradient_that_cannot_be_differentiated_backwards_is_refused():
    @jax.custom_vjp
    def solved(x):
        return x

    def back(x, g):
        return (jax.lax.while_loop(lambda y: jnp.sum(y**2) > 1.0, lambda y: 0.5 * y, g),)

    solved.defvjp(lambda x: (x, x), back)
    loss = lambda w, theta, step: jnp.sum(solved(w) ** 2)  # noqa: E731
    start = reversible.setup(jnp.ones(3), 0.1, 0.9)
    assert reversible.train(loss, start, num_steps=3).report.ok
    with pytest.raises(ValueError, match=r"`loss` must have a gradient .* `jax.lax.scan`"):
        jax.eval_shape(
            lambda start: reversible.hypergradients(
                loss, lambda w, theta: jnp.sum(w), start, num_steps=3, momentum_floor=0.5
            ),
            start,
        )
