"""The contract of every task."""

import dataclasses
import functools
import inspect
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import tasks
from launch import config as cfg
from tasks import SPLITS, Task, TaskMixture
from tests.contracts.wrong_values import check_arguments, check_refused
from tests.systems import leaves_equal

TASKS = sorted(tasks.TASKS)
RUNS, ADAM_STEPS = 3, 30
# What their scores are means over is drawn, not a whole split.
SAMPLED = ("hyperparameters", "learned_optimizer", "rnn_lm", "transformer_lm", "vae")


# Sizes at which the larger families compile and run faster.
SMALL = {
    "hyperparameters": {"steps": 4, "batch_size": 4},
    "learned_optimizer": {"steps": 4, "batch_size": 4},
    "resnet": {"channels": (8,)},
    "rnn_lm": {"hidden_size": 16, "length": 6},
    "transformer_lm": {"length": 6},
}


@functools.cache
def make_task(name):
    config = cfg.task(name)
    fields = {field.name for field in dataclasses.fields(config)}
    sizes = {"batch_size": 16} if "batch_size" in fields else {}
    return dataclasses.replace(config, **sizes | SMALL.get(name, {})).make()


# Factorizations by LAPACK, as JAX calls them.
LAPACK = r"\b(geqrf|geqp3|householder_product|qr|cholesky|lu|eigh?|svd|schur|hessenberg)\["


@pytest.mark.parametrize("name", TASKS)
def test_no_factorization_by_lapack(name):
    """In jaxlib 0.10 a population of them may hang for ever: see ``initializers.orthogonal``."""
    task = make_task(name)

    def everything(key):
        instance = task.sample(key)
        params = task.init(instance, key)
        batches = [task.batch(instance, key, split) for split in SPLITS]
        scores = task.score(params, instance, "test") if task.score else {}
        return jax.grad(task.loss)(params, instance, batches[0], key), batches, scores

    assert not re.findall(LAPACK, str(jax.make_jaxpr(everything)(jax.random.key(0))))


@pytest.mark.parametrize("name", TASKS)
def test_an_unknown_split_is_refused(name):
    task = make_task(name)

    def drawn(key, split):
        instance = task.sample(key)
        return task.batch(instance, key, split)

    def scored(key, split):
        instance = task.sample(key)
        return task.score(task.init(instance, key), instance, split)

    for function in (drawn, scored):
        for wrong in ("tset", None, 0):
            with pytest.raises(ValueError, match="`split` must be one of train, validation, test"):
                jax.eval_shape(functools.partial(function, split=wrong), jax.random.key(0))


def by_split(function):
    return {split: function(split) for split in SPLITS}


def stacked(*trees):
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


@functools.cache
def run_of(name):
    """A few runs of a task as one population, in one small program: what tests look at."""
    task = make_task(name)
    adam = optax.adam(0.02)

    def run(key):
        instance = task.sample(key)
        params = task.init(instance, key)
        batches = by_split(lambda split: task.batch(instance, key, split))
        # Off kinks and symmetries of the start.
        moved = jax.tree.map(lambda p: p + 0.1, params)

        def step(state, key_loss):
            params, moments = state
            loss, grads = jax.value_and_grad(task.loss)(
                params, instance, task.batch(instance, key_loss, "train"), key
            )
            updates, moments = adam.update(grads, moments)
            return (optax.apply_updates(params, updates), moments), (loss, grads)

        def train(start):
            # The first step has the batch of the others' key.
            keys = jnp.concatenate([key[None], jax.random.split(key, ADAM_STEPS - 1)])
            (trained, _), (curve, grads) = jax.lax.scan(step, (start, adam.init(start)), keys)
            return trained, curve, one(grads)

        trained, curves, grads = jax.lax.map(train, stacked(params, moved))

        # The gradient is that of the loss (central difference).
        slope = one(grads, 1)
        # Smaller steps cross fewer kinks; Flax's networks are in single precision in any case.
        h = 1e-6 if all(g.dtype == jnp.float64 for g in jax.tree.leaves(slope)) else 1e-2
        h /= jnp.maximum(1, optax.tree.norm(slope))
        ends = [optax.tree.add_scale(moved, sign * h, slope) for sign in (1, -1)]
        train_batch = batches["train"]
        losses = jax.lax.map(
            lambda pair: task.loss(pair[0], instance, pair[1], key),
            (stacked(*[params] * 3, *ends), stacked(*batches.values(), train_batch, train_batch)),
        )
        before = jax.tree.map(lambda t, p: jnp.concatenate([t, p[None]]), trained, params)
        train_scores = jax.lax.map(lambda p: task.score(p, instance, "train"), before)
        return {
            "instance": instance,
            "params": params,
            "batches": batches,
            "losses": losses[:3],
            "grads": one(grads),
            "slopes": (optax.tree.norm(slope) ** 2, (losses[3] - losses[4]) / (2 * h)),
            "scores": {"train": one(train_scores, -1)}
            | {"test": task.score(params, instance, "test")},
            "after": one(train_scores),
            "constant": task.constant_loss(instance),
            "curve": one(curves),
        }

    return task, jax.device_get(jax.jit(jax.vmap(run))(jax.random.split(jax.random.key(0), RUNS)))


def one(tree, index=0):
    return jax.tree.map(lambda x: x[index], tree)


@pytest.mark.parametrize("name", TASKS)
def test_task(name):
    task, run = run_of(name)
    assert all(jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in jax.tree.leaves(run["params"]))
    assert run["losses"].shape == (RUNS, 3)
    for leaf in jax.tree.leaves((run["losses"], run["grads"], run["curve"])):
        assert np.all(np.isfinite(leaf))
    squared, slope = run["slopes"]
    np.testing.assert_allclose(slope, squared, rtol=2e-2)
    assert np.all(squared > 0)

    # Equal keys give equal batches, under `jit` and without, and other keys others.
    instance, keys = one(run["instance"]), jax.random.split(jax.random.key(0), RUNS)
    for split in SPLITS:
        alone = task.batch(instance, keys[0], split)
        for a, b in zip(*map(jax.tree.leaves, (alone, one(run["batches"][split]))), strict=True):
            assert a.shape == b.shape and a.dtype == b.dtype
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    assert not leaves_equal(one(run["batches"]["train"]), one(run["batches"]["train"], 1))


def the_mixture(**values):
    return TaskMixture(**{"tasks": (tasks.Linear(), tasks.Linear())} | values)


CONSTRUCTORS = tasks.TASKS | {"mixture": the_mixture}


@pytest.mark.parametrize("name", sorted(CONSTRUCTORS))
def test_wrong_arguments_are_refused(name):
    """Every argument, at values that its annotation does not allow: in one sentence, by name."""
    annotated = TaskMixture if name == "mixture" else CONSTRUCTORS[name]
    # The folder is read where the data of TFDS are, alone.
    check_arguments(CONSTRUCTORS[name], annotated, unchecked=("data_dir",))


@pytest.mark.parametrize("name", TASKS)
def test_unknown_names_are_refused(name):
    """By every argument that is one of several names (or several of them, with commas between)."""
    for argument, parameter in inspect.signature(CONSTRUCTORS[name]).parameters.items():
        if isinstance(parameter.default, str) and argument != "dataset":
            for wrong in ("no such", "", ",", f"{parameter.default},", "a,a"):
                check_refused(CONSTRUCTORS[name], argument, wrong)


@pytest.mark.parametrize("name", TASKS)
def test_a_task_can_be_learned(name):
    """By Adam, in a few steps, at one rate for all tasks."""
    _, run = run_of(name)
    assert np.mean(run["after"]["loss"]) < 0.98 * np.mean(run["scores"]["train"]["loss"])


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
    task, run = run_of(name)
    assert task.unit.strip() and task.unit != Task._field_defaults["unit"]
    instance, params = one(run["instance"]), one(run["params"])
    size = sum(leaf.size for leaf in jax.tree.leaves(one(run["batches"]["train"])))
    number = int(np.clip(3e5 // size, 64, 1000))

    @jax.jit
    def losses_of(keys):
        def loss(key):
            key_batch, key_loss = jax.random.split(key)
            batches = [task.batch(instance, key_batch, split) for split in ("train", "test")]
            return jax.lax.map(
                lambda batch: task.loss(params, instance, batch, key_loss), stacked(*batches)
            )

        return jax.lax.map(loss, keys, batch_size=16)

    losses = losses_of(jax.random.split(jax.random.key(1), number))
    for i, split in enumerate(("train", "test")):
        scores = one(run["scores"][split])
        assert all(x.shape == () and np.isfinite(x) for x in scores.values())
        assert set(scores) == {"loss", *task.score_units}
        # The mean over batches of the split, within the noise of many batches.
        error = np.std(losses[:, i]) / min(number, 32 if name in SAMPLED else number) ** 0.5
        tolerance = {"rtol": 1e-5, "atol": 4 * error + 1e-6}
        np.testing.assert_allclose(scores["loss"], np.mean(losses[:, i]), **tolerance)


def knowing_nothing(task, batches):
    """The loss of the best constant, from what batches show; None where nothing is predicted."""
    if "per example" in task.unit and isinstance(batches, tuple) and len(batches) == 2:
        targets = np.ravel(batches[1])
        if task.unit.startswith("squared"):
            return np.var(targets)
        return entropy(np.bincount(targets))
    if task.unit == "nats per character":
        return entropy(np.bincount(np.ravel(batches)))
    if "per pixel" in task.unit:
        images = np.float64(batches).reshape(-1, np.prod(batches.shape[2:]))
        if task.unit.startswith("squared"):
            return np.mean((images - images.mean(axis=0)) ** 2)
        shares = np.stack([images.mean(axis=0), 1 - images.mean(axis=0)])
        return np.mean([entropy(pixel) for pixel in shares.T])
    return None


def entropy(weights):
    shares = weights[weights > 0] / np.sum(weights)
    return -np.sum(shares * np.log(shares))


@pytest.mark.parametrize("name", TASKS)
def test_the_constant_predictors_loss_is_what_batches_show(name):
    task, run = run_of(name)
    instance = one(run["instance"])
    number = 500 if name not in ("hyperparameters", "learned_optimizer") else 16
    keys = jax.random.split(jax.random.key(2), number)

    @jax.jit
    def draw(keys):
        return jax.lax.map(lambda key: task.batch(instance, key, "train"), keys)

    batches = jax.device_get(draw(keys))
    expected = knowing_nothing(task, batches)
    if expected is not None:
        np.testing.assert_allclose(one(run["constant"]), expected, rtol=0.02)
    else:  # The loss of the start, or near it: rules start at small steps.
        start = run["scores"]["train"]["loss"]
        tolerance = 0.9 if name in ("hyperparameters", "learned_optimizer") else 1e-4
        np.testing.assert_allclose(start, run["constant"], rtol=tolerance)
