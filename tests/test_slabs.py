"""Networks on normalized inputs, slab by slab, against NumPy on the whole tensor."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import learned_opt
from learned_opt import slabs


def inputs_of(arrays):
    x, row = arrays
    return [x, x * x, jnp.exp(row) + 0 * x]


def outputs_of(weights, inputs, arrays):
    return jnp.tanh(sum(w * x for w, x in zip(weights, inputs, strict=True))) + arrays[1]


@pytest.mark.parametrize(
    ("shape", "axes"),
    [
        ((7, 50), (-2, -1)),
        ((31, 3), (-2, -1)),
        ((3, 2, 40), (-3, -2, -1)),  # Along the last axis: the others are too short.
        ((2, 8, 3), (-2, -1)),  # Along one of these axes, whatever the first.
        ((40,), (-1,)),
        ((4, 1, 1), (-2, -1)),
    ],
)
def test_slabs_equal_the_whole(monkeypatch, shape, axes):
    monkeypatch.setattr(slabs, "_LARGEST_WHOLE", 1)
    monkeypatch.setattr(slabs, "_SLAB", 10)
    rng = np.random.default_rng(0)
    x, row = rng.normal(size=shape), rng.normal(size=(*shape[:-1], 1))
    weights = np.array([0.5, -1.0, 2.0])

    @jax.jit
    def ours(x, weights):
        return slabs.on_normalized(inputs_of, outputs_of, axes, 1e-3, weights, (x, row))

    def plain(x, weights):
        inputs = [x, x * x, np.exp(row) + 0 * x]
        means = [(y * y).mean(axes, keepdims=True) for y in inputs]
        scaled = [w * y / (1e-3 + m) ** 0.5 for w, y, m in zip(weights, inputs, means, strict=True)]
        return jnp.tanh(sum(scaled)) + row

    np.testing.assert_allclose(ours(x, weights), plain(x, weights), rtol=2e-5, atol=1e-5)
    for argument in (0, 1):
        a, b = (
            jax.grad(lambda *z, f=f: jnp.sum(jnp.sin(f(*z))), argument)(x, weights)
            for f in (ours, plain)
        )
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)


def test_tensors_side_by_side(monkeypatch):
    """Under ``vmap``, with weights of their own."""
    monkeypatch.setattr(slabs, "_LARGEST_WHOLE", 1)
    monkeypatch.setattr(slabs, "_SLAB", 10)
    rng = np.random.default_rng(1)
    x, row, weights = (rng.normal(size=s) for s in ((3, 9, 4), (3, 9, 1), (3, 3)))

    def one(x, row, weights):
        return slabs.on_normalized(inputs_of, outputs_of, (-2, -1), 1e-3, weights, (x, row))

    together = jax.vmap(one)(x, row, weights)
    alone = [one(*each) for each in zip(x, row, weights, strict=True)]
    np.testing.assert_allclose(together, np.stack(alone), rtol=2e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["adam_controller", "mlp", "small_fc", "star", "celo", "celo2_base", "velo_s"]
)
def test_memory_of_an_update(name):
    """Besides its results, less than 1.5 times the state, at 300,000 parameters."""
    from launch.benchmarks import optimizers

    run = optimizers.digits(512, 512)
    bytes_each, allocated = optimizers.update_memory(run, optimizers.rule(name, 6))
    assert bytes_each > (11 if name == "adam_controller" else 15)
    assert allocated < 1.5, learned_opt.OPTIMIZERS[name]
