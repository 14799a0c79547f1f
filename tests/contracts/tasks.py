"""The contract of every task."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import tasks
from launch import config as cfg
from tasks import SPLITS, Task
from tests.systems import leaves_equal

TASKS = sorted(tasks.TASKS)


def make_task(name):
    return cfg.task(name, batch_size=16).make()


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


@pytest.mark.parametrize("name", TASKS)
def test_types_hold_in_double(name):
    """A loss that is a real float scalar, gradients of the parameters' types; traced only."""
    with jax.enable_x64(True):
        task = make_task(name)

        def step(key):
            instance = task.sample(key)
            params = task.init(instance, key)
            batch = task.batch(instance, key, "train")
            return params, *jax.value_and_grad(task.loss)(params, instance, batch, key)

        params, loss, grads = jax.eval_shape(step, jax.random.key(0))
    assert loss.shape == () and jnp.issubdtype(loss.dtype, jnp.floating)
    assert jax.tree.map(lambda x: x.dtype, grads) == jax.tree.map(lambda x: x.dtype, params)


@pytest.mark.parametrize("name", TASKS)
def test_task_says_its_unit_and_its_score_has_a_loss(name):
    """Whatever is printed, drawn or written of a task has a unit, and its own facts alone."""
    task, key = make_task(name), jax.random.key(0)
    assert task.unit.strip() and task.unit != Task._field_defaults["unit"]
    if task.score is not None:
        instance = task.sample(key)
        params = task.init(instance, key)
        for split in SPLITS:
            scores = task.score(params, instance, split)
            assert all(x.shape == () and np.isfinite(x) for x in scores.values())
            assert set(scores) == {"loss", *task.score_units}
            # The mean over batches of the split, within the noise of many batches.
            batches = jax.vmap(lambda k, s=split: task.batch(instance, k, s))(
                jax.random.split(key, 2000)
            )
            losses = jax.vmap(task.loss, (None, None, 0, None))(params, instance, batches, key)
            error = np.std(losses) / 2000**0.5
            np.testing.assert_allclose(scores["loss"], np.mean(losses), atol=4 * error + 1e-6)
