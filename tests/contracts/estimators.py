"""The contract of every estimator."""

import dataclasses

import jax
import numpy as np
import pytest

from launch import config as cfg
from launch.job import build
from launch.trainables import make_system
from meta_train import devices, estimators, trainer
from meta_train.checkpoint import Checkpoints
from tests.systems import leaves_equal, some_fast

ESTIMATORS = sorted(estimators.ESTIMATORS)
HYBRID = "hybrid_es"


def estimator_config(name, **values):
    """The estimator with these values, those it has fields for."""
    fields = {field.name for field in dataclasses.fields(estimators.ESTIMATORS[name])}
    return cfg.estimator(name, **{key: x for key, x in values.items() if key in fields})


def small_job(name, inner=None, hybrid=None):
    """A small optimizer on a quadratic with the estimator of that name."""
    size = {"num_particles": 32, "truncation": 4, "sigma": 0.05}
    estimator = estimator_config(name, **size)
    if name == HYBRID:
        hybrid = dict(hybrid or {})
        base = estimator_config(hybrid.pop("base", "tbptt"), **size)
        estimator = cfg.estimator(name, base=base, sigma=0.05, **hybrid)
    optimizer = cfg.optimizer("sgdm", learning_rate=0.01)
    if estimator.needs_reversible:
        optimizer = cfg.optimizer("reversible_mlp", hidden_sizes=(8,), step_mult=0.01)
    return cfg.Config(
        task=cfg.task("quadratic", noise=0.0),
        optimizer=optimizer,
        inner=cfg.InnerConfig(horizon=8, **inner or {}),
        estimator=estimator,
        meta=cfg.meta_optimizer("adam", learning_rate=0.03),
        eval_every=0,
    )


# Slow: by the same functions as `pes`, `artbp` and `reparam_es`, and with the same population.
ALIKE = ("bptt", "full_es", "gpes", "reparam", "truncated_es")


@pytest.mark.parametrize(
    "name", some_fast(ESTIMATORS, [name for name in ESTIMATORS if name not in ALIKE])
)
def test_estimator(name):
    """Trains learnable SGD on a quadratic: same key same result, particle axis, progress."""
    config = small_job(name)
    optimizer = config.optimizer.make()
    system = make_system(config, config.task.make(), optimizer)
    estimator = config.estimator.make(system, config.horizons())
    meta_optimizer = config.meta.make(config.num_steps)
    state = jax.jit(lambda: trainer.init_state(estimator, meta_optimizer, optimizer.init, seed=0))()
    population = state.estimator_state
    if name == HYBRID:  # The rest is on every device.
        assert population.workers.shape == (config.estimator.shards.parts,)
        population = population.particles
    for leaf in jax.tree.leaves(population):
        assert leaf.shape[0] == config.estimator.population.size
    step = jax.jit(trainer.make_step(estimator, meta_optimizer))
    once, again = step(state), step(state)
    assert leaves_equal(once[0].theta, again[0].theta)
    assert leaves_equal(once[1], again[1])
    for metric in ("meta_loss", "meta_grad_norm", "meta_grad_spread", "theta_norm", "update_norm"):
        assert np.isfinite(once[1][metric])
    assert jax.tree.structure(once[0]) == jax.tree.structure(state)
    for _ in range(100):
        state, metrics = step(state)
    assert metrics["nonfinite"] == 0
    if name == "reversible":
        assert metrics["meta_loss"] < 0.8 * once[1]["meta_loss"]
        return
    before, after = (t["params"]["log_learning_rate"] for t in (once[0].theta, state.theta))
    assert after > before + 0.5  # A rate of 0.01 is far too small; every estimator sees it.


def run_job(job, state, num_steps):
    """The host state after each of the steps, from ``state`` (a step takes its memory)."""
    state = devices.place(state, job.num_devices, job.axes)
    after = []
    for _ in range(num_steps):
        state, metrics = job.step(state)
        jax.block_until_ready(metrics)  # See `devices.max_in_flight`.
        after.append(devices.to_host(state, job.axes))
    return after


def is_residual(path):
    """Whether the leaf is what compression left out of the gradients sent so far."""
    return any(getattr(key, "name", None) == "residuals" for key in path)


# What Hybrid-ES may hold besides candidates: a base's population, residuals, past, a predictor.
HYBRIDS = (
    {"base": "pes", "compression": "int8"},
    {"base": "bptt", "mode": "past_descent", "num_workers": 2, "candidates_per_worker": 2},
    {"base": "reversible", "mode": "guided", "compression": "top_k", "kept": 0.1},
    {"predict": True, "relative_sigma": True, "per_layer": True},
)


# One of each kind of state: inner states with an accumulator, with carried derivatives, without
# any, and with parts on every device. The slow tests take all.
KINDS_OF_STATE = ("pes", "uoro", "reversible")
MOVED = [(name, {}) for name in ESTIMATORS]
MOVED += [("pes", {"inner": {"reduction": "telescoped"}})]
MOVED += [(HYBRID, {"hybrid": hybrid}) for hybrid in HYBRIDS]


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        case
        if case in [(kind, {}) for kind in KINDS_OF_STATE] or case[1] == {"hybrid": HYBRIDS[0]}
        else pytest.param(*case, marks=pytest.mark.slow)
        for case in MOVED
    ],
    ids=lambda value: (
        value
        if isinstance(value, str)
        else "-".join(str(x) for v in value.values() for x in v.values())
    ),
)
def test_estimator_moves_between_devices_and_through_a_checkpoint(name, parts, tmp_path):
    """Two devices draw what one does; a job read back from disk continues bit for bit."""
    config = small_job(name, **parts)
    jobs = [build(dataclasses.replace(config, num_devices=count), None) for count in (1, 2)]
    init = jax.jit(jobs[0].init)
    one, two = (run_job(job, init(), num_steps=6) for job in jobs)
    # In the first step theta is the same to the bit, so whatever differs was drawn differently.
    firsts = jax.tree_util.tree_leaves_with_path(one[0]), jax.tree.leaves(two[0])
    for (path, a), b in zip(*firsts, strict=True):
        if np.issubdtype(a.dtype, np.floating):
            largest = np.abs(a).max(initial=0)
            # What a message in int8 leaves out is at most half a quantum of it, and a difference:
            # its rounding is that of the gradient's largest entry, of 127 quanta.
            if getattr(config.estimator, "compression", "") == "int8" and is_residual(path):
                largest *= 254
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * largest)
        else:
            np.testing.assert_array_equal(a, b)
    a, b = (np.concatenate([*map(np.ravel, jax.tree.leaves(x[-1].theta))]) for x in (one, two))
    assert np.linalg.norm(a - b) < 1e-5 * np.linalg.norm(a)

    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(3, two[2], {})
    checkpoints.close()
    spec = jax.eval_shape(jobs[1].init)
    checkpoints = Checkpoints(tmp_path)
    read = devices.from_host(checkpoints.restore(3, devices.host_like(spec)), spec)
    checkpoints.close()
    assert leaves_equal(run_job(jobs[1], read, num_steps=3)[-1], two[-1])
