"""The tuned optimizers against plain NumPy transcriptions, on disk and on the command line."""

import dataclasses

import jax
import jax.numpy as jnp
import jax.test_util
import numpy as np
import optax
import pytest

import learned_opt
from launch import config as cfg
from tests.systems import leaves_equal

SHAPES = [(5, 7), (7,), (), (2, 3, 4)]


def trajectory(transform, params, grads):
    """Parameters after each step, in float64 NumPy arrays."""
    state, found = transform.init(params), []
    for grad in grads:
        updates, state = transform.update([jnp.float32(g) for g in grad], state, params)
        params = optax.apply_updates(params, updates)
        found.append([np.asarray(p, np.float64) for p in params])
    return found


def sgd_with_momentum(params, grads, rate, momentum):
    """``rate(step, tensor)`` and ``momentum(tensor)``, one tensor at a time."""
    velocity, found = [np.zeros_like(p) for p in params], []
    for step, grad in enumerate(grads):
        velocity = [
            momentum(i) * v + g for i, (v, g) in enumerate(zip(velocity, grad, strict=True))
        ]
        params = [
            p - rate(step, i) * v for i, (p, v) in enumerate(zip(params, velocity, strict=True))
        ]
        found.append(params)
    return found


def problem(num_steps=12):
    rng = np.random.default_rng(0)
    params = [rng.normal(size=s) for s in SHAPES]
    return params, [[rng.normal(size=s) for s in SHAPES] for _ in range(num_steps)]


def check(transform, params, grads, **recipe):
    ours = trajectory(transform, [jnp.asarray(p, jnp.float32) for p in params], grads)
    for a, b in zip(ours, sgd_with_momentum(params, grads, **recipe), strict=True):
        for x, y in zip(a, b, strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)


def test_schedule():
    params, grads = problem()
    theta = {"params": {"log_learning_rate": jnp.log(0.2), "log_decay": jnp.log(3.0)}}
    transform = learned_opt.learnable_schedule(momentum=0.8).bind(theta, num_steps=10)
    check(
        transform,
        params,
        grads,
        rate=lambda step, i: 0.2 / (1 + step / 10) ** 3.0,
        momentum=lambda i: 0.8,
    )


def test_schedule_starts_at_its_arguments():
    optimizer = learned_opt.learnable_schedule(learning_rate=0.003, decay=30.0)
    params, grads = problem()
    check(
        optimizer.bind(optimizer.init(jax.random.key(0)), 12),
        params,
        grads,
        rate=lambda step, i: 0.003 / (1 + step / 12) ** 30.0,
        momentum=lambda i: 0.9,
    )


def test_schedule_begins_with_the_rate_and_an_exponent_of_one():
    theta = learned_opt.learnable_schedule().init(jax.random.key(0))["params"]
    assert theta["log_learning_rate"] == np.float32(np.log(0.1)) and theta["log_decay"] == 0


def test_per_tensor_sgdm():
    params, grads = problem()
    rates, momenta = [0.1, 0.02, 0.5, 0.003], [0.9, 0.1, 0.5, 0.99]
    theta = {
        "params": {
            "log_learning_rate": jnp.log(jnp.array(rates)),
            "logit_momentum": jax.scipy.special.logit(jnp.array(momenta)),
        }
    }
    transform = learned_opt.per_tensor_sgdm(num_tensors=4).bind(theta, 10)
    check(
        transform,
        params,
        grads,
        rate=lambda step, i: rates[i],
        momentum=lambda i: momenta[i],
    )


def test_per_tensor_sgdm_counts_the_tensors():
    optimizer = learned_opt.per_tensor_sgdm(num_tensors=4)
    transform = optimizer.bind(optimizer.init(jax.random.key(0)), 10)
    with pytest.raises(ValueError, match=r"`num_tensors`.*num_tensors=4 for parameters of 2"):
        transform.init([jnp.ones(2), jnp.ones(3)])


def test_adam_is_that_of_optax():
    """To the bit, over gradients of very different sizes and a parameter that has none."""
    params, _ = problem()
    params = [jnp.asarray(p, jnp.float32) for p in params]
    optimizer = learned_opt.learnable_adam(0.02, 0.8, 0.99, 1e-6)

    def ours(theta):
        return optimizer.bind(theta, 50)

    def theirs(theta):
        p = theta["params"]
        decays = [jax.nn.sigmoid(p[name]) for name in ("logit_b1", "logit_b2")]
        return optax.adam(jnp.exp(p["log_learning_rate"]), *decays, jnp.exp(p["log_eps"]))

    def run(build, theta):
        transform = build(theta)

        def body(carry, key):
            params, state = carry
            scale = jnp.exp(6 * jax.random.normal(key))
            grads = [scale * jax.random.normal(key, p.shape) for p in params[:-1]]
            updates, state = transform.update([*grads, jnp.zeros((2, 3, 4))], state, params)
            return (optax.apply_updates(params, updates), state), None

        keys = jax.random.split(jax.random.key(0), 50)
        return jax.lax.scan(body, (params, transform.init(params)), keys)[0]

    theta = optimizer.init(jax.random.key(0))
    found, expected = (jax.jit(run, static_argnums=0)(build, theta) for build in (ours, theirs))
    assert leaves_equal(found, expected)
    assert jax.tree.structure(found) == jax.tree.structure(expected)


def test_derivative_of_adam():
    """By finite differences where there is one; where no gradient ever was, by the limit eps."""
    optimizer = learned_opt.learnable_adam(0.02, 0.8, 0.9, 0.1)
    theta = optimizer.init(jax.random.key(0))

    def third_update(theta, grads):
        transform = optimizer.bind(theta, 3)
        state = transform.init(jnp.zeros(3))
        for scale in (1.0, -0.5, 2.0):
            update, state = transform.update(scale * grads, state)
        return update.sum()

    grads = jnp.array([0.3, -0.2, 0.05])
    jax.test_util.check_grads(third_update, (theta, grads), order=1, eps=1e-2, rtol=1e-2)
    # update = -rate mean_hat / (|.| + eps): at 0 its slope is that of the mean, over eps.
    slope = jax.grad(third_update, 1)(theta, jnp.zeros(3))
    mean = 0.2 * (0.8**2 * 1 - 0.8 * 0.5 + 2) / (1 - 0.8**3)
    np.testing.assert_allclose(slope, -0.02 * mean / 0.1, rtol=1e-5)


@pytest.mark.parametrize(
    "build, bad",
    [
        (learned_opt.learnable_schedule, {"decay": 0.0}),
        (learned_opt.learnable_schedule, {"learning_rate": -1.0}),
        (learned_opt.learnable_schedule, {"momentum": 1.0}),
        (learned_opt.per_tensor_sgdm, {"num_tensors": 0}),
        (learned_opt.per_tensor_sgdm, {"num_tensors": 2.5}),
        (learned_opt.learnable_sgdm, {"learning_rate": np.inf}),
        (learned_opt.learnable_sgdm, {"learning_rate": "0.1"}),
        (learned_opt.learnable_adam, {"b2": np.nan}),
        (learned_opt.learnable_adam, {"eps": True}),
        (learned_opt.per_tensor_sgdm, {"momentum": 0.0}),
    ],
)
def test_bad_arguments(build, bad):
    with pytest.raises(ValueError, match=f"`{next(iter(bad))}` must be"):
        build(**bad)


@pytest.mark.parametrize("name", ["schedule", "per_tensor_sgdm"])
def test_command_line_save_and_load(name, tmp_path):
    config = cfg.optimizer(name, learning_rate=0.05, momentum=0.7)
    optimizer = config.make()
    theta = jax.tree.map(lambda t: t + 0.1, optimizer.init(jax.random.key(0)))
    learned_opt.save(tmp_path, name, dataclasses.asdict(config), theta)
    loaded, loaded_theta = learned_opt.load(tmp_path)
    params, grads = problem()
    params = [jnp.asarray(p, jnp.float32) for p in params]
    before = trajectory(optimizer.bind(theta, 10), params, grads)
    after = trajectory(loaded.bind(loaded_theta, 10), params, grads)
    jax.tree.map(np.testing.assert_array_equal, before, after)
