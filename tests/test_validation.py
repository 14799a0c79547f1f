"""Validation during meta-training: a curve for each task, and the best theta beside the last."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import launch.validation
import learned_opt
from launch.config import Config
from launch.config import optimizer as choose_optimizer
from launch.evaluation import SEED
from launch.evaluation.aggregates import log_loss
from launch.evaluation.runs import Runner, Starts
from launch.suites import suite
from launch.validation import METRIC, SEED_OFFSET, Best, validation
from meta_train import evaluate
from tests import jobs

CHANGES = {"validation": "smoke", "eval_every": 2, "eval_seeds": 2, "meta": {"learning_rate": 1.0}}


def curves(folder):
    """``eval/validation`` by step."""
    return {row["step"]: row[METRIC] for row in jobs.rows(folder) if METRIC in row}


def test_the_best_theta_is_kept_and_resuming_is_exact(tmp_path, monkeypatch):
    small = suite("smoke")
    del small.tasks["smoke_mlp"]  # For the time of compiling it.
    monkeypatch.setattr(launch.validation, "suite", lambda name: small)
    for folder, stops in (("whole", [12]), ("parted", [5, 12])):
        for num_steps in stops:
            jobs.run(tmp_path / folder, num_steps=num_steps, **CHANGES)
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    assert curves(whole) == curves(parted)
    found = curves(whole)
    assert list(found) == [2, 4, 6, 8, 10, 12]
    best = min(found, key=found.get)
    assert best < 12  # With this learning rate the last is not the best.
    thetas = []
    for folder in (whole, parted):
        config = json.loads((folder / "optimizer_best/config.json").read_text())
        assert config["training"]["outer_steps"] == best
        optimizer, theta = learned_opt.load(folder / "optimizer_best")
        thetas.append(theta)
    jax.tree.map(np.testing.assert_array_equal, *thetas)
    row = next(row for row in jobs.rows(whole) if row["step"] == best)
    # The metric is that of theta as exported, from runs on their own.
    tasks, horizon = small.tasks, small.horizons[0]
    expected = {}
    for name, config in tasks.items():
        task, seed = config.make(), SEED + SEED_OFFSET
        losses = evaluate.evaluate_learned(
            name, task, optimizer, theta, num_steps=horizon, num_seeds=2, seed=seed
        ).runs[evaluate.FINAL]
        keys = jax.random.split(jax.random.key(seed), 2)
        instances = [task.sample(jax.random.split(jax.random.split(key)[0])[0]) for key in keys]
        constants = np.array([task.constant_loss(instance) for instance in instances])
        expected[name] = log_loss(losses, constants).mean()
        np.testing.assert_allclose(row[f"{METRIC}/{name}"], expected[name], rtol=1e-3)
    np.testing.assert_allclose(found[best], np.mean(list(expected.values())), rtol=1e-3)
    # A job that continues without having found a better one leaves the best as it was.
    shutil.rmtree(parted / "optimizer_best")
    jobs.run(parted, num_steps=14, **CHANGES)
    assert curves(parted)[14] > found[best] and not (parted / "optimizer_best").exists()


def test_of_equals_the_first_is_kept_and_nothing_that_is_not_finite():
    exported = []
    best = Best(lambda folder, theta, step: exported.append(step), None, None)
    good, bad = jnp.ones(2), jnp.array([1.0, jnp.nan])
    best.offer(0, good, {METRIC: float("nan")})
    for step, theta, loss in ((1, bad, -9.0), (2, good, 1.0), (3, good, 1.0), (4, good, 0.5)):
        best.offer(step, theta, {METRIC: loss})
    best.offer(5, good, {METRIC: float("nan")})
    best.offer(6, good, {})
    assert exported == [2, 4] and best.loss == 0.5


def test_off_by_default_and_refused_where_it_has_no_sense():
    assert jobs.SMALL.validation == "" and validation(jobs.SMALL, None)(None) == {}
    with pytest.raises(ValueError, match=r"`validation` must be one of .*smoke.*got 'smok'"):
        jobs.changed(validation="smok")
    with pytest.raises(ValueError, match=r"`validation` is for .*eval_every=0; set them"):
        jobs.changed(validation="smoke", eval_every=0)


@pytest.mark.parametrize("meta_loss", ["validation", "both"])
def test_held_back_batches_count_where_theta_is_trained_on_them(meta_loss, monkeypatch):
    """The mean of what is found without, and of the log-loss of the validation split at the end."""
    small = suite("smoke")
    for name in set(small.tasks) - {"smoke_mlp"}:
        del small.tasks[name]
    monkeypatch.setattr(launch.validation, "suite", lambda name: small)
    config = small.tasks["smoke_mlp"]
    base = Config(validation="smoke", eval_seeds=2, task=config, optimizer=choose_optimizer("sgdm"))
    optimizer = base.optimizer.make()
    theta = optimizer.init(jax.random.key(0))
    inner = dataclasses.replace(base.inner, meta_loss=meta_loss)
    trained, both = (
        float(validation(c, None)(theta)[METRIC])
        for c in (base, dataclasses.replace(base, inner=inner))
    )
    starts = Starts(config.make())
    keys = starts.keys(SEED + SEED_OFFSET, 2)
    runs = Runner(starts, optimizer, 2, shared=True)(
        theta, keys, small.horizons[0], ("validation",)
    )
    held_back = log_loss(runs.scores["validation"]["loss"], np.asarray(starts.constant(keys)))
    np.testing.assert_allclose(both, (trained + held_back.mean()) / 2, rtol=1e-4)
    assert abs(held_back.mean() - trained) > 1e-3
