"""Inner training as an unrolled system: what the optimizer and the losses know of the horizon."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from learned_opt import LearnedOptimizer, learnable_schedule
from meta_train.inner import inner_training
from meta_train.unroll import unroll
from tasks import quadratic_family

OPTIMIZER = learnable_schedule(0.1, 3.0, momentum=0.5)  # rate / (1 + t / T)^decay
TASK = quadratic_family(dim=3, condition=10.0, noise=0.0)


def test_schedules_run_over_the_horizon_of_the_episode():
    """The steps of a run of 5, by hand, whatever the longest run may be."""
    theta = OPTIMIZER.init(jax.random.key(0))
    system = inner_training(TASK, OPTIMIZER)
    state = system.init(theta, jax.random.key(1), 5)
    params, instance = state.params, state.instance
    _, losses = unroll(system, theta, state, jax.random.key(2), 5)
    velocity = jnp.zeros_like(params)
    for t in range(5):
        batch = TASK.batch(instance, jax.random.key(3), "train")
        value, grad = jax.value_and_grad(TASK.loss)(params, instance, batch, jax.random.key(3))
        np.testing.assert_allclose(losses[t], value, rtol=1e-5)
        velocity = 0.5 * velocity + grad
        params = params - 0.1 / (1 + t / 5) ** 3.0 * velocity


def test_the_last_loss_is_that_of_the_episode():
    theta = OPTIMIZER.init(jax.random.key(0))
    every, last = (inner_training(TASK, OPTIMIZER, reduction=r) for r in ("mean", "last"))
    for horizon in (3, 7):
        losses, ends = (
            unroll(s, theta, s.init(theta, jax.random.key(1), horizon), jax.random.key(2), 7)[1]
            for s in (every, last)
        )
        expected = np.zeros(7)
        expected[horizon - 1] = horizon * losses[horizon - 1]
        np.testing.assert_allclose(ends, expected, rtol=1e-6)


@pytest.mark.parametrize("horizon", [0, -1, 2.5, 2**31, True])
def test_a_wrong_horizon_is_refused(horizon):
    theta = OPTIMIZER.init(jax.random.key(0))
    with pytest.raises(ValueError, match="`horizon` must be a whole number"):
        inner_training(TASK, OPTIMIZER).init(theta, jax.random.key(1), horizon)
    with pytest.raises(ValueError, match="`horizon` must be a whole number"):
        inner_training(TASK, OPTIMIZER).init(theta, jax.random.key(1), jnp.float32(horizon))


@pytest.mark.parametrize(
    ("part", "name", "fn", "message"),
    [
        (
            "task",
            "loss",
            lambda p, i, b: 0.0,
            r"`task.loss` must take \(params, instance, batch, key",
        ),
        (
            "task",
            "batch",
            lambda key: (),
            r"`task.batch` must take \(instance, key, split\), got one",
        ),
        ("task", "sample", lambda: (), r"`task.sample` must take \(key\)"),
        (
            "optimizer",
            "bind",
            lambda theta: None,
            r"`learned_optimizer.bind` must take \(theta, num",
        ),
    ],
)
def test_functions_of_other_arguments_are_refused(part, name, fn, message):
    parts = {"task": TASK, "optimizer": OPTIMIZER}
    parts[part] = parts[part]._replace(**{name: fn})
    with pytest.raises(ValueError, match=message):
        inner_training(*parts.values())


def test_an_update_may_read_no_loss():
    """A plain optax transformation serves, though every update is given the loss."""
    plain = LearnedOptimizer(
        lambda key: {"rate": jnp.float32(0.1)}, lambda theta, num_steps: optax.sgd(theta["rate"])
    )
    theta = plain.init(jax.random.key(0))
    system = inner_training(TASK, plain)
    state = system.init(theta, jax.random.key(1), 3)
    _, losses = unroll(system, theta, state, jax.random.key(2), 3)
    assert losses[2] < losses[0]
