"""Multipliers by width: which tensors get which, and that networks of all widths move alike."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from learned_opt import learnable_adam, scale_by_width

SHAPES = {
    "input": ((5, 4), (5, 16), 1),
    "embedding": ((100, 4), (100, 16), 1),
    "hidden": ((4, 4), (16, 16), 1 / 4),
    "to_wider": ((4, 12), (16, 48), 1 / 4),
    "kernel": ((3, 3, 4, 8), (3, 3, 16, 32), 1 / 4),
    "query": ((4, 2, 3), (16, 8, 3), 1 / 4),
    "narrower": ((4, 4), (2, 2), 2),
    "output": ((4, 7), (16, 7), 1 / 4),
    "same": ((4, 4), (4, 4), 1),
    "bias": ((4,), (16,), 1),
    "scalar": ((), (), 1),
}


@pytest.mark.parametrize("model_scales_output", [False, True])
def test_multipliers(model_scales_output):
    base = {name: jax.ShapeDtypeStruct(shapes[0], jnp.float32) for name, shapes in SHAPES.items()}
    params = {name: jnp.ones(shapes[1]) for name, shapes in SHAPES.items()}
    transform = scale_by_width(optax.sgd(1.0), base, model_scales_output=model_scales_output)
    updates, _ = transform.update(params, transform.init(params), params)
    for name, update in updates.items():
        right = 1 if name == "output" and model_scales_output else SHAPES[name][2]
        np.testing.assert_array_equal(update, -right, err_msg=name)


def network(width):
    """Four layers in muP: weights ``N(0, 1 / fan_in)``, the last one 0."""
    sizes = (6, width, width, 3)
    keys = jax.random.split(jax.random.key(0), 2)
    kernels = [
        jax.random.normal(key, shape) * shape[0] ** -0.5
        for key, shape in zip(keys, ((6, width), (width, width)), strict=True)
    ]
    return [*kernels, jnp.zeros(sizes[-2:])]


def activations(kernels, x):
    hidden = jax.nn.relu(x @ kernels[0])
    hidden = jax.nn.relu(hidden @ kernels[1])
    return hidden, hidden @ kernels[2]


def test_all_widths_move_alike():
    """How far activations and outputs are from their start after some steps of Adam."""
    x = jax.random.normal(jax.random.key(1), (32, 6))
    targets = jnp.sin(x[:, :3])
    optimizer = learnable_adam(learning_rate=1e-3)
    adam = optimizer.bind(optimizer.init(jax.random.key(0)), 10)

    def moved(width, transform):
        params = network(width)

        def loss(params):
            return jnp.mean((activations(params, x)[1] - targets) ** 2)

        def body(carry, _):
            params, state = carry
            updates, state = transform.update(jax.grad(loss)(params), state, params)
            return (optax.apply_updates(params, updates), state), None

        @jax.jit
        def run():
            return jax.lax.scan(body, (params, transform.init(params)), length=3)[0][0]

        pairs = zip(activations(run(), x), activations(params, x), strict=True)
        return np.array([jnp.sqrt(jnp.mean((after - before) ** 2)) for after, before in pairs])

    base = network(64)
    plain, scaled = (
        [moved(width, t) for width in (64, 1024)] for t in (adam, scale_by_width(adam, base))
    )
    assert np.all(plain[1] > 4 * plain[0])
    np.testing.assert_allclose(scaled[1], scaled[0], rtol=0.4)


def test_refusals():
    transform = scale_by_width(optax.identity(), {"a": jnp.ones(3)})
    with pytest.raises(ValueError, match=r"`base_params` .* shape \(3,\) for \(2, 2\) at \['a'\]"):
        transform.init({"a": jnp.ones((2, 2))})
    with pytest.raises(
        ValueError, match=r"no axis of size 0 .* shape \(0,\) for \(3,\) at \['a'\]"
    ):
        scale_by_width(optax.sgd(1.0), {"a": jnp.ones(0)}).init({"a": jnp.ones(3)})
    with pytest.raises(ValueError, match="`base_params` must have the structure of the parameters"):
        transform.update({"b": jnp.ones(3)}, optax.EmptyState())
