"""MLPs of which an instance draws the activation, the data set, the noise or the scale."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tasks import mlp_classifier

NAMES = ("relu", "tanh", "gelu")
SIZES = {"hidden_sizes": (6, 5), "batch_size": 4}
# What can be drawn: the argument, its options, and the same one by one.
DRAWN = {
    "activation": (",".join(NAMES), NAMES),
    "dataset": ("digits,textures_8", ("digits", "textures_8")),
    "label_noise": ((0.0, 0.5), ((0.0,), (0.5,))),
    "init_scale": ((0.5, 2.0), ((0.5,), (2.0,))),
}


@pytest.mark.parametrize("option", DRAWN)
def test_an_instance_is_the_task_of_its_option(option):
    """In one population: start, loss, scores and constant, of each the right one."""
    several, single = DRAWN[option]
    drawn = mlp_classifier(**SIZES | {option: several})
    alone = [mlp_classifier(**SIZES | {option: value}) for value in single]
    # Batches without label noise draw less; with it, as the population does.
    same_batches = option != "label_noise"

    def found(task, instance, key):
        params = task.init(instance, key)
        batch = (task if same_batches else drawn).batch(instance, key, "train")
        value = task.loss(params, instance, batch, key)
        return params, value, task.score(params, instance, "train"), task.constant_loss(instance)

    @jax.jit
    @jax.vmap
    def population(key):
        instance = drawn.sample(key)
        theirs = [found(task, instance if not same_batches else (), key) for task in alone]
        return instance, found(drawn, instance, key), theirs

    instances, ours, theirs = population(jax.random.split(jax.random.key(0), 60))
    # Each is drawn equally often, give or take four standard errors.
    counts = np.bincount(instances[option], minlength=len(single))
    assert np.abs(counts - 60 / len(single)).max() < 3.7 * 4
    for run, index in enumerate(instances[option]):
        for a, b in zip(*map(jax.tree.leaves, (ours, theirs[index])), strict=True):
            np.testing.assert_allclose(a[run], b[run], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("loss", ["cross_entropy", "mse"])
def test_label_noise(loss):
    """So many labels are replaced, in training alone; score and constant know what to expect."""
    share = 0.4
    task = mlp_classifier(
        hidden_sizes=(8,), label_noise=(share,), batch_size=1000, loss=loss, init_scale=(3.0,)
    )
    clean = mlp_classifier(hidden_sizes=(8,), batch_size=1000, loss=loss, init_scale=(3.0,))
    key = jax.random.key(1)
    params = task.init((), key)

    @jax.jit
    def draw(key):
        images, labels = task.batch((), key, "train")
        right = jnp.max(task.batch((), key, "test")[1]) == jnp.max(clean.batch((), key, "test")[1])
        return images, labels, task.loss(params, (), (images, labels), key), right

    images, labels, losses, right = jax.lax.map(draw, jax.random.split(key, 30))
    # What the labels of these images are.
    table = {
        image.tobytes(): int(label)
        for image, label in zip(*map(np.asarray, clean.batch((), key, "train")), strict=True)
    }
    pairs = zip(np.asarray(images).reshape(-1, 64), np.ravel(labels), strict=True)
    changed = [table[i.tobytes()] != label for i, label in pairs if i.tobytes() in table]
    assert len(changed) > 5000
    # Of ten classes, one replacement in ten is by the same.
    np.testing.assert_allclose(np.mean(changed), 0.9 * share, atol=0.03)
    assert np.all(right)
    error = 4 * np.std(losses) / 30**0.5
    np.testing.assert_allclose(task.score(params, (), "train")["loss"], np.mean(losses), atol=error)
    a, b = (x.score(params, (), "test")["loss"] for x in (task, clean))
    np.testing.assert_allclose(a, b, rtol=1e-6)
    shares = np.bincount(np.ravel(labels)) / labels.size
    expected = {"cross_entropy": -np.sum(shares * np.log(shares)), "mse": 1 - np.sum(shares**2)}
    np.testing.assert_allclose(task.constant_loss(()), expected[loss], rtol=2e-3)


def test_layer_norm():
    """Outputs do not depend on the scale of the first weights; gains count."""
    task = mlp_classifier(hidden_sizes=(7,), normalization="layer", batch_size=8)
    key = jax.random.key(0)
    params = task.init((), key)
    batch = task.batch((), key, "train")
    assert [sorted(layer) for layer in params] == [["b", "g", "w"], ["b", "w"]]
    larger = (params[0] | {"w": 7 * params[0]["w"]}, params[1])
    gained = (params[0] | {"g": 7 * params[0]["g"]}, params[1])
    losses = [task.loss(p, (), batch, key) for p in (params, larger, gained)]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-3)
    assert abs(losses[2] - losses[0]) > 0.1


@pytest.mark.parametrize("given", ["", "rulu", "relu,", "relu,relu", "relu, tanh", "relu,rulu"])
def test_activations_are_checked(given):
    with pytest.raises(ValueError, match=r"`activation` must be one of .* several different ones"):
        mlp_classifier(activation=given)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"loss": "hinge"}, "`loss` must be one of cross_entropy, mse, got 'hinge'"),
        ({"normalization": "batch"}, "`normalization` must be one of none, layer"),
        (
            {"label_noise": (0.1, 1.5)},
            r"`label_noise` must be finite numbers from 0 to 1 .* got .*1\.5",
        ),
        ({"init_scale": (0.0,)}, r"`init_scale` must be finite numbers above 0"),
        ({"batch_size": 0}, "`batch_size` must be a whole number of at least 1, got 0"),
        ({"hidden_sizes": (3, 0)}, r"`hidden_sizes` must be whole numbers .* got \(3, 0\)"),
        ({"dataset": "diabetes", "label_noise": (0.1,)}, "`label_noise` must be 0 where targets"),
    ],
)
def test_arguments_are_checked(arguments, message):
    with pytest.raises(ValueError, match=message):
        mlp_classifier(**arguments)
