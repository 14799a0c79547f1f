"""The contract of every learned optimizer."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from learned_opt import OPTIMIZERS
from tests.systems import leaves_equal

PARAMS = {"scalar": jnp.array(0.5), "matrix": jnp.ones((3, 2)), "deep": [jnp.arange(4.0)]}


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_learned_optimizer(name):
    optimizer = OPTIMIZERS[name](**({"num_tensors": 3} if name == "per_tensor_sgdm" else {}))
    theta = optimizer.init(jax.random.key(0))
    assert leaves_equal(theta, optimizer.init(jax.random.key(0)))
    grads = jax.tree.map(lambda p: 0.1 * p + 0.01, PARAMS)

    def run(theta):
        transform = optax.chain(optax.clip(10.0), optimizer.bind(theta, 5))

        def body(carry, _):
            params, state = carry
            updates, state = transform.update(grads, state, params, value=jnp.array(1.0))
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(body, (PARAMS, transform.init(PARAMS)), None, length=5)[0][0]

    params = jax.jit(run)(theta)
    assert jax.tree.structure(params) == jax.tree.structure(PARAMS)
    for after, before in zip(*map(jax.tree.leaves, (params, PARAMS)), strict=True):
        assert after.shape == before.shape and after.dtype == before.dtype
        assert np.all(np.isfinite(after)) and not np.array_equal(after, before)
    # theta matters, is differentiable, and may be batched.
    slope = jax.grad(lambda t: optax.tree.sum(run(t)))(theta)
    assert optax.tree.norm(slope) > 0
    thetas = jax.tree.map(lambda t: jnp.stack([t, 1.1 * t]), theta)
    batched = jax.jit(jax.vmap(run))(thetas)
    np.testing.assert_allclose(batched["matrix"][0], params["matrix"], rtol=1e-5)
    assert not np.allclose(batched["matrix"][0], batched["matrix"][1], atol=1e-9)
    # Half precision parameters keep their type.
    half = jax.tree.map(lambda p: p.astype(jnp.bfloat16), PARAMS)
    transform = optimizer.bind(theta, 5)
    updates, _ = transform.update(half, transform.init(half), half)
    assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(updates))
