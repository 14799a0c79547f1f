"""Mixtures: the mean of the parts' gradients, in one program or one a part."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from launch import choices
from launch import config as cfg
from launch.job import build
from meta_train import devices, pool, trainer
from meta_train.checkpoint import Checkpoints
from meta_train.estimators import fixed_horizon, hybrid_es, mixture, pes, tbptt
from meta_train.estimators.hybrid import Noise, control_variate
from meta_train.mixture_step import make_mixture_step
from meta_train.unroll import UnrolledSystem
from tasks import TaskMixture
from tests import systems

HORIZON = fixed_horizon(6)
NAMES = ("small", "large")


def parts(num_particles=4):
    """Two systems of different shapes over one theta, and that theta."""
    small, theta = systems.linear(0, state_size=4)
    large, _ = systems.linear(1, state_size=7)
    size = {"num_particles": num_particles, "truncation": 3, "horizons": HORIZON}
    return [tbptt(small, **size), tbptt(large, **size)], jnp.asarray(theta, jnp.float32)


def estimates(estimators, theta, key):
    """What each part gives on its own in the mixture's first step."""
    key_init, key_step = jax.random.split(key)
    found = []
    for i, estimator in enumerate(estimators):
        state = estimator.init(theta, jax.random.fold_in(key_init, i))
        found.append(estimator.estimate(theta, state, jax.random.fold_in(key_step, i)))
    return found


def first_step(mixed, theta, key):
    key_init, key_step = jax.random.split(key)
    state = mixed.estimator.init(theta, key_init)
    return jax.jit(mixed.estimator.estimate)(theta, state, key_step)


def test_the_weighted_mean_of_the_parts():
    estimators, theta = parts()
    key = jax.random.key(3)
    (small, _, small_metrics), (large, _, large_metrics) = estimates(estimators, theta, key)
    mixed = mixture(estimators, names=NAMES, weights=(3.0, 1.0))
    grad, _, metrics = first_step(mixed, theta, key)
    np.testing.assert_allclose(grad, 0.75 * small + 0.25 * large, rtol=1e-5)
    np.testing.assert_allclose(metrics["meta_loss/small"], small_metrics["loss"], rtol=1e-6)
    np.testing.assert_allclose(metrics["meta_grad_norm/large"], optax.tree.norm(large), rtol=1e-5)
    expected = 0.75 * small_metrics["loss"] + 0.25 * large_metrics["loss"]
    np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-5)
    assert metrics["nonfinite/small"] == 0 and metrics["finite"] == 1


def test_norms_divide_what_drowns():
    """At first each gradient has norm 1; then the running root mean square, in closed form."""
    estimators, theta = parts()
    key = jax.random.key(3)
    (small, *_), (large, *_) = estimates(estimators, theta, key)
    mixed = mixture(estimators, names=NAMES, normalize=True)
    grad, state, _ = first_step(mixed, theta, key)
    unit = [g / np.linalg.norm(g) for g in (small, large)]
    np.testing.assert_allclose(grad, (unit[0] + unit[1]) / 2, rtol=1e-5)
    norms = [np.linalg.norm(small)]
    for number in range(2):
        _, state, metrics = mixed.estimator.estimate(theta, state, jax.random.key(number))
        norms.append(float(metrics["meta_grad_norm/small"]))
    decay = 0.99
    weights = (1 - decay) * decay ** np.arange(2, -1, -1)
    np.testing.assert_allclose(state.norms.mean[0], weights @ np.square(norms), rtol=1e-5)
    assert state.norms.seen.tolist() == [3, 3]


def test_spikes_are_cut():
    """A gradient of 100 times the running norm counts as 3 times it, there and in the norm."""
    estimators, theta = parts()
    mixed = mixture(estimators, names=NAMES, normalize=True, cut=3.0)
    norms = mixed.estimator.init(theta, jax.random.key(0)).norms
    metrics = [{"loss": 1.0, "finite": 1.0, "grad_sq_norm": 1.0}] * 2
    metrics = jax.tree.map(jnp.asarray, metrics)
    unit = jnp.zeros_like(theta).at[0].set(1.0)
    ran = jnp.ones(2, bool)
    squares = 0.0
    for number, (scale, counts) in enumerate([(1.0, 1.0), (100.0, 3.0), (0.5, 0.5)]):
        grad, norms, found = mixed.combine(norms, [scale * unit, 0 * unit], metrics, ran)
        squares = 0.99 * squares + 0.01 * counts**2
        typical = np.sqrt(squares / (1 - 0.99 ** (number + 1)))
        np.testing.assert_allclose(norms.mean[0], squares, rtol=1e-5)
        np.testing.assert_allclose(grad[0], counts / typical / 2, rtol=1e-5)
        assert found["meta_grad_norm/small"] == scale  # What it was.


def test_drawn_parts_count_for_those_that_are_not():
    """Over all keys each part runs equally often, and the expectation is that of all parts."""
    estimators, theta = parts()
    estimators.append(estimators[0])
    names = (*NAMES, "again")
    mixed = mixture(estimators, names=names, weights=(1.0, 2.0, 3.0), drawn=2)
    keys = jax.random.split(jax.random.key(0), 3000)
    ran = np.asarray(jax.vmap(mixed.drawn)(keys))
    assert np.all(ran.sum(axis=1) == 2)
    counts = ran.mean(axis=0)
    assert np.all(np.abs(counts - 2 / 3) < 4.5 * np.sqrt(2 / 9 / len(keys)))
    # Given who ran, the gradient is the sum of w_i K / m.
    state = mixed.estimator.init(theta, jax.random.key(1))
    grad, after, metrics = mixed.estimator.estimate(theta, state, keys[0])
    expected, losses = 0, np.zeros(3)
    for i, estimator in enumerate(estimators):
        part = estimator.estimate(theta, state.parts[i], jax.random.fold_in(keys[0], i))
        moved = not systems.leaves_equal(after.parts[i].position, state.parts[i].position)
        assert moved == ran[0, i]
        assert np.isnan(metrics[f"meta_loss/{names[i]}"]) == (not ran[0, i])
        if ran[0, i]:
            expected += (i + 1) / 6 * 3 / 2 * part[0]
            losses[i] = part[2]["loss"]
    np.testing.assert_allclose(grad, expected, rtol=1e-5)
    weights = np.array([1.0, 2.0, 3.0]) * ran[0]
    np.testing.assert_allclose(metrics["loss"], losses @ weights / weights.sum(), rtol=1e-5)


def test_parts_alike_draw_apart():
    """Their starts and their perturbations, in every step."""
    system, theta = systems.nonlinear(0)
    estimator = pes(system, num_pairs=2, truncation=3, horizons=HORIZON, sigma=0.1)
    mixed = mixture([estimator] * 3, names=("a", "b", "c"))
    state = mixed.estimator.init(theta, jax.random.key(0))
    estimate = jax.jit(mixed.estimator.estimate)
    for step in range(3):
        starts = [part.states["x"] for part in state.parts]
        _, state, metrics = estimate(theta, state, jax.random.key(step))
        norms = [float(metrics[f"meta_grad_norm/{name}"]) for name in "abc"]
        for values in (starts, norms):
            assert len({np.asarray(value).tobytes() for value in values}) == 3


def test_a_part_that_is_not_finite_contributes_nothing():
    estimators, theta = parts()
    broken = UnrolledSystem(
        lambda theta, key, horizon: jnp.zeros(2),
        lambda theta, state, key: (state, jnp.sum(theta) * jnp.inf),
    )
    bad = tbptt(broken, num_particles=4, truncation=3, horizons=HORIZON)
    mixed = mixture([estimators[0], bad], names=NAMES, normalize=True)
    grad, state, metrics = first_step(mixed, theta, jax.random.key(3))
    small = estimates(estimators[:1], theta, jax.random.key(3))[0][0]
    np.testing.assert_allclose(grad, small / np.linalg.norm(small) / 2, rtol=1e-5)
    assert metrics["nonfinite/large"] == 1 and metrics["finite"] == 0.5
    assert np.isfinite(metrics["loss"]) and np.isfinite(state.norms.mean).all()


@pytest.mark.parametrize("drawn", [0, 1])
def test_a_program_a_part_is_one_program(drawn):
    """Both forms of the step, on one and two devices, follow one trajectory."""
    estimators, theta = parts()
    meta_optimizer = optax.adam(0.01)
    results = []
    for num_devices, split in ((1, False), (1, True), (2, True)):
        mean = (lambda tree: tree) if num_devices == 1 else devices.device_mean
        mixed = mixture(estimators, names=NAMES, drawn=drawn, normalize=True)
        state = trainer.init_state(mixed.estimator, meta_optimizer, lambda key: theta, 0)
        axes = trainer.state_axes(mixed.estimator)
        if split:
            step = make_mixture_step(mixed, meta_optimizer, num_devices)
            state = devices.place(state, num_devices, axes)
        else:
            step = jax.jit(trainer.make_step(mixed.estimator, meta_optimizer, mean))
        history = []
        for _ in range(6):
            state, metrics = step(state)
            history.append({k: np.asarray(v).tolist() for k, v in metrics.items()})
        results.append((np.asarray(devices.first_replica(state.theta)), history))
    for values, history in results[1:]:
        np.testing.assert_allclose(values, results[0][0], rtol=1e-4)
        for found, expected in zip(history, results[0][1], strict=True):
            assert found.keys() == expected.keys()
            for name in found:
                # The spread is the root of a difference that is rounding where all parts agree.
                atol = 1e-3 if "spread" in name else 1e-6
                np.testing.assert_allclose(found[name], expected[name], 1e-3, atol, err_msg=name)


def mixed_config(**mixing):
    tasks = (cfg.task("quadratic", dim=3), cfg.task("quadratic", dim=5), cfg.task("mlp"))
    return cfg.Config(
        task=TaskMixture(tasks=tasks[:2], **mixing),
        optimizer=cfg.optimizer("sgdm"),
        inner=cfg.InnerConfig(horizon=6),
        estimator=cfg.estimator("pes", num_particles=8, truncation=3),
    )


def test_a_job_of_several_tasks_goes_through_a_checkpoint(tmp_path):
    config = dataclasses.replace(mixed_config(drawn=1, weights=(1.0, 3.0)), num_devices=2)
    assert cfg.read_config(choices.to_dict(config)) == config
    assert cfg.task_names(config.task) == ["quadratic_1", "quadratic_2"]
    assert config.inner_steps() == 8 * 3
    job = build(config, None)

    def run(state, num_steps):
        state = devices.place(state, job.num_devices, job.axes)
        for _ in range(num_steps):
            state, metrics = job.step(state)
        return devices.to_host(state, job.axes), metrics

    start = jax.jit(job.init)()
    whole, metrics = run(start, 6)
    assert {"meta_loss/quadratic_1", "meta_grad_norm/quadratic_2"} <= metrics.keys()
    half, _ = run(jax.jit(job.init)(), 3)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(3, half, {})
    spec = jax.eval_shape(job.init)
    read = devices.from_host(checkpoints.restore(3, devices.host_like(spec)), spec)
    checkpoints.close()
    assert systems.leaves_equal(run(read, 3)[0], whole)
    scores = job.evaluate(whole.theta)
    assert set(scores) == {
        f"eval/{what}/quadratic_{i}" for what in ("mean_loss", "final_loss") for i in (1, 2)
    }


def test_programs_that_do_not_fit_are_given_back_and_made_again(monkeypatch):
    """Or a job of forty tasks takes all mappings of memory there are, and XLA ends the process."""
    job = build(dataclasses.replace(mixed_config(), num_devices=2), None)
    start = jax.jit(job.init)()
    placed = devices.placed_spec(jax.eval_shape(job.init), job.num_devices, job.axes)
    lowered = job.step.lower(placed)

    def run():
        devices.forget_compiled()
        before = mappings()
        step, state, most = lowered.compile(), devices.place(start, job.num_devices, job.axes), 0
        for _ in range(3):
            state, _ = step(state)
            most = max(most, mappings() - before)
        return devices.to_host(state, job.axes), job.evaluate(start.theta), most

    monkeypatch.setattr(pool, "crowded", lambda: True)
    *few, taken_by_one = run()
    monkeypatch.setattr(pool, "crowded", lambda: False)
    *all_of_them, taken_by_two = run()
    jax.tree.map(np.testing.assert_array_equal, few, all_of_them)
    if Path("/proc/self/maps").exists():  # Linux.
        assert 100 < taken_by_one < 0.8 * taken_by_two


def mappings():
    """Of memory, of this process."""
    path = Path("/proc/self/maps")
    return len(path.read_text().splitlines()) if path.exists() else 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"names": ("one",)}, "must have a name each"),
        ({"names": NAMES, "weights": (1.0,)}, "a weight each or none"),
        ({"names": NAMES, "weights": (1.0, -1.0)}, r"`weights\[1\]` must be"),
        ({"names": NAMES, "drawn": 3}, "`drawn` must be at most"),
        ({"names": NAMES, "drawn": 1.5}, "`drawn` must be a whole number"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        mixture(parts()[0], **arguments)


def test_what_cannot_be_mixed():
    system, _ = systems.linear(0)
    base = pes(system, num_pairs=2, truncation=3, horizons=HORIZON, sigma=0.1)
    sizes = {"refresh_every": 2, "num_workers": 2, "candidates_per_worker": 2}
    hybrid = hybrid_es(
        system, base, horizons=HORIZON, noise=Noise(0.1), search=control_variate(), **sizes
    )
    with pytest.raises(ValueError, match="hybrid_es exchanges its own messages"):
        mixture([base, hybrid], names=NAMES)
    with pytest.raises(ValueError, match="at least two tasks"):
        TaskMixture(tasks=(cfg.task("quadratic"),))
    with pytest.raises(ValueError, match="must not be mixtures themselves"):
        TaskMixture(tasks=(mixed_config().task, cfg.task("mlp")))
    with pytest.raises(ValueError, match="one task's network"):
        dataclasses.replace(
            mixed_config(),
            trains="network",
            inner=cfg.InnerConfig(horizon=1),
            estimator=cfg.estimator("bptt"),
        )
