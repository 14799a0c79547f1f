"""Control: Gymnasium's environments simulated by MJX, and what learns a policy there.

Without the extra `control` these are not collected, as a line of the report says.
"""

import dataclasses
import importlib
import json
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from launch import config as cfg
from launch import rollout, trainables
from launch.choices import to_dict
from launch.job import build
from launch.loop import run
from launch.studies.pes.control_runs import ars
from meta_train import estimators as est
from meta_train.unroll import UnrolledSystem, unroll
from tasks.dynamics import mujoco_physics as mp
from tasks.dynamics.control import Control
from tasks.dynamics.gymnasium_rollouts import gymnasium_returns
from tasks.dynamics.policies import Normalization, normalized

STEPS = {"swimmer": 200, "hopper": 10, "half_cheetah": 10}


def uniform_actions(environment, num):
    drawn = np.random.default_rng(1).uniform(-1.2, 1.2, (num, environment.action_space.shape[0]))
    return drawn.astype(np.float32)  # Some beyond the controls' range, which MuJoCo clips.


@cache
def of_gymnasium(name):
    """Positions, velocities, observations, rewards, ends; from a drawn start, of drawn actions."""
    environment = mp.make_environment(name)
    environment.reset(seed=1)
    data = environment.unwrapped.data
    start = data.qpos.copy(), data.qvel.copy()
    rows = []
    for action in uniform_actions(environment, STEPS[name]):
        observation, reward, ended, _, _ = environment.step(action)
        rows.append((data.qpos.copy(), data.qvel.copy(), observation, reward, ended))
    return start, [np.array(column) for column in zip(*rows, strict=True)]


@pytest.mark.parametrize(
    ("name", "x64", "within"),
    [
        ("swimmer", False, 1e-3),
        ("swimmer", True, 1e-9),
        # Contacts amplify rounding from the tenth step on, so not for longer.
        ("hopper", False, 1e-3),
        ("half_cheetah", False, 5e-3),
    ],
)
def test_the_physics_rewards_and_observations_are_gymnasiums(name, x64, within):
    (qpos, qvel), expected = of_gymnasium(name)
    actions = uniform_actions(mp.make_environment(name), STEPS[name])
    environment = mp.ENVIRONMENTS[name]
    with jax.enable_x64(x64):
        model, frame_skip = mp.gymnasium_model(name)
        simulate = mp.physics(name, x64)
        duration = frame_skip * model.opt.timestep

        def step(body, action):
            after = simulate(body, action)
            reward, ended = mp.reward_of(environment, duration, body, after, action)
            seen = mp.observe(environment, after)
            return after, (after.qpos, after.qvel, seen, reward, ended)

        body = mp.Body(*(jnp.asarray(x, float) for x in (qpos, qvel, np.zeros(model.nv))))
        found = jax.jit(lambda b, a: jax.lax.scan(step, b, a)[1])(body, jnp.asarray(actions, float))
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.shape == theirs.shape
        np.testing.assert_allclose(np.asarray(ours), theirs, rtol=0, atol=within)
    assert np.ptp(expected[3]) > 0.1  # The rewards differ from step to step.


# One step of this environment is compiled for all that follows.
HOPPER = Control("hopper")


@cache
def hopper():
    dynamics = HOPPER.dynamics()
    return dynamics, UnrolledSystem(dynamics.init, dynamics.step)


def test_an_episode_rests_where_the_hopper_falls():
    """After as many steps and with the same return as in Gymnasium; nothing counts from then on."""
    dynamics, system = hopper()
    kernel = dynamics.init_theta(jax.random.key(0))["params"]["out"]["kernel"]
    theta = {"params": {"out": {"kernel": kernel.at[0].set(jnp.array([0.5, -0.5, 0.5]))}}}
    key = jax.random.key(3)
    start = system.init(theta, key, 20)
    end, losses = jax.jit(lambda s: unroll(system, theta, s, key, 20))(start)
    length = np.flatnonzero(losses)[-1] + 1
    assert 8 < length < 16 and not end.alive and not np.any(losses[length:])

    environment = mp.make_environment("hopper")
    environment.reset(seed=0)
    environment.unwrapped.set_state(*(np.asarray(x, float) for x in start.body[:2]))
    last = environment.unwrapped.data
    rewards, ended = [], False
    while not ended:
        _, reward, ended, _, _ = environment.step(last.qpos[1] * np.array([0.5, -0.5, 0.5]))
        rewards.append(reward)
    assert len(rewards) == length
    np.testing.assert_allclose(-losses[:length], rewards, atol=5e-3)
    np.testing.assert_allclose(end.body.qpos, last.qpos, atol=5e-3)


@pytest.mark.parametrize("name", list(mp.ENVIRONMENTS))
def test_starts_are_drawn_as_gymnasiums_are(name):
    """Means and spreads of 2,000 starts of ours, in Gymnasium's own units: within 5 standard
    errors of those of its 400."""
    dynamics = Control(name).dynamics()
    keys = jax.random.split(jax.random.key(0), 2000)
    ours = jax.vmap(lambda key: dynamics.init({}, key, 1).body)(keys)
    environment = mp.make_environment(name)
    theirs = []
    for seed in range(400):
        environment.reset(seed=seed)
        data = environment.unwrapped.data
        theirs.append(np.concatenate([data.qpos, data.qvel]))
    theirs, ours = np.array(theirs), np.concatenate([ours.qpos, ours.qvel], axis=1)
    error = np.sqrt(1 / len(theirs) + 1 / len(ours))
    scale = theirs.std(axis=0)
    assert np.all(np.abs(theirs.mean(axis=0) - ours.mean(axis=0)) < 5 * error * scale)
    assert np.all(np.abs(np.log(ours.std(axis=0) / scale)) < 5 * error)
    kurtosis = [np.mean(((x - x.mean(0)) / x.std(0)) ** 4, axis=0) for x in (ours, theirs)]
    assert np.all(np.abs(kurtosis[0] - kurtosis[1]) < 0.9)  # 1.8 of uniform, 3 of normal draws.


@pytest.mark.parametrize(
    "name", ["bptt", "tbptt", "rtrl", "uoro", "pes_analytic", "forward_gradient"]
)
def test_what_differentiates_is_refused_with_the_reason(name):
    _, system = hopper()
    config = cfg.estimator(name)
    estimator = config.make(system, est.fixed_horizon(40))
    theta = HOPPER.acting()[1](jax.random.key(0))
    with pytest.raises(ValueError, match=r"`hopper` has no derivative.*contacts.*`pes`, `nres`"):
        estimator.init(theta, jax.random.key(0))


def test_running_moments_are_numpys():
    """With one observation at 0 of variance 1 before the others."""
    drawn = np.random.default_rng(0).normal(3.0, 2.0, (50, 4))
    seen = Normalization.start(4)
    for observation in drawn:
        seen, scaled = normalized(seen, jnp.asarray(observation))
    with_start = np.concatenate([np.zeros((1, 4)), drawn])
    mean = with_start.mean(axis=0)
    variance = (np.square(with_start - mean).sum(axis=0) + 1) / 51
    np.testing.assert_allclose(seen.mean, mean, rtol=1e-5)
    np.testing.assert_allclose(scaled, (drawn[-1] - mean) / np.sqrt(variance), rtol=1e-5)


def test_ars_is_full_es_over_the_spread_of_the_returns():
    """The same draws: for a loss linear in theta, the slope's direction and a known length."""
    slope = jnp.array([1.0, -2.0, 0.5])
    system = UnrolledSystem(
        lambda theta, key, horizon: jnp.zeros(()), lambda theta, s, key: (s, theta @ slope)
    )
    estimator = ars(system, num_pairs=20_000, sigma=0.1, horizons=est.fixed_horizon(4))
    state = estimator.init(jnp.zeros(3), jax.random.key(0))
    grad, _, _ = estimator.estimate(jnp.zeros(3), state, jax.random.key(1))
    # E[delta (L+ - L-)] = 2 T sigma slope, and the losses' deviation is T sigma |slope|.
    np.testing.assert_allclose(grad, 2 * slope / jnp.linalg.norm(slope), atol=0.06)


@pytest.fixture(scope="module")
def preset():
    """The preset, made short: a few steps of few, short episodes of the environment above."""
    config = cfg.load_preset("swimmer")
    return dataclasses.replace(
        config,
        num_steps=4,
        num_devices=1,
        eval_every=2,
        eval_seeds=2,
        checkpoint_every=2,
        log_every=1,
        wandb_mode="disabled",
        task=dataclasses.replace(config.task, normalize=True),
        inner=cfg.InnerConfig(horizon=20),
        estimator=cfg.estimator("pes", num_particles=4, truncation=10, sigma=0.3),
    )


def test_the_preset_trains_continues_exactly_and_is_rolled_out(preset, tmp_path, capsys):
    run(preset, tmp_path / "whole")
    run(dataclasses.replace(preset, num_steps=2), tmp_path / "parts")
    run(preset, tmp_path / "parts")
    policies = [rollout.load_policy(tmp_path / name / "policy") for name in ("whole", "parts")]
    (control, theta), (_, continued) = policies
    assert control == preset.task
    assert jax.tree.map(jnp.shape, theta) == {"params": {"out": {"kernel": (8, 2)}}}
    assert np.any(theta["params"]["out"]["kernel"])
    jax.tree.map(np.testing.assert_array_equal, theta, continued)
    rows = [json.loads(line) for line in (tmp_path / "whole/metrics.jsonl").open()]
    measured = [row["eval/return"] for row in rows if "eval/return" in row]
    assert len(measured) == 2 and {row["eval/episode_length"] for row in rows[1::2]} == {1000}

    returns = gymnasium_returns(control, 2)(jax.tree.map(lambda x: x[None], theta), jnp.int32(0))
    np.testing.assert_allclose(returns.total.mean(), measured[-1], rtol=1e-4)


def test_a_damaged_policy_is_refused(preset, tmp_path):
    """Whatever is wrong with its files, in a sentence."""
    right = {"params": {"out": {"kernel": jnp.zeros((8, 2))}}}
    for params, message in (
        ({"params": {"out": {"kernel": jnp.zeros((8, 3))}}}, "weights of the shapes"),
        ({"params": {"kernel": jnp.zeros((8, 2))}}, "weights of the shapes"),
    ):
        trainables.save_weights(tmp_path, params, {"policy": to_dict(preset.task)})
        with pytest.raises(ValueError, match=message):
            rollout.load_policy(tmp_path)
    trainables.save_weights(tmp_path, right, {"policy": to_dict(preset.task)})
    assert rollout.load_policy(tmp_path)[0] == preset.task
    for name, contents in (("config.json", "[]"), ("weights.safetensors", "torn")):
        (tmp_path / name).write_text(contents)
        with pytest.raises(ValueError, match="is no trained policy"):
            rollout.load_policy(tmp_path)
        trainables.save_weights(tmp_path, right, {"policy": to_dict(preset.task)})


def test_an_example_policy(capsys):
    """It trains, and prints returns that change; the first is that of a swimmer that drifts."""
    swim = importlib.import_module("examples.swim")
    returns = swim.main(num_steps=2, every=1, num_pairs=2, horizon=20)
    assert len(returns) == 3 and len(set(returns)) == 3 and abs(returns[0]) < 40
    assert capsys.readouterr().out.startswith("8 steps: ")


def test_a_policy_is_not_an_optimizers_task_nor_the_reverse(preset):
    for change, message in (
        ({"trains": "optimizer"}, "set trains=policy"),
        ({"task": cfg.task("quadratic")}, "start from --preset=swimmer"),
    ):
        with pytest.raises(ValueError, match=message):
            build(dataclasses.replace(preset, **change), None)
