"""Evaluation: the sweep finds the best rate, and optimizers see the same runs."""

import jax
import numpy as np
import optax

from launch.demo import verdict
from learned_opt import learnable_adam, learnable_sgdm
from meta_train import evaluate
from tasks import quadratic_family

TASK = quadratic_family(dim=4, noise=0.05)
SIZE = {"num_steps": 30, "num_seeds": 3, "seed": 7}


def test_curve_is_a_plain_optax_loop():
    """The curve of a bound optimizer equals a hand-written training loop."""
    optimizer = learnable_sgdm(0.1, 0.5)
    theta = optimizer.init(jax.random.key(0))
    curves = evaluate.evaluate_learned("sgdm", TASK, optimizer, theta, **SIZE)
    for seed, key in enumerate(jax.random.split(jax.random.key(7), 3)):
        key_init, key_data = jax.random.split(key)
        key_sample, key_params = jax.random.split(key_init)
        instance = TASK.sample(key_sample)
        params = TASK.init(instance, key_params)
        transform = optax.sgd(0.1, momentum=0.5)
        state = transform.init(params)
        for step, step_key in enumerate(jax.random.split(key_data, 30)):
            key_batch, key_loss, _, _ = jax.random.split(step_key, 4)
            batch = TASK.batch(instance, key_batch, "train")
            loss, grads = jax.value_and_grad(TASK.loss)(params, instance, batch, key_loss)
            np.testing.assert_allclose(loss, curves.losses[seed, step], rtol=1e-4)
            updates, state = transform.update(grads, state)
            params = optax.apply_updates(params, updates)


def test_sweep_picks_the_best_rate_on_the_same_seeds():
    rates = (1e-4, 1e-2, 0.1, 0.5, 1e3)
    swept = evaluate.evaluate_baseline("adam", TASK, rates=rates, **SIZE)
    finals = {}
    for rate in rates:
        optimizer = learnable_adam(rate)
        theta = optimizer.init(jax.random.key(0))
        finals[rate] = evaluate.evaluate_learned("adam", TASK, optimizer, theta, **SIZE).final
    best = min(finals, key=finals.get)
    assert swept.learning_rate == best
    np.testing.assert_allclose(swept.final, finals[best], rtol=1e-3)
    assert len(evaluate.LEARNING_RATES) >= 12


def test_final_is_the_last_tenth():
    losses = np.arange(40.0).reshape(2, 20)
    assert evaluate.Curves("x", losses).final == np.mean([18, 19, 38, 39])


def test_verdict_is_plain():
    assert "it reaches Adam" in verdict(2.0, 0.05, 0.06, 100)
    assert "it does NOT reach Adam" in verdict(2.0, 0.07, 0.06, 100)
    assert "did NOT help" in verdict(2.0, 2.1, 0.06, 100)
