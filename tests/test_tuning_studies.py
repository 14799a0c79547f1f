"""Parts of the tuning studies against plain NumPy: the masked network, the draws, the measure."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from launch.studies.pes import lr_schedule, many_hyperparameters
from launch.studies.shared.compare import descend, held_out_losses, in_parallel
from learned_opt import learnable_sgdm
from meta_train import estimators as est
from meta_train.inner import inner_training
from meta_train.unroll import UnrolledSystem
from tasks import mlp_classifier, quadratic_family
from tasks.data import load_images


def test_masked_units_are_off():
    """The loss is that of the network with pre-activations zeroed, and so is its gradient."""
    sizes = (6, 4, 5)
    task = mlp_classifier(load_images("digits"), hidden_sizes=sizes, batch_size=8)
    params = task.init((), jax.random.key(0))
    params = jax.tree.map(lambda p: p + 0.1, params)  # Biases too.
    shares = [0.5, 0.99, 0.19]
    on = [3, 3, 0]
    batch = task.batch((), jax.random.key(1), "train")

    def expected(params):
        x = batch[0].reshape(8, -1)
        for layer, count in zip(params[:-1], on, strict=True):
            x = x @ layer["w"] + layer["b"]
            x = jax.nn.relu(jnp.concatenate([x[:, :count], jnp.zeros_like(x[:, count:])], axis=1))
        logits = x @ params[-1]["w"] + params[-1]["b"]
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]))

    masked = many_hyperparameters.masked(task, jnp.array(shares))
    ours = jax.value_and_grad(lambda p: masked.loss(p, (), batch, jax.random.key(2)))(params)
    for a, b in zip(
        *map(jax.tree.leaves, (ours, jax.value_and_grad(expected)(params))), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_twenty_nine_hyperparameters_within_their_ranges():
    assert many_hyperparameters.NUM_HYPERPARAMETERS == 29
    for ranges in (many_hyperparameters.START, many_hyperparameters.SEARCH):
        keys = jax.random.split(jax.random.key(0), 500)
        theta = np.asarray(
            jax.vmap(lambda k, r=ranges: many_hyperparameters.draw_theta(r, k))(keys)
        )
        assert theta.shape == (500, 29)
        values = (
            np.exp(theta[:, :12]),
            *(1 / (1 + np.exp(-x)) for x in (theta[:, 12:24], theta[:, 24:])),
        )
        for value, (low, high) in zip(values, ranges, strict=True):
            assert value.min() >= low * 0.999 and value.max() <= high * 1.001
            assert value.min() < 2 * low and value.max() > 0.8 * high


def test_every_group_of_the_29_matters():
    system = many_hyperparameters.inner_system(None)
    theta = many_hyperparameters.draw_theta(many_hyperparameters.START, jax.random.key(0))
    theta = theta.at[:12].set(jnp.log(0.1))  # Fast enough to see in ten steps.
    places = {"a rate": 3, "a momentum": 12 + 3, "a share": 24 + 1}
    others = {name: theta.at[place].add(-3.0) for name, place in places.items()}
    losses = held_out_losses(system, {"as drawn": theta} | others, 10, 1)
    assert np.isfinite(losses["as drawn"]) and len({float(x) for x in losses.values()}) == 4


def test_schedule_system_is_inner_training_with_the_schedule():
    """The first parameter is the log of the first rate, the second that of the exponent."""
    task = mlp_classifier(load_images("digits"), hidden_sizes=(16, 16), batch_size=16)
    rate, decay, num_steps = 0.2, 3.0, 12
    system = lr_schedule.inner_system(None)
    theta, key = jnp.log(jnp.array([rate, decay])), jax.random.key(0)
    state = system.init(theta, key, num_steps)
    params, velocity = state.params, jax.tree.map(jnp.zeros_like, state.params)
    for step in range(num_steps):
        key_step = jax.random.fold_in(key, step)
        keys = jax.random.split(key_step, 4)
        batch = task.batch((), keys[0], "train")
        grads = jax.grad(task.loss)(params, (), batch, keys[1])
        velocity = jax.tree.map(lambda v, g: 0.9 * v + g, velocity, grads)
        now = rate / (1 + step / num_steps) ** decay
        params = jax.tree.map(lambda p, v, now=now: p - now * v, params, velocity)
        state, loss = system.step(theta, state, key_step)
        fresh = task.loss(params, (), task.batch((), keys[2], "train"), keys[3])
        np.testing.assert_allclose(loss, fresh, rtol=1e-3)


def counting_system():
    """The loss of step ``t`` is ``theta * t``, of every run."""
    return UnrolledSystem(
        lambda theta, key, horizon: jnp.zeros([]),
        lambda theta, state, key: (state + 1, theta[0] * state),
    )


def test_held_out_losses_keep_names_and_shapes():
    thetas = {"a": np.arange(6.0).reshape(2, 3, 1), "b": np.array([10.0])}
    losses = held_out_losses(counting_system(), thetas, num_steps=5, num_runs=3, chunk=4)
    np.testing.assert_allclose(losses["a"], 2 * np.arange(6.0).reshape(2, 3), rtol=1e-6)
    np.testing.assert_allclose(losses["b"], 20.0, rtol=1e-6)


def test_descents_may_start_elsewhere():
    system = inner_training(quadratic_family(dim=3, condition=10.0, noise=0.0), learnable_sgdm())
    theta = learnable_sgdm().init(jax.random.key(0))
    estimator = est.pes(system, num_pairs=2, truncation=2, horizons=est.fixed_horizon(4), sigma=0.1)

    def start(key):
        return jax.tree.map(lambda t: t + jax.random.normal(key), theta)

    shared = {"num_steps": 2, "num_records": 1, "num_seeds": 3}
    _, thetas = descend("a", estimator, start, optax.sgd(0.1), **shared)
    rates = thetas["params"]["log_learning_rate"]
    assert rates.shape == (3, 2) and len(set(rates[:, 0].tolist())) == 3
    _, thetas = descend("b", estimator, theta, optax.sgd(0.1), **shared)
    assert len(set(thetas["params"]["log_learning_rate"][:, 0].tolist())) == 1


def test_parallel_jobs_keep_their_names_and_errors():
    assert in_parallel({"a": lambda: 1, "b": lambda: 2}) == {"a": 1, "b": 2}
    with pytest.raises(ZeroDivisionError):
        in_parallel({"a": lambda: 1 / 0})
