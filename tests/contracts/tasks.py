"""The contract of every task."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from launch import config as cfg
from tasks import SPLITS
from tests.systems import leaves_equal

TASKS = sorted(cfg.TASKS)


def make_task(name):
    return cfg.make_task(cfg.TaskConfig(name=name, batch_size=16), None)


@pytest.mark.parametrize("name", TASKS)
def test_task(name):
    task, key = make_task(name), jax.random.key(0)
    instance = task.sample(key)
    params = task.init(instance, key)
    assert all(jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in jax.tree.leaves(params))
    for split in SPLITS:
        batch = task.batch(instance, key, split)
        assert leaves_equal(batch, task.batch(instance, key, split))
        loss = task.loss(params, instance, batch, key)
        assert loss.shape == () and np.isfinite(loss)
    other = task.batch(instance, jax.random.key(1), "train")
    assert not leaves_equal(task.batch(instance, key, "train"), other)

    # Under jit and vmap, and the gradient is that of the loss (central difference).
    @jax.jit
    @jax.vmap
    def value_and_slope(key):
        instance = task.sample(key)
        params = task.init(instance, key)
        params = jax.tree.map(lambda p: p + 0.1, params)
        batch = task.batch(instance, key, "train")
        grads = jax.grad(task.loss)(params, instance, batch, key)
        h = 1e-6 if jax.config.jax_enable_x64 else 1e-2  # Smaller steps cross fewer kinks.
        moved = [
            task.loss(optax.tree.add_scale(params, s * h, grads), instance, batch, key)
            for s in (1, -1)
        ]
        return optax.tree.norm(grads) ** 2, (moved[0] - moved[1]) / (2 * h)

    squared, slope = value_and_slope(jax.random.split(key, 3))
    np.testing.assert_allclose(slope, squared, rtol=2e-2)
    assert np.all(squared > 0)
