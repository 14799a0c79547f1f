"""The train step on an estimator whose answers are known."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from meta_train import trainer
from meta_train.estimators import GradientEstimator
from meta_train.meta_optimizers import AdamW, judged

THETA = jnp.array([3.0, -4.0])
GRAD = jnp.array([0.6, -0.8])


def known(rebuild=None):
    """Its gradient is ``GRAD``; its state holds the key it got last, and counts."""

    def init(theta, key):
        return {"key": jax.random.key_data(key), "count": jnp.zeros(1, jnp.int32)}

    def estimate(theta, state, key):
        metrics = {"loss": 6.0, "finite": 0.75, "grad_sq_norm": 5.0, "own": 7.0}
        return GRAD, {"key": jax.random.key_data(key), "count": state["count"] + 1}, metrics

    return GradientEstimator(init, estimate, rebuild=rebuild)


def started(estimator, optimizer=None):
    return trainer.init_state(estimator, optimizer or optax.sgd(0.5), lambda key: THETA, seed=3)


@pytest.mark.parametrize("rebuild", [None, lambda *_: None], ids=["averaged", "exchanged"])
def test_a_step_by_hand(rebuild):
    """The mean over devices (here: doubling) is of the estimators that do not exchange."""
    optimizer = optax.sgd(0.5)
    estimator = known(rebuild)
    double = 2.0 if rebuild is None else 1.0
    step = trainer.make_step(
        estimator, optimizer, lambda tree: jax.tree.map(lambda x: 2.0 * x, tree)
    )
    before = started(estimator)
    assert before.step == 0
    state, metrics = jax.jit(step)(before)
    theta = THETA - 0.5 * double * GRAD
    np.testing.assert_allclose(state.theta, theta, rtol=1e-6)
    assert state.step == 1 and state.estimator_state["count"] == 1
    assert jax.jit(step)(state)[0].step == 2
    expected = {
        "meta_grad": double * GRAD,
        "meta_loss": 8.0,
        "meta_grad_norm": double,
        "meta_grad_spread": (5.0 * double - double**2) ** 0.5,
        "theta_norm": np.linalg.norm(theta),
        "update_norm": 0.5 * double,
        "nonfinite": 1 - 0.75 * double,
        "own": 7.0 * double,
    }
    assert metrics.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-5, err_msg=name)


@pytest.mark.parametrize("rebuild", [None, lambda *_: None], ids=["averaged", "exchanged"])
def test_a_gradient_that_is_not_finite_moves_nothing(rebuild):
    """Neither theta nor Adam's moments, which would be NaN for good; the rest goes on."""
    optimizer = optax.adam(0.5)
    good = known(rebuild)
    bad = good._replace(estimate=lambda *args: (GRAD.at[1].set(jnp.inf), *good.estimate(*args)[1:]))
    state, _ = jax.jit(trainer.make_step(good, optimizer))(started(good, optimizer))
    after, metrics = jax.jit(trainer.make_step(bad, optimizer))(state)
    np.testing.assert_array_equal(after.theta, state.theta)
    for new, old in zip(
        *map(jax.tree.leaves, (after.meta_opt_state, state.meta_opt_state)), strict=True
    ):
        np.testing.assert_array_equal(new, old)
    assert after.step == 2 and after.estimator_state["count"] == 2
    assert metrics["update_norm"] == 0 and not np.isfinite(metrics["meta_grad_norm"])
    again, _ = jax.jit(trainer.make_step(good, optimizer))(after)
    assert np.all(np.isfinite(again.theta)) and np.any(again.theta != after.theta)


def test_the_mean_of_theta_does_not_see_what_is_held():
    """AdamW would shrink what is held; neither theta nor its mean move there."""
    held = np.array([False, True])
    optimizer = AdamW(learning_rate=0.5, weight_decay=0.1, average=0.5).make(10, held)
    state = started(known(), optimizer)
    step = jax.jit(trainer.make_step(known(), optimizer))
    mean = THETA
    for _ in range(3):
        state, _ = step(state)
        mean = (mean + state.theta) / 2
    assert state.theta[1] == THETA[1] and state.theta[0] < THETA[0] - 1
    np.testing.assert_allclose(judged(state.theta, state.meta_opt_state), mean, rtol=1e-6)
    assert judged(state.theta, state.meta_opt_state.state) is state.theta


def test_a_spread_below_zero_by_rounding_is_zero():
    estimator = known()._replace(
        estimate=lambda theta, state, key: (
            GRAD,
            state,
            {"loss": 1.0, "finite": 1.0, "grad_sq_norm": 0.9999},
        )
    )
    step = trainer.make_step(estimator, optax.sgd(0.5))
    assert step(started(estimator))[1]["meta_grad_spread"] == 0


def test_every_step_and_the_start_have_keys_of_their_own():
    """Of theta, of the population, of each step, of another seed; the root key stays."""
    estimator, optimizer = known(), optax.sgd(0.5)
    thetas = []

    def init_theta(key):
        thetas.append(jax.random.key_data(key))
        return THETA

    keys = []
    step = jax.jit(trainer.make_step(estimator, optimizer))
    for seed in (3, 4):
        state = trainer.init_state(estimator, optimizer, init_theta, seed)
        root = state.key
        keys += [jax.random.key_data(root), thetas[-1], state.estimator_state["key"]]
        for _ in range(4):
            state, _ = step(state)
            keys.append(state.estimator_state["key"])
        assert state.key == root
    assert len({tuple(np.asarray(key).tolist()) for key in keys}) == len(keys) == 14
    again = trainer.init_state(estimator, optimizer, init_theta, 3)
    np.testing.assert_array_equal(again.estimator_state["key"], keys[2])


def test_axes_are_those_of_the_estimator():
    axes = {"key": None, "count": 0}
    found = trainer.state_axes(known()._replace(axes=axes))
    assert found == trainer.TrainState(None, None, None, axes, None)
    assert trainer.state_axes(known()) == trainer.TrainState(None, None, None, 0, None)
