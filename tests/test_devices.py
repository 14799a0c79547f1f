"""The population over 1, 2 and 4 devices: the same draws, the same trajectory."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from launch import config as cfg
from launch.job import build
from meta_train import devices, progress, trainer
from meta_train.estimators.base import mean_in_pairs
from tests.contracts.estimators import ESTIMATORS, estimator_config
from tests.systems import some_fast


def run(num_devices, num_steps, estimator="pes", num_particles=16, **more):
    config = cfg.Config(
        num_devices=num_devices,
        task=cfg.task("mlp", hidden_sizes=(8,), batch_size=8),
        optimizer=cfg.optimizer("mlp", hidden_sizes=(8,)),
        inner=cfg.InnerConfig(horizon=20),
        estimator=estimator_config(estimator, num_particles=num_particles, truncation=5, **more),
    )
    if config.estimator.needs_reversible:
        optimizer = cfg.optimizer("reversible_mlp", hidden_sizes=(8,))
        config = dataclasses.replace(config, optimizer=optimizer)
    job = build(config, None)
    state = devices.place(jax.jit(job.init)(), job.num_devices, job.axes)
    for _ in range(num_steps):
        state, metrics = job.step(state)
        jax.block_until_ready(metrics)  # See `devices.max_in_flight`.
    return devices.to_host(state, job.axes), jax.device_get(metrics), job


# A program for several devices may round a step differently from one for a single one: UORO's,
# and with versions newer than the locked ones others too.
ROUNDED = ("uoro",) if jax.__version__.startswith("0.10.") else ESTIMATORS


@pytest.mark.exact
@pytest.mark.parametrize("estimator", some_fast(ESTIMATORS, ("pes", "tbptt")))
def test_same_trajectory_to_the_bit_on_any_number_of_devices(estimator):
    """On four devices each has one chunk of particles, on fewer several."""
    particles = 128 if estimator == "reparam_es" else 16  # 16 pairs are one particle.
    one, two, four = (run(n, 20, estimator, particles)[0] for n in (1, 2, 4))
    np.testing.assert_array_equal(two.theta, four.theta)
    difference = np.linalg.norm(two.theta - one.theta) / np.linalg.norm(one.theta)
    assert difference <= (1e-5 if estimator in ROUNDED else 0)
    for x, a, b in zip(*map(jax.tree.leaves, (one, two, four)), strict=True):
        np.testing.assert_array_equal(a, b)
        if not np.issubdtype(x.dtype, np.floating):  # Ids, positions, horizons.
            np.testing.assert_array_equal(x, a)


@pytest.mark.parametrize("sampler", ["normal", "orthogonal", "sobol"])
def test_same_draws_on_any_number_of_devices(sampler):
    """After one step theta has not moved the particles apart: the perturbations are equal."""
    one, _, _ = run(1, 1, sampler=sampler)
    four, _, _ = run(4, 1, sampler=sampler)
    np.testing.assert_array_equal(one.estimator_state.memory, four.estimator_state.memory)
    assert len(np.unique(one.estimator_state.memory[:, 0])) == 8  # Each pair has its own.


def test_one_compilation_per_job():
    counts = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, seconds, **_: (
            counts.append(name) if name == "/jax/core/compile/backend_compile_duration" else None
        )
    )
    _, _, job = run(2, 1)
    state = devices.place(job.init(), 2, trainer.PARTICLE_AXES)
    state, _ = job.step(state)
    before = len(counts)
    assert before > 0
    for _ in range(5):
        state, metrics = job.step(state)
        jax.block_until_ready(metrics)
    assert len(counts) == before
    # A state that went through the host, as at a resume, is not compiled for again either.
    host = devices.to_host(state, trainer.PARTICLE_AXES)
    state = devices.from_host(host, jax.eval_shape(job.init))
    state = devices.place(state, 2, trainer.PARTICLE_AXES)
    before = len(counts)
    job.step(state)
    assert len(counts) == before


def test_host_copy_survives_donation():
    _, _, job = run(2, 1)
    state = devices.place(job.init(), 2, trainer.PARTICLE_AXES)
    host = devices.to_host(state, trainer.PARTICLE_AXES)
    kept = jax.tree.map(np.copy, host)
    for _ in range(3):
        state, _ = job.step(state)
        jax.block_until_ready(state)
    for a, b in zip(*map(jax.tree.leaves, (host, kept)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_indivisible_population_is_refused():
    with pytest.raises(ValueError, match=r"multiple of 4, got 10\. .* 8 and 12"):
        devices.choose_num_devices(4, 10)
    with pytest.raises(ValueError, match=r"`num_devices` must be between 0 .* and 4"):
        devices.choose_num_devices(5, 10)
    assert devices.choose_num_devices(0, 8) == 4
    assert devices.choose_num_devices(0, 10) == 2
    assert devices.choose_num_devices(0, 7) == 1
    config = cfg.Config(estimator=cfg.estimator("pes", num_particles=12), num_devices=4)
    with pytest.raises(ValueError, match=r"`--cfg.estimator.num_particles` must be .* 8 and 16"):
        build(config, None)


def test_a_job_built_after_jax_was_used_takes_the_devices_there_are(monkeypatch, capsys):
    monkeypatch.delenv("JAX_NUM_CPU_DEVICES")  # This process has four.
    monkeypatch.setattr(devices.os, "sched_getaffinity", lambda process: set(range(64)))
    monkeypatch.setitem(jax.config.values, "jax_num_cpu_devices", -1)
    assert devices.configure_cpu_devices(2) == 2
    assert capsys.readouterr().err == ""
    with pytest.raises(ValueError, match=r"at most 4, got 63: JAX was used .* instead of 63; set"):
        build(cfg.Config(num_devices=63, task=cfg.task("quadratic")), None)
    assert capsys.readouterr().err == ""
    config = cfg.Config(task=cfg.task("quadratic"))
    assert build(config, None).num_devices == 4
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("note: JAX was used before") and "4 CPU devices instead of 64" in line
    progress.be_quiet()
    try:
        assert build(config, None).num_devices == 4
    finally:
        progress.be_quiet(False)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("argument", "environment", "expected"),
    [
        (1, {}, "1 True"),
        (4096, {}, f"{len(os.sched_getaffinity(0))} True"),  # At most one per core.
        (0, {}, f"{len(os.sched_getaffinity(0))} True"),
        (3, {"JAX_NUM_CPU_DEVICES": "2"}, "2 True"),
        (1, {"XLA_FLAGS": ""}, "1 False"),
    ],
)
def test_the_cpu_is_split_as_asked_unless_the_user_did(argument, environment, expected):
    code = f"""
import os, jax
from meta_train import devices
devices.configure_cpu_devices({argument})
print(jax.local_device_count(), "prefer_vector_width=512" in os.environ["XLA_FLAGS"])
"""
    clean = {k: v for k, v in os.environ.items() if k not in ("JAX_NUM_CPU_DEVICES", "XLA_FLAGS")}
    found = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parent.parent,
        env=clean | environment,
        capture_output=True,
        text=True,
    )
    assert found.stdout.strip() == expected, found.stderr


def test_a_cpu_computes_few_particles_at_a_time_and_queues_no_steps():
    """Many queued steps were seen to hang, and large chunks leave the cache."""
    assert devices.max_in_flight() == 0
    assert devices.default_chunk() == 2


def test_the_zeros_that_a_checkpoint_is_read_into():
    spec = jax.eval_shape(lambda: {"key": jax.random.key(0), "x": jax.numpy.ones(3, "int16")})
    found = devices.host_like(spec)
    np.testing.assert_array_equal(found["x"], np.zeros(3, np.int16), strict=True)
    np.testing.assert_array_equal(found["key"], np.zeros(2, np.uint32), strict=True)


def test_config_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        cfg.Config().seed = 1  # type: ignore[misc]


@pytest.mark.parametrize("count", [32, 48])
@pytest.mark.parametrize("num_devices", [1, 2, 4, 6, 8, 16])
def test_means_over_devices_are_summed_in_pairs(num_devices, count):
    """With those on each device, to the bit as on one; on 6 devices but for the rounding."""
    if count % num_devices:
        count *= 3
    # One large number among small ones: every other order of sums rounds otherwise.
    values = np.random.default_rng(0).normal(size=(count, 3)).astype(np.float32)
    values[5] *= 1e4
    parts = {"a": values.reshape(num_devices, -1, 3), "b": 2 * values[:num_devices, 0]}
    means = jax.pmap if num_devices <= 4 else jax.vmap

    def mean(tree):
        return devices.device_mean({"a": mean_in_pairs(tree["a"]), "b": tree["b"]})

    found = means(mean, axis_name=devices._AXIS)(parts)
    np.testing.assert_allclose(found["b"], np.mean(parts["b"]), rtol=1e-5)
    if num_devices == 6:
        np.testing.assert_allclose(found["a"][0], values.mean(0), rtol=1e-5, atol=1e-3)
        return
    odd = 1 if count == 32 else 3
    rows = values.reshape(-1, odd, 3)
    level = rows[:, 0]
    for i in range(1, odd):
        level = level + rows[:, i]
    level = level / np.float32(odd)
    while len(level) > 1:
        level = level[::2] + level[1::2]
    expected = level / np.float32(count // odd)
    np.testing.assert_array_equal(found["a"], np.tile(expected, (num_devices, 1)))
