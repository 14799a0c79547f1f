"""The layer-wise mixture against a plain NumPy transcription of its recipe."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import learned_opt
from tests.published import SHAPES, check_transcription


def transcription(theta, shapes):
    """``rules(params, grads, t, loss) -> changes``, tensor by tensor in float64."""
    w = theta["params"]
    decays = 1 / (1 + np.exp(-w["logit_decays"]))
    m, v = ({name: np.zeros(shape) for name, shape in shapes.items()} for _ in range(2))
    averages = {name: np.zeros((3, 2)) for name in shapes}

    def log_size(x):
        return np.log(1e-8 + np.sqrt(np.mean(x**2))) / 10

    def rules(params, grads, t, loss):
        changes = {}
        for place, name in enumerate(sorted(shapes)):
            g, p = grads[name], params[name]
            m[name] = 0.9 * m[name] + 0.1 * g
            v[name] = 0.999 * v[name] + 0.001 * g**2
            unbiased = [m[name] / (1 - 0.9 ** (t + 1)), v[name] / (1 - 0.999 ** (t + 1))]
            seen = [np.sign(loss) * np.log(1 + abs(loss)), log_size(g), log_size(p)]
            averages[name] = decays * averages[name] + (1 - decays) * np.reshape(seen, (3, 1))
            x = (averages[name] / (1 - decays ** (t + 1))).ravel()
            x = np.concatenate([w["embedding"][place], x, [t / 6, np.log(1 + t) / 10]])
            x = np.maximum(x @ w["hidden"]["kernel"] + w["hidden"]["bias"], 0)
            out = x @ w["out"]["kernel"] + w["out"]["bias"]
            shares = np.exp(out[1:]) / np.exp(out[1:]).sum()
            directions = [g, m[name], unbiased[0] / (np.sqrt(unbiased[1]) + 1e-8)]
            mixed = sum(
                share * d * np.sqrt(d.size) / (np.sqrt(np.sum(d**2)) + 1e-8)
                for share, d in zip(shares, directions, strict=True)
            )
            changes[name] = -np.exp(w["log_learning_rate"] + out[0]) * mixed
        return changes

    return rules


def test_transcription():
    optimizer = learned_opt.l3rs_optimizer(num_tensors=len(SHAPES))
    theta = optimizer.init(jax.random.key(0))
    assert sum(leaf.size for leaf in jax.tree.leaves(theta)) == 375 + 8
    check_transcription(optimizer, transcription)


def test_starts_at_its_learning_rate():
    """Equal shares of three directions that agree: each tensor's step has that size."""
    optimizer = learned_opt.l3rs_optimizer(num_tensors=2, learning_rate=0.03)
    transform = optimizer.bind(optimizer.init(jax.random.key(1)), 10)
    params = {"a": jnp.ones((4, 3)), "b": jnp.zeros(5)}
    grads = jax.tree.map(lambda p: jnp.full(p.shape, 1e-3), params)
    update = jax.jit(lambda p, g: transform.update(g, transform.init(p), p, value=1.0)[0])
    updates = update(params, grads)
    for update in updates.values():
        np.testing.assert_allclose(update, -0.03, rtol=1e-4)


def test_refusals():
    optimizer = learned_opt.l3rs_optimizer(num_tensors=2)
    transform = optimizer.bind(optimizer.init(jax.random.key(0)), 10)
    with pytest.raises(ValueError, match=r"`num_tensors`.*num_tensors=2 for parameters of 1"):
        transform.init([jnp.ones(2)])
    params = [jnp.ones(2), jnp.ones(3)]
    state = transform.init(params)
    for given in ((params, state), (params, state, params)):
        with pytest.raises(ValueError, match=r"L3RS .*update\(grads, state, params, value=loss\)"):
            transform.update(*given)
    with pytest.raises(ValueError, match="`hidden_size` must be a whole number"):
        learned_opt.l3rs_optimizer(hidden_size=0)
    with pytest.raises(ValueError, match="`learning_rate` must be a finite number"):
        learned_opt.l3rs_optimizer(learning_rate=0.0)
