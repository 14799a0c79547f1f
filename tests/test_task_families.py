"""What single families of tasks promise beyond the contract."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from launch import choices
from launch import config as cfg
from tasks import (
    BatchFraction,
    ConvNet,
    Hyperparameters,
    Linear,
    RecurrentLM,
    Reparametrized,
    ResNet,
    TransformerLM,
    VariationalAutoencoder,
    VisionTransformer,
    mlp_classifier,
    quadratic_family,
    toy,
)
from tasks.hyperparameters import adam_rule, sgdm_rule
from tasks.initializers import orthogonal
from tasks.layers import Convolution
from tasks.toys import FUNCTIONS

KEY = jax.random.key(0)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("side", [7, 8])
def test_a_convolution_is_xlas(stride, side):
    layer = Convolution(5, stride)
    x = jax.random.normal(KEY, (2, side, side, 3))
    params = layer.init(KEY, x)
    kernel = params["params"]["Dense_0"]["kernel"].reshape(3, 3, 3, 5)
    expected = jax.lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        ((1, 1), (1, 1)),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    np.testing.assert_allclose(layer.apply(params, x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("config", [RecurrentLM(length=5), TransformerLM(length=5)])
def test_language_models_do_not_see_the_future(config):
    module = config.module()
    x = jax.nn.one_hot(jnp.array([[3, 1, 4, 1, 5]]), 96)
    params = jax.jit(module.init)(KEY, x)
    apply = jax.jit(module.apply)
    base = apply(params, x)
    changed = apply(params, x.at[0, 3].set(jax.nn.one_hot(9, 96)))
    np.testing.assert_allclose(base[:, :3], changed[:, :3], atol=1e-6)
    assert np.abs(base[:, 3:] - changed[:, 3:]).max(axis=-1).min() > 1e-3


def test_a_reparametrized_task_is_the_task_in_other_units():
    base = mlp_classifier(hidden_sizes=(6,), batch_size=4)
    for kind in ("tensor", "global"):
        config = Reparametrized(cfg.task("mlp", hidden_sizes=(6,), batch_size=4), kind, 0.6, 1.0)
        task = config.make()

        @jax.vmap
        def both(key, task=task):
            instance = task.sample(key)
            params = task.init(instance, key)
            own = base.init(instance["base"], key)
            batch = task.batch(instance, key, "train")
            found = [
                jax.value_and_grad(t.loss)(p, i, batch, key)
                for t, p, i in ((task, params, instance), (base, own, instance["base"]))
            ]
            score = task.score(params, instance, "test")
            scores = score, base.score(own, instance["base"], "test")
            ratios = jax.tree.map(lambda p, o: optax.tree.norm(o) / optax.tree.norm(p), params, own)
            return found, scores, ratios, instance["log_scales"]

        found, scores, ratios, logs = jax.jit(both)(jax.random.split(KEY, 100))
        np.testing.assert_allclose(found[0][0], found[1][0], rtol=1e-4)
        np.testing.assert_allclose(*(x["loss"] for x in scores), rtol=1e-4)
        used = np.any(logs != 0, axis=1)
        assert abs(used.mean() - 0.6) < 0.2
        scales = np.exp(logs)
        for layer, names in enumerate((("b", "w"), ("b", "w"))):
            for i, name in enumerate(names):
                scale = scales[:, 2 * layer + i]
                if name == "w":
                    np.testing.assert_allclose(ratios[layer][name], scale, rtol=1e-4)
                slope = found[1][1][layer][name]
                expected = slope * scale.reshape(-1, *[1] * (slope.ndim - 1))
                np.testing.assert_allclose(found[0][1][layer][name], expected, rtol=1e-3, atol=1e-6)
        assert logs.min() < -0.8 and logs.max() > 0.8 and np.abs(logs).max() <= 1
        different = np.ptp(logs[used], axis=1)
        assert np.all(different > 0) if kind == "tensor" else np.all(different == 0)


def test_a_fraction_of_a_batch_is_a_smaller_batch():
    task = BatchFraction(Linear(batch_size=8), (1.0, 0.25)).make()
    seen = set()
    for key in jax.random.split(KEY, 6):
        instance = task.sample(key)
        batch = task.batch(instance, key, "train")
        number = int(instance["examples"])
        seen.add(number)
        assert len({row.tobytes() for row in np.asarray(batch[0])}) == number
        whole = Linear(batch_size=8).make().batch((), key, "train")
        params = task.init(instance, key)
        smaller = jax.tree.map(lambda x, n=number: x[:n], whole)
        losses = [task.loss(params, instance, b, key) for b in (batch, smaller)]
        np.testing.assert_allclose(*losses, rtol=1e-5)
        assert len({row.tobytes() for row in np.asarray(task.batch(instance, key, "test")[0])}) > 5
    assert seen == {8, 2}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: BatchFraction(cfg.task("quadratic")).make(),
            "`base` must be a task whose batches",
        ),
        (lambda: BatchFraction(Linear(batch_size=6)).make(), "`fractions` of the batch size, 6"),
        # A batch of eight numbers, which are no examples.
        (
            lambda: BatchFraction(cfg.task("quadratic", dim=8, batch_size=8)).make(),
            "`base` must be a task whose batches are `batch_size` examples",
        ),
        (
            lambda: cfg.task("quadratic", noise=1e38).make(),
            "`noise` must be a finite number from 0 to",
        ),
        (lambda: toy(noise=1e38), "`noise` must be a finite number from 0 to"),
        (
            lambda: Linear(init_scale=(1e38,)).make(),
            "`init_scale` must be finite numbers above 0 and at most 1000",
        ),
        (lambda: mlp_classifier(dataset="prose"), "got the text 'prose'; texts are for language"),
        (lambda: mlp_classifier(dataset="../x"), "`dataset` must be the name of a data set"),
        (lambda: Reparametrized(kind="row"), "`kind` must be one of tensor, global, got 'row'"),
        (
            lambda: Reparametrized(spread=-1.0),
            "`spread` must be a finite number from 0 to 20, got -1.0",
        ),
        (lambda: ConvNet(channels=(6,), normalization="group"), "multiples of 4 for group norm"),
        (lambda: ConvNet(normalization="batch"), "`normalization` must be one of none, layer, gr"),
        (lambda: ResNet(channels=()), "`channels` must be of one stage or more"),
        (lambda: ResNet(blocks=0), "`blocks` must be a whole number of at least 1, got 0"),
        (lambda: ConvNet(dataset="wine").make(), "`dataset` must be of images, got 'wine'"),
        (lambda: VisionTransformer(width=6, heads=4), "`heads` must divide width=6, got 4"),
        (lambda: VisionTransformer(patch=3).make(), "`patch` must divide the image, 8x8 for"),
        (lambda: TransformerLM(width=6, heads=4), "`heads` must divide width=6, got 4"),
        (lambda: RecurrentLM(cell="elman"), "`cell` must be one of gru, lstm, got 'elman'"),
        (lambda: RecurrentLM(length=10**6).make(), "`length` must be below"),
        (lambda: Hyperparameters(optimizer="lion"), "`optimizer` must be one of sgdm, adam"),
        (lambda: toy(function="ackley"), "`function` must be one of rosenbrock,"),
        (lambda: toy(dim=1), "`dim` must be a whole number of at least 2, got 1"),
    ],
)
def test_arguments_are_checked(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_the_variational_bound():
    """With a decoder that says 1/2 everywhere: ln 2 a pixel, and the divergence of two normals."""
    task = VariationalAutoencoder(hidden_sizes=(), latents=2, batch_size=8).make()
    zeros = jax.tree.map(jnp.zeros_like, task.init((), KEY))
    mean, log_deviation = jnp.array([0.5, -1.0]), jnp.array([0.3, -0.2])
    params = zeros | {
        "encoder": {
            "Dense_0": zeros["encoder"]["Dense_0"]
            | {"bias": jnp.concatenate([mean, log_deviation])}
        }
    }
    variance = np.exp(2 * log_deviation)
    divergence = np.sum(mean**2 + variance - 1 - np.log(variance)) / 2
    for split in ("train", "test"):
        found = task.score(params, (), split)["loss"]
        np.testing.assert_allclose(found, np.log(2) + divergence / 64, rtol=1e-5)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_toys_have_the_minimum_they_say(name):
    minimum = {
        "rosenbrock": jnp.ones(5),
        "dixon_price": jnp.cumprod(jnp.full(5, 2.0)) ** -1 * 2,
        "styblinski_tang": jnp.full(5, -2.903534),
    }[name]
    if name == "dixon_price":  # x_i = 2^-((2^i - 2) / 2^i).
        i = jnp.arange(1, 6)
        minimum = 2.0 ** (-(2.0**i - 2) / 2.0**i)
    function = FUNCTIONS[name]
    np.testing.assert_allclose(function(minimum), 0, atol=1e-4)
    assert np.abs(jax.grad(function)(minimum)).max() < 1e-2
    around = minimum + 0.1 * jax.random.normal(KEY, (50, 5))
    assert jnp.all(jax.vmap(function)(around) > function(minimum))


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        (sgdm_rule, lambda: optax.sgd(0.01, 0.9)),
        (adam_rule, lambda: optax.adam(0.001, b2=0.99)),
    ],
)
def test_rules_are_optaxs(rule, expected):
    ours, theirs = rule(10), expected()
    theta, weights = ours.init(KEY), {"w": jnp.array([1.0, -2.0]), "b": jnp.zeros(())}
    a, state, moments = weights, ours.start(weights), theirs.init(weights)
    b = weights
    for step in range(6):
        grads = jax.tree.map(lambda w, s=step: jnp.sin(3 * w + s), a)
        moves, state = ours.update(theta, state, grads, jnp.int32(step))
        updates, moments = theirs.update(grads, moments)
        a, b = optax.apply_updates(a, moves), optax.apply_updates(b, updates)
        for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-4)


def test_training_as_a_task_is_training():
    """The loss is the mean over steps of real runs; at rates of 0, the constant predictor's."""
    base = Linear(batch_size=4)
    config = Hyperparameters(base, "sgdm", steps=3, batch_size=2)
    task, inner = config.make(), base.make()
    theta = task.init((), KEY)
    runs = task.batch((), KEY, "train")
    losses = []
    for run in range(2):
        own, weights, batches = jax.tree.map(lambda x, r=run: x[r], runs)
        velocity = jax.tree.map(jnp.zeros_like, weights)
        for step in range(3):
            batch, following = (
                jax.tree.map(lambda x, s=s: x[s], batches) for s in (step, step + 1)
            )
            grads = jax.grad(inner.loss)(weights, own, batch, KEY)
            velocity = jax.tree.map(lambda v, g: 0.9 * v - 0.01 * g, velocity, grads)
            weights = optax.apply_updates(weights, velocity)
            losses.append(inner.loss(weights, own, following, KEY))
    np.testing.assert_allclose(task.loss(theta, (), runs, KEY), np.mean(losses), rtol=1e-4)

    still = theta | {"log_rates": jnp.full(3, -50.0)}
    keys = jax.random.split(jax.random.key(5), 100)
    found = jax.jit(jax.vmap(lambda k: task.loss(still, (), task.batch((), k, "train"), k)))(keys)
    error = 4 * np.std(found) * (1 / 100 + 1 / 128) ** 0.5
    np.testing.assert_allclose(task.constant_loss(()), np.mean(found), atol=error)
    # It is of the very runs that are scored.
    score = jax.jit(lambda theta: task.score(theta, (), "train")["loss"])(still)
    np.testing.assert_allclose(task.constant_loss(()), score, rtol=1e-5)


def test_a_single_dimension_has_curvature_one():
    task = cfg.task("quadratic", dim=1, condition=100.0).make()
    np.testing.assert_allclose(task.sample(KEY)["hessian"], [[1.0]], rtol=1e-6)


def test_quadratics_and_toys_start_where_they_say():
    for task in (quadratic_family(dim=3), toy(dim=3, noise=0.5)):
        instance = task.sample(KEY)
        params = task.init(instance, KEY)
        found = task.score(params, instance, "train")["loss"]
        np.testing.assert_allclose(task.constant_loss(instance), found, rtol=1e-5)


def test_wrapped_tasks_are_written_in_words_and_files():
    words = ["task=reparametrized", "task.base=mlp", "task.base.dataset=wine,", "task.spread=2"]
    words[2] = "task.base.dataset=wine"
    node, _ = choices.take_words([f"--cfg.{word}" for word in words], "cfg")
    config = choices.apply_words(cfg.Config(), node, "cfg")
    assert config.task == cfg.task(
        "reparametrized", base=cfg.task("mlp", dataset="wine"), spread=2.0
    )
    assert config.task.unwrapped == cfg.task("mlp", dataset="wine")
    assert cfg.read_config(choices.to_dict(config)) == config
    assert dataclasses.replace(config.task, spread=1.0) != config.task


@pytest.mark.parametrize("shape", [(16, 16), (7, 3), (3, 7), (1, 1)])
def test_orthogonal_weights_are_those_of_jax(shape):
    """Where the factors are unique, so are two ways of finding them."""
    key = jax.random.key(3)
    ours = orthogonal(key, shape)
    np.testing.assert_allclose(
        ours, jax.nn.initializers.orthogonal()(key, shape, jnp.float32), atol=2e-6
    )
    inner = ours.T @ ours if shape[0] >= shape[1] else ours @ ours.T
    np.testing.assert_allclose(inner, np.eye(min(shape)), atol=2e-6)


def test_orthogonal_weights_are_double_where_floats_are(x64):
    ours = orthogonal(jax.random.key(3), (9, 9))
    assert ours.dtype == jnp.float64
    np.testing.assert_allclose(ours, jax.random.orthogonal(jax.random.key(3), 9), atol=1e-14)
    assert orthogonal(jax.random.key(3), (9, 9), jnp.float32).dtype == jnp.float32
