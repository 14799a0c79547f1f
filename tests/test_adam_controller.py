"""The Adam controller against a NumPy transcription of its docstring, and what it promises."""

import pickle
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import learned_opt
from tests.systems import leaves_equal

SHAPES = {"a": (4, 3), "b": (3,), "c": (), "d": (2, 1, 5), "e": (3, 2, 4)}
NUM_STEPS, RATE, DECAY, ITERATIONS = 40, 0.05, 0.07, 4


def a_theta(optimizer, size):
    theta = optimizer.init(jax.random.key(0))
    return jax.tree.map(
        lambda w: w + size * jax.random.normal(jax.random.key(w.size), w.shape), theta
    )


def rms(x):
    return np.sqrt(np.mean(np.square(x)))


def log_rms(x):
    return np.log(np.mean(np.square(x)) + 1e-24) / 2


def cosine(x, y):
    return np.mean(x * y) / np.exp(log_rms(x) + log_rms(y))


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def orthogonal(x):
    flat = x.reshape(-1, x.shape[-1])
    tall = flat.shape[0] > flat.shape[1]
    m = flat.T if tall else flat
    m = m / (np.linalg.norm(m) + 1e-8)
    for _ in range(ITERATIONS):
        s = m @ m.T
        m = 3.4445 * m + (-4.7750 * s + 2.0315 * s @ s) @ m
    return (m.T if tall else m).reshape(x.shape)


class Transcription:
    """The optimizer in float64, tensor by tensor."""

    def __init__(self, theta):
        self.w = {
            k: {n: np.asarray(v, float) for n, v in d.items()} for k, d in theta["params"].items()
        }
        zero = {k: np.zeros(s) for k, s in SHAPES.items()}
        self.m1, self.m2, self.v = dict(zero), dict(zero), dict(zero)
        self.s, self.cos, self.scale = (dict.fromkeys(SHAPES, 0.0) for _ in range(3))
        self.t = 0

    def losses(self, loss):
        log = np.log(max(loss, 1e-12))
        if self.t == 0:
            self.fast = self.slow = self.first = log
        else:
            self.fast = 0.9 * self.fast + 0.1 * log
            self.slow = 0.98 * self.slow + 0.02 * log

    def update(self, grads, params, loss):
        self.losses(loss)
        n, f = self.t + 1, min(self.t / NUM_STEPS, 1)
        c1, c2, cv = 1 - 0.9**n, 1 - 0.98**n, 1 - 0.99**n
        schedule = min(1, n / (0.03 * NUM_STEPS + 1)) * (0.01 + 0.99 * (1 + np.cos(np.pi * f)) / 2)
        steps = {}
        for k, g in grads.items():
            p = params[k]
            before = cosine(g, self.m1[k])
            self.m1[k] = 0.9 * self.m1[k] + 0.1 * g
            self.m2[k] = 0.98 * self.m2[k] + 0.02 * g
            self.v[k] = 0.99 * self.v[k] + 0.01 * g**2
            root = 1 / np.sqrt(self.v[k] / cv + 1e-16)
            d1, d2 = self.m1[k] / c1 * root, self.m2[k] / c2 * root
            between = cosine(self.m1[k], self.m2[k])
            self.cos[k] = 0.95 * self.cos[k] + 0.05 * before
            log_g = log_rms(g)
            self.scale[k] = log_g if self.t == 0 else 0.98 * self.scale[k] + 0.02 * log_g
            matrix = sum(size > 1 for size in p.shape) > 1
            x = np.clip(
                [
                    2 * f - 1,
                    4 * (f - 0.5) ** 2,
                    (np.log(NUM_STEPS) - 5.5) / 1.5,
                    2 * np.tanh(n / 20) - 1,
                    np.clip(5 * (self.fast - self.slow), -3, 3),
                    (self.slow - self.first) / 2 + 0.5,
                    log_rms(p) / 2 + 1,
                    log_rms(d1),
                    log_rms(d2) + 0.5,
                    2 * before,
                    2 * between - 1,
                    4 * self.cos[k] / (1 - 0.95**n),
                    1 if matrix else -1,
                    np.log10(p.size) - 2,
                    self.s[k],
                    log_g - self.scale[k],
                ],
                -6,
                6,
            )
            h = np.tanh(x @ self.w["hidden"]["kernel"] + self.w["hidden"]["bias"])
            o = h @ self.w["last"]["kernel"] + self.w["last"]["bias"]
            a, b = sigmoid(o[1] - 2), 0.3 * sigmoid(o[2] - 1)
            d = (1 - b) * ((1 - a) * d1 + a * d2) + b * g * root
            if matrix:
                raw = (1 - b) * ((1 - a) * self.m1[k] / c1 + a * self.m2[k] / c2) + b * g
                q = orthogonal(raw)
                d = d + sigmoid(o[6] + 1) * (q * rms(d) / rms(q) - d)
            self.s[k] = np.clip(self.s[k] + 10 / NUM_STEPS * np.tanh(o[4]), -4, 4)
            trust = 0.5 * np.tanh(o[5]) * (log_rms(p) + 2)
            rate = RATE * schedule * np.exp(np.clip(o[0] + self.s[k] + trust, -7, 5))
            decay = np.exp(np.clip(np.log(DECAY) + o[3], np.log(0.1) - 8, np.log(0.1) + 3))
            steps[k] = -rate * (d + decay * p)
        self.t += 1
        return steps


def test_recipe():
    """Over the whole run and beyond it, in float64 to rounding."""
    with jax.enable_x64(True):
        optimizer = learned_opt.adam_controller(
            learning_rate=RATE, iterations=ITERATIONS, decay=DECAY
        )
        theta = a_theta(optimizer, 0.5)
        assert sum(x.size for x in jax.tree.leaves(optimizer.init(jax.random.key(0)))) == 391
        rng = np.random.default_rng(0)
        params = {k: rng.normal(size=s) for k, s in SHAPES.items()}
        transform = optimizer.bind(theta, NUM_STEPS)
        update, state = jax.jit(transform.update), transform.init(params)
        expected = Transcription(theta)
        for t in range(NUM_STEPS + 10):
            grads = {k: rng.normal(size=s) * 10.0 ** rng.integers(-4, 3) for k, s in SHAPES.items()}
            loss = float(np.exp(rng.normal())) if t % 7 else -1.0
            steps, state = update(grads, state, params, value=loss)
            for k, step in expected.update(grads, params, loss).items():
                np.testing.assert_allclose(steps[k], step, rtol=1e-6, atol=1e-12)
            params = optax.apply_updates(params, steps)


@pytest.mark.parametrize("power", [-8, 8])
def test_steps_do_not_depend_on_the_unit_of_the_loss(power):
    optimizer = learned_opt.adam_controller()
    theta = a_theta(optimizer, 0.3)
    params = {"w": jnp.arange(12.0).reshape(4, 3) / 7, "b": jnp.array([0.1, -0.2])}

    @jax.jit
    def run(unit):
        transform = optimizer.bind(theta, 30)

        def body(carry, t):
            params, state = carry
            grads = jax.tree.map(lambda p: jnp.sin(p + t), params)
            steps, state = transform.update(
                jax.tree.map(lambda g: unit * g, grads), state, params, value=unit / (1 + t)
            )
            return (optax.apply_updates(params, steps), state), None

        return jax.lax.scan(body, (params, transform.init(params)), jnp.arange(30.0))[0][0]

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3), run(1.0), run(2.0**power)
    )


def test_beyond_its_run_it_keeps_the_last_rate():
    optimizer = learned_opt.adam_controller(learning_rate=1.0, matrices=False)
    theta = optimizer.init(jax.random.key(0))
    assert sum(x.size for x in jax.tree.leaves(theta)) == 374
    transform = optimizer.bind(theta, 10)
    params, sizes = jnp.ones(4), []
    state = transform.init(params)
    for _ in range(30):
        steps, state = jax.jit(transform.update)(jnp.ones(4), state, params, value=1.0)
        sizes.append(float(jnp.max(jnp.abs(steps))))
    # Untrained, of equal gradients, the direction is 1 and the decay 0.1 exp(-4).
    np.testing.assert_allclose(sizes[10:], 0.01 * (1 + 0.1 * np.exp(-4)), rtol=1e-4)
    assert sizes[1] == max(sizes)  # The warm-up is over: 2 / 1.3.


def test_tensors_of_one_shape_are_alike():
    optimizer = learned_opt.adam_controller()
    theta = a_theta(optimizer, 0.3)
    grads = [jnp.sin(jnp.arange(6.0)).reshape(2, 3), jnp.cos(jnp.arange(6.0)).reshape(2, 3)]
    params = [jnp.ones((2, 3)), 2 * jnp.ones((2, 3))]

    def steps(order):
        transform = optimizer.bind(theta, 10)
        g, p = ([x[i] for i in order] for x in (grads, params))
        return transform.update(g, transform.init(p), p, value=1.0)[0]

    forward, backward = steps((0, 1)), steps((1, 0))
    assert leaves_equal(forward, backward[::-1])


def test_it_needs_the_loss():
    transform = learned_opt.adam_controller().bind(
        learned_opt.adam_controller().init(jax.random.key(0)), 10
    )
    params = {"w": jnp.ones(3)}
    with pytest.raises(ValueError, match=r"reads the parameters and the loss: call"):
        transform.update(params, transform.init(params), params)


def test_derivatives_of_the_largest_floats():
    """Of two steps, by all that goes in; and the steps themselves."""
    optimizer = learned_opt.adam_controller()
    theta = a_theta(optimizer, 0.3)
    params = {"w": jnp.full((3, 2), 3e38).at[0].set(-3e38), "b": jnp.float32(3e38)}

    def run(theta, params, grads):
        transform = optimizer.bind(theta, 10)
        _, state = transform.update(grads, transform.init(params), params, value=3e38)
        return transform.update(grads, state, params, value=3e38)[0]

    updates, pull = jax.jit(partial(jax.vjp, run))(theta, params, params)
    for leaf in jax.tree.leaves((updates, pull(jax.tree.map(jnp.ones_like, updates)))):
        assert np.all(np.isfinite(leaf))


def test_a_restored_state_goes_on_as_before():
    """Pickled in the middle of a run of a mixed tree with nothing in parts of it."""
    optimizer = learned_opt.adam_controller()
    transform = optimizer.bind(a_theta(optimizer, 0.3), 10)
    params = {
        "half": jnp.linspace(-1, 1, 6, dtype=jnp.bfloat16).reshape(2, 3),
        "none": None,
        "empty": jnp.zeros((0, 3)),
        "w": jnp.ones((2, 3)),
    }
    update = jax.jit(transform.update)
    _, state = update(params, transform.init(params), params, value=1.0)
    restored = jax.tree.map(jnp.asarray, pickle.loads(pickle.dumps(jax.device_get(state))))
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    found, expected = (update(params, each, params, value=0.5) for each in (restored, state))
    assert leaves_equal(found, expected)
    assert found[0]["none"] is None and found[0]["half"].dtype == jnp.bfloat16
