"""The MLP optimizer against a plain NumPy transcription of its recipe."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import learned_opt
from learned_opt import features, mlp

DECAYS = [0.1, 0.5, 0.9, 0.99, 0.999, 0.9999]
TIMESCALES = [1, 3, 10, 30, 100, 300, 1000, 3000, 10000, 30000, 100000]


def numpy_update(theta, params, momenta, grads, step):
    """One update, tensor by tensor and parameter by parameter, in float64."""
    weights = {k: np.asarray(v, np.float64) for k, v in theta["params"].items()}
    new_params, new_momenta = [], []
    for p, m, g in zip(params, momenta, grads, strict=True):
        m = [d * old + (1 - d) * g for d, old in zip(DECAYS, m, strict=True)]
        raw = np.stack([g.ravel(), p.ravel(), *[x.ravel() for x in m]], axis=-1)
        normalized = raw / np.sqrt(1e-5 + np.mean(raw**2, axis=0))
        time = np.tanh(step / np.array(TIMESCALES) - 1)
        x = np.concatenate([normalized, np.tile(time, (len(normalized), 1))], axis=1)
        assert x.shape[1] == 19
        for layer in range(3):
            x = x @ weights[f"kernel_{layer}"] + weights[f"bias_{layer}"]
            if layer < 2:
                x = np.maximum(x, 0)
        delta = -1e-3 * x[:, 0] * np.exp(1e-3 * x[:, 1])
        new_params.append(p + delta.reshape(p.shape))
        new_momenta.append(m)
    return new_params, new_momenta


@pytest.mark.parametrize("x64", [False, True], ids=["default", "x64"])
def test_recipe(x64):
    with jax.enable_x64(x64):
        check_recipe(*((np.float64, 1e-12) if x64 else (np.float32, 1e-6)))


def check_recipe(dtype, tolerance):
    optimizer = learned_opt.mlp_optimizer()
    theta = optimizer.init(jax.random.key(0))
    assert sum(leaf.size for leaf in jax.tree.leaves(theta)) == 1762
    # Biases start at 0; draw them too, so that the test sees them.
    theta = jax.tree.map(
        lambda w: w + 0.3 * jax.random.normal(jax.random.key(w.size), w.shape), theta
    )
    rng = np.random.default_rng(0)
    shapes = [(5, 7), (7,), (), (2, 3, 4)]
    params = [rng.normal(size=s) for s in shapes]
    momenta = [[np.zeros(s)] * 6 for s in shapes]
    transform = optimizer.bind(theta, num_steps=100)
    ours = [jnp.asarray(p, dtype) for p in params]
    state = transform.init(ours)
    for step in range(20):
        grads = [rng.normal(size=s) * 10.0 ** rng.integers(-3, 2) for s in shapes]
        params, momenta = numpy_update(theta, params, momenta, grads, step)
        updates, state = transform.update([jnp.asarray(g, dtype) for g in grads], state, ours)
        ours = optax.apply_updates(ours, updates)
    for a, b in zip(ours, params, strict=True):
        np.testing.assert_allclose(a, b, atol=tolerance, rtol=tolerance)


def test_features_of_the_largest_floats_have_derivatives():
    huge = {"w": jnp.array([3e38, -3e38, 1.0])}
    momenta = features.init_momenta(huge)
    slope = jax.grad(lambda p: jnp.sum(features.normalized_features(huge, p, momenta)))(huge)
    assert np.all(np.isfinite(slope["w"]))


@pytest.mark.parametrize("columns", [1, 15, 16, 17, 100, 257, 1000])
def test_blocks_equal_the_whole(columns):
    x = jax.random.normal(jax.random.key(0), (8, columns))

    def fn(block):
        return jnp.stack([block.sum(axis=0), jnp.tanh(block[3])])

    np.testing.assert_allclose(features.map_blocks(fn, x, 64), fn(x), rtol=1e-5, atol=1e-6)


# In one block and several, alone and mapped once and twice; the slow tests take all combinations.
FEW_BLOCKS = [(16, False, (3,)), (16, True, (2, 2)), (1520, False, ()), (1520, False, (2, 2))]
FEW_BLOCKS += [(1520, True, (3,))]
BLOCKS = itertools.product([16, 1520], [False, True], [(), (1,), (3,), (2, 2)])


@pytest.mark.parametrize(
    ("columns", "shared", "runs"),
    [
        pytest.param(*case, marks=[] if case in FEW_BLOCKS else [pytest.mark.slow])
        for case in BLOCKS
    ],
)
def test_blocks_of_steps_equal_products(columns, shared, runs):
    """Alone and under (nested) ``vmap``: the values, and the derivatives of what was batched."""
    module = mlp.PerParameterMLP((8, 8), 0.1, 0.5)
    theta = module.init(jax.random.key(0), jnp.zeros((8, 1)), jnp.zeros(11))
    size = () if shared else runs
    theta = jax.tree.map(
        lambda w: 0.3 * jax.random.normal(jax.random.key(w.size), (*size, *w.shape)), theta
    )
    features = jax.random.normal(jax.random.key(1), (*runs, 8, columns))
    time = jnp.linspace(-1, 1, 11)

    def plain(theta, x):
        w = theta["params"]
        x = jnp.concatenate([x, jnp.tile(time[:, None], (1, columns))])
        for i in range(2):
            x = jax.nn.relu(w[f"kernel_{i}"].T @ x + w[f"bias_{i}"][:, None])
        direction, magnitude = w["kernel_2"].T @ x + w["bias_2"][:, None]
        return -0.1 * direction * jnp.exp(0.5 * magnitude)

    def total(steps, theta, features):
        for _ in runs:
            steps = jax.vmap(steps, (None if shared else 0, 0))
        return jnp.sum(jnp.sin(steps(theta, features))), steps(theta, features)

    def ours(theta, x):
        return module.apply(theta, x, time)

    for by in (0, 1):
        gradient = jax.jit(jax.grad(total, argnums=1 + by, has_aux=True), static_argnums=0)
        (slope, value), (expected_slope, expected) = (
            gradient(steps, theta, features) for steps in (ours, plain)
        )
        np.testing.assert_allclose(value, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())
        for a, b in zip(*map(jax.tree.leaves, (slope, expected_slope)), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4 * np.abs(b).max())
    value = jax.jit(total, static_argnums=0)(ours, theta, features)[1]  # Without derivatives.
    np.testing.assert_allclose(value, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("sizes", [(600, 30, 450), (0, 700, 0, 20)], ids=["between", "empty"])
def test_large_tensors_alone_equal_all_together(monkeypatch, sizes):
    """To rounding, with derivatives; values are formed block by block, more than one of them."""
    optimizer = learned_opt.mlp_optimizer((8, 8), step_mult=1.0)
    keys = iter(jax.random.split(jax.random.key(0), 4 * len(sizes) + 1))
    theta = optimizer.init(next(keys))
    params, grads, goal = (
        [scale * jax.random.normal(next(keys), (n // 10, 10)) for n in sizes]
        for scale in (1.0, 0.1, 1.0)
    )

    @partial(jax.jit, static_argnums=0)
    def found(largest):
        def steps(params):
            transform = optimizer.bind(theta, 10)
            steps, state = transform.update(grads, transform.init(params), params)
            loss = sum(jnp.sum(g * s) for g, s in zip(goal, steps, strict=True))
            return loss, (steps, state)

        monkeypatch.setattr(mlp, "_LARGEST_PART", largest)
        monkeypatch.setattr(mlp, "_BLOCK", 64)
        slope, value = jax.grad(steps, has_aux=True)(params)
        return value, slope, steps(params)[1]  # The last without derivatives: block by block.

    for a, b in zip(*map(jax.tree.leaves, (found(100), found(10_000))), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6)


def test_bfloat16():
    """Products of hidden layers, values and derivatives: off by a rounding to eight bits."""
    params = {"w": jax.random.normal(jax.random.key(0), (40, 30))}
    grads = jax.tree.map(jnp.sin, params)
    narrow, wide = (learned_opt.mlp_optimizer((8, 8), bfloat16=x) for x in (True, False))
    theta = narrow.init(jax.random.key(1))

    @jax.jit
    def found(theta):
        def steps(optimizer, theta):
            transform = optimizer.bind(theta, 10)
            return transform.update(grads, transform.init(params), params)[0]["w"]

        def both(optimizer):
            slope = jax.grad(lambda t: jnp.sum(jnp.sin(1e3 * steps(optimizer, t))))(theta)
            return steps(optimizer, theta), slope["params"]["kernel_1"]

        return both(narrow), both(wide)

    for a, b in zip(*found(theta), strict=True):
        assert a.dtype == b.dtype == jnp.float32
        error = np.linalg.norm(a - b) / np.linalg.norm(b)
        assert 1e-4 < error < 0.02
    with pytest.raises(ValueError, match=r"`bfloat16` must be True or False, got 1"):
        learned_opt.mlp_optimizer(bfloat16=1)


def test_needs_parameters():
    optimizer = learned_opt.mlp_optimizer()
    transform = optimizer.bind(optimizer.init(jax.random.key(0)), 10)
    with pytest.raises(ValueError, match=r"update\(grads, state, params\)"):
        transform.update(jnp.ones(3), transform.init(jnp.ones(3)))


@pytest.mark.parametrize("build", ["mlp", "reversible_mlp"])
@pytest.mark.parametrize(
    ("argument", "bad"),
    [("hidden_sizes", bad) for bad in ((), (0,), (2.5,), 32, "32", (True,), None)]
    + [(name, bad) for name in ("step_mult", "exp_mult") for bad in (0.0, -1, np.inf, np.nan, "1")],
)
def test_bad_arguments(build, argument, bad):
    with pytest.raises(ValueError, match=rf"^`{argument}` must be .*got "):
        learned_opt.OPTIMIZERS[build](**{argument: bad})
