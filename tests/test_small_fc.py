"""``small_fc_lopt`` against its authors' updates and a NumPy transcription of its recipe."""

import jax
import jax.numpy as jnp
import jax.test_util
import numpy as np
import pytest
from flax.traverse_util import unflatten_dict

import learned_opt
from learned_opt import formats
from learned_opt.initializers import fan_in_normal
from learned_opt.small_network import Layers, apply_layers
from tests import published

TIMESCALES = [1, 3, 10, 30, 100, 300, 1000, 3000, 10000, 30000, 100000]


def outputs(theta, g, p, t, memory):
    """The network's outputs for one tensor, whose accumulators ``memory`` takes the gradient."""
    theta = theta["params"]
    d = {
        name: 1 - (1 - np.asarray(first)) * np.exp(10 * theta[f"{name}_decays"])
        for name, first in (
            ("momentum", [0.9, 0.99, 0.999]),
            ("square", [0.999]),
            ("factored", [0.9, 0.99, 0.999]),
        )
    }
    memory.update(g, d["momentum"], np.clip(d["square"][0], 0, 1), np.clip(d["factored"], 0, 1))
    m, v, rows, columns = memory.m, memory.v, memory.full(memory.rows), memory.full(memory.columns)
    if memory.axes is None:
        factored, for_momenta = (rows + 1e-9) ** -0.5, (rows + 1e-6) ** -0.5
    else:
        factored = for_momenta = memory.roots()
    root = (v + 1e-6) ** -0.5
    features = [g[None], p[None], m, v[None], m * root, root[None], g * factored, rows, columns]
    features += [(rows + 1e-8) ** -0.5, (columns + 1e-8) ** -0.5, m * for_momenta]
    x = np.concatenate(features)
    axes = tuple(range(1, x.ndim))
    x = x / np.sqrt(1e-5 + np.mean(x**2, axis=axes, keepdims=True))
    time = np.tanh(t / np.array(TIMESCALES) - 1).reshape(-1, *[1] * p.ndim)
    x = np.concatenate([x, np.broadcast_to(time, (11, *p.shape))])
    assert len(x) == 39
    return published.network(published.layers_of(theta["network"]), x)


def transcription(theta, shapes):
    memories = {name: published.Accumulators(shape) for name, shape in shapes.items()}

    def rule(params, grads, t, loss):
        del loss
        changes = {}
        for name, memory in memories.items():
            d, m = outputs(theta, grads[name], params[name], t, memory)
            changes[name] = -1e-3 * d * np.exp(1e-3 * m)
        return changes

    return rule


def test_recipe():
    published.check_transcription(learned_opt.small_fc_optimizer(), transcription)


@pytest.mark.parametrize("width", [8, 9], ids=["sums", "products"])
def test_networks_of_any_width(width):
    """With their derivatives, which those of a narrow one take from products too."""
    module = Layers((4, width, width, 2))
    weights = jax.tree.map(lambda w: w + 0.1, jax.jit(module.init)(jax.random.key(0))["params"])
    x = np.random.default_rng(0).normal(size=(4, 3, 5)).astype(np.float32)
    row, column = np.float32([[[1.0], [2.0], [3.0]]] * width), np.ones((width, 1, 5), np.float32)

    @jax.jit
    def apply(weights, x):
        return jnp.stack(apply_layers(module.apply({"params": weights}), x, [row, column]))

    layers = published.layers_of(jax.tree.map(np.asarray, weights))
    layers = [(np.concatenate([layers[0][0], np.eye(width)]), layers[0][1]), *layers[1:]]
    offset = np.broadcast_to(row + column, (width, 3, 5))
    expected = published.network(layers, np.concatenate([x, offset]))
    np.testing.assert_allclose(apply(weights, x), expected, rtol=1e-5, atol=1e-5)
    jax.test_util.check_grads(apply, (weights, x), 1, atol=0.02, rtol=0.02, eps=1e-3)


def theta_of(found):
    return unflatten_dict(formats.theta_of("small_fc", found), sep="/")


@pytest.mark.parametrize(
    ("name", "width", "count"), [("small_fc", 4, 197), ("small_fc_32", 32, 2409)]
)
def test_recorded_updates(name, width, count):
    optimizer = learned_opt.small_fc_optimizer((width, width))
    theta = jax.eval_shape(optimizer.init, jax.random.key(0))
    assert sum(leaf.size for leaf in jax.tree.leaves(theta)) == count
    published.check_recorded(name, optimizer, theta_of)


def test_kernels_start_with_the_variance_of_their_inputs():
    """Cut off at two standard deviations, which leaves 0.774 of the variance."""
    stack = fan_in_normal(jax.random.key(0), (3, 25, 400))
    np.testing.assert_allclose(np.var(stack) * 25, 0.774, rtol=0.03)
    assert np.abs(stack).max() <= 2 / 5
