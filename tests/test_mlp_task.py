"""The MLP classifier whose activation is drawn with the instance."""

import jax
import numpy as np
import pytest

from tasks import mlp_classifier

NAMES = ("relu", "tanh", "gelu")


def test_an_instance_is_the_task_of_its_activation():
    """In one population: start, loss, its gradient and scores, of each the right one."""
    sizes = {"hidden_sizes": (6, 5), "batch_size": 4}
    drawn = mlp_classifier(activation=",".join(NAMES), **sizes)
    alone = [mlp_classifier(activation=name, **sizes) for name in NAMES]

    def found(task, instance, key):
        params = task.init(instance, key)
        batch = task.batch(instance, key, "train")
        value = jax.value_and_grad(task.loss)(params, instance, batch, key)
        return params, value, task.score(params, instance, "validation")

    @jax.jit
    @jax.vmap
    def population(key):
        instance = drawn.sample(key)
        return instance, found(drawn, instance, key), [found(task, (), key) for task in alone]

    instances, ours, theirs = population(jax.random.split(jax.random.key(0), 60))
    # Each is drawn 20 times, give or take 3.7.
    counts = np.bincount(instances, minlength=3)
    assert np.abs(counts - 20).max() < 3.5 * 3.7
    for run, index in enumerate(instances):
        for a, b in zip(*map(jax.tree.leaves, (ours, theirs[index])), strict=True):
            np.testing.assert_allclose(a[run], b[run], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("given", ["", "rulu", "relu,", "relu,relu", "relu, tanh", "relu,rulu"])
def test_activations_are_checked(given):
    with pytest.raises(ValueError, match=r"`activation` must be one of .* several different ones"):
        mlp_classifier(activation=given)
