"""Celo2 against its authors' updates and a NumPy transcription of its recipe."""

import jax
import numpy as np
import pytest

import learned_opt
from tests import published

SHAPES = {"conv": (3, 2, 2, 4), "tall": (9, 2), "scalar": (), "vector": (7,), "a_bias": (4,)}


def newton_schulz(x):
    wide = x if x.shape[-2] <= x.shape[-1] else np.swapaxes(x, -1, -2)
    y = wide / (np.linalg.norm(wide, axis=(-2, -1), keepdims=True) + 1e-8)
    for _ in range(5):
        a = y @ np.swapaxes(y, -1, -2)
        y = 3.4445 * y + (-4.7750 * a + 2.0315 * a @ a) @ y
    return y if wide is x else np.swapaxes(y, -1, -2)


def transcription(full, theta, shapes):
    """Of Celo2 (``full``) or Celo2-base, at weight decay 0.1."""
    layers = published.layers_of(theta["params"])
    memories = {name: published.Accumulators(shape) for name, shape in shapes.items()}
    adam = dict.fromkeys(shapes, (0.0, 0.0))

    def rule(params, grads, t, loss):
        del t, loss
        changes = {}
        for name, memory in memories.items():
            g, p = grads[name], params[name]
            if full and "bias" in name:
                m, v = adam[name]
                adam[name] = m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g**2
                changes[name] = -0.02 * (m / np.sqrt(v + 1e-8) + 0.1 * p)
                continue
            memory.update(g, [0.9, 0.99, 0.999], 0.95, [0.9, 0.99, 0.999])
            axes = tuple(range(-min(2, g.ndim), 0))
            x = published.thirty_inputs(g, p, memory, axes, 1e-9, 1e-8)
            if g.ndim < 2:
                x[15:] = 0
            d = published.network(layers, x)[0]
            d = newton_schulz(d) if full and g.ndim > 1 else d
            d = d / np.sqrt(1e-9 + np.mean(d**2, axis=axes, keepdims=True))
            changes[name] = -1e-3 * (d + 0.1 * p)
        return changes

    return rule


@pytest.mark.parametrize(
    "full",
    [True, pytest.param(False, marks=pytest.mark.slow)],  # A part of the other.
    ids=["celo2", "celo2_base"],
)
def test_recipe(full):
    build = learned_opt.celo2_optimizer if full else learned_opt.celo2_base_optimizer
    published.check_transcription(
        build(hidden_size=3, weight_decay=0.1),
        lambda *given: transcription(full, *given),
        shapes=SHAPES,
    )


@pytest.mark.parametrize("name", ["celo2", "celo2_base"])
def test_recorded_updates(name):
    optimizer = learned_opt.OPTIMIZERS[name]()
    theta = jax.eval_shape(optimizer.init, jax.random.key(0))
    assert sum(leaf.size for leaf in jax.tree.leaves(theta)) == 347
    published.check_recorded(name, optimizer)


@pytest.mark.parametrize(
    ("argument", "bad"),
    [
        ("hidden_size", 0),
        ("learning_rate", 0.0),
        ("weight_decay", -1),
        ("weight_decay", None),
        ("adam_rate", np.nan),
        ("adam_names", "("),
        ("adam_names", 3),
        ("schedule", "linear"),
        ("schedule", None),
    ],
)
def test_bad_arguments(argument, bad):
    with pytest.raises(ValueError, match=rf"^`{argument}` must be .*got "):
        learned_opt.celo2_optimizer(**{argument: bad})


def test_the_rate_falls_along_a_cosine():
    """Up for 3% of the run, down to 1% at its end and beyond, whoever counts the steps."""
    num_steps, shapes = 50, {"kernel": (3, 4), "a_bias": (4,)}
    params = {name: np.full(shape, 0.1, np.float32) for name, shape in shapes.items()}
    grads = jax.tree.map(
        lambda p: np.cos(np.arange(p.size, dtype=np.float32)).reshape(p.shape), params
    )
    constant, cosine = (learned_opt.celo2_optimizer(schedule=s) for s in ("constant", "cosine"))
    theta = constant.init(jax.random.key(0))

    def steps(optimizer):
        tx = optimizer.bind(theta, num_steps)

        def step(state, _):
            updates, state = tx.update(grads, state, params)
            return state, updates

        return jax.lax.scan(step, tx.init(params), None, num_steps + 5)[1]

    plain, falling = jax.jit(lambda: (steps(constant), steps(cosine)))()
    t = np.arange(num_steps + 5)
    share = 0.01 + 0.99 * (1 + np.cos(np.pi * np.minimum(t / num_steps, 1))) / 2
    share *= np.minimum(1, (t + 1) / (0.03 * num_steps + 1))
    for name in shapes:
        expected = plain[name] * share.reshape(-1, *[1] * len(shapes[name]))
        np.testing.assert_allclose(falling[name], expected, rtol=2e-5)
