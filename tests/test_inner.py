"""Inner training as an unrolled system: what the optimizer and the losses know of the horizon."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from launch import config as cfg
from launch import suites
from learned_opt import LearnedOptimizer, learnable_schedule
from meta_train import inner
from meta_train.inner import inner_training, step_loss
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


def losses_of(horizon, task=TASK, steps=10, **settings):
    theta = OPTIMIZER.init(jax.random.key(0))
    system = inner_training(task, OPTIMIZER, **settings)
    state = system.init(theta, jax.random.key(1), horizon)
    return np.asarray(unroll(system, theta, state, jax.random.key(2), steps)[1], np.float64)


def test_late_steps_count_most():
    """The last ``ceil(horizon / 5)`` steps share 0.8; the weights of a run are 1 in the mean."""
    horizons = np.arange(1, 42)
    weights = jax.jit(
        jax.vmap(lambda horizon: step_loss(jnp.ones(41), jnp.arange(41), horizon, "late", None))
    )(horizons)
    for horizon, found in zip(horizons, np.asarray(weights), strict=True):
        found = found[:horizon]
        late = -(-horizon // 5)
        expected = np.full(horizon, 0.2)
        expected[-late:] += 0.8 * horizon / late
        np.testing.assert_allclose(found, expected, rtol=1e-6)
        np.testing.assert_allclose(np.mean(expected), 1, rtol=1e-12)
        if horizon % 5 == 0:
            np.testing.assert_allclose(found[-1], 4.2, rtol=1e-6)
    losses, weighed = (losses_of(7, steps=7, reduction=r) for r in ("mean", "late"))
    np.testing.assert_allclose(weighed, losses * ([0.2] * 5 + [3.0] * 2), rtol=1e-6)


def test_losses_as_shares_of_a_constant_predictors():
    """By the formula; above three times it, and where it is not finite, the loss counts as that."""

    for constant in (0.5, 1e-3, 1e9):
        task = TASK._replace(constant_loss=lambda instance, c=constant: jnp.float32(c))
        losses, found = losses_of(10), losses_of(10, task, scale="log")
        expected = np.log(np.minimum(losses, 3 * constant) / constant + 0.01)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    for broken in (np.inf, np.nan, -np.inf):
        task = TASK._replace(
            constant_loss=lambda instance: jnp.float32(2.0),
            loss=lambda p, i, b, k, x=broken: x + 0 * jnp.sum(p),
        )
        np.testing.assert_allclose(losses_of(1, task, 1, scale="log"), np.log(3.01), rtol=1e-6)


def test_the_words_of_the_command_line_are_those_of_inner_training():
    """Written down twice, as the command line is read before JAX is imported."""
    assert cfg.META_LOSSES == inner.META_LOSSES and cfg.SCALES == inner.SCALES
    assert set(cfg.REDUCTIONS) - {"telescoped"} == set(inner.REDUCTIONS)
    assert suites.MAX_HORIZON == inner.MAX_LENGTH


@pytest.mark.parametrize("scale", ["loss", "log"])
def test_training_and_held_back_batches_count_alike(scale):
    """The mean of what each alone gives; batches of the two splits differ by a constant here."""
    task = TASK._replace(
        constant_loss=lambda instance: jnp.float32(2.0),
        batch=lambda instance, key, split: jnp.float32(0.7 * (split == "validation")),
        loss=lambda params, instance, batch, key: jnp.sum(params**2) + batch,
    )
    train, held_back, both = (
        losses_of(10, task, scale=scale, meta_loss=name) for name in ("train", "validation", "both")
    )
    np.testing.assert_allclose(both, (train + held_back) / 2, rtol=1e-6)
    assert np.all(abs(both - train) > 1e-3)


BAD_CONSTANTS = [0.0, -1.0, np.nan, np.inf, -np.inf]


@pytest.mark.parametrize("constant", BAD_CONSTANTS)
def test_shares_of_no_number_are_refused(constant):
    """Where it is known; where it is not, all losses of the run are NaN, whatever the ceiling."""
    first = TASK.sample(jax.random.key(0))["center"]

    def at_others(instance):
        return jnp.where(jnp.all(instance["center"] == first), 2.0, constant)

    message = r"`task.constant_loss` must be a finite number above 0 for scale='log', got"
    always = TASK._replace(constant_loss=lambda instance: jnp.float32(constant))
    with pytest.raises(ValueError, match=message):
        inner_training(always, OPTIMIZER, scale="log")
    theta = OPTIMIZER.init(jax.random.key(0))
    for loss in (TASK.loss, lambda p, i, b, k: np.inf + 0 * jnp.sum(p)):
        task = TASK._replace(constant_loss=at_others, loss=loss)
        system = inner_training(task, OPTIMIZER, scale="log", loss_ceiling=2.0, run_weight=3.0)
        with pytest.raises(ValueError, match=message):
            system.init(theta, jax.random.key(1), 3)

        @jax.jit
        def losses(key, system=system):
            return unroll(system, theta, system.init(theta, key, 3), key, 3)[1]

        np.testing.assert_array_equal(losses(jax.random.key(1)), np.full(3, np.nan))


@pytest.mark.parametrize("constant", [1, None, jnp.ones(1), jnp.complex64(1)])
def test_a_constant_is_a_real_scalar(constant):
    task = TASK._replace(constant_loss=lambda instance: constant)
    with pytest.raises(ValueError, match=r"`task.constant_loss` must give a loss that is"):
        inner_training(task, OPTIMIZER, scale="log")


def test_runs_may_weigh_alike():
    for horizon in (2, 10):
        losses = losses_of(horizon, steps=horizon)
        alike = losses_of(horizon, steps=horizon, run_weight=10)
        np.testing.assert_allclose(alike, losses * 10 / horizon, rtol=1e-6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scale": "logarithm"}, r"`scale` must be one of \['loss', 'log'\], got 'logarithm'"),
        ({"scale": "log"}, "`task` must have a `constant_loss` for scale='log'"),
        ({"reduction": "later"}, "`reduction` must be one of"),
        ({"reduction": None}, "`reduction` must be one of"),
        ({"meta_loss": ["train"]}, "`meta_loss` must be one of"),
        ({"scale": np.array(["loss", "log"])}, "`scale` must be one of"),
        *(
            ({name: bad}, f"`{name}` must be a finite number above 0, got {name}=")
            for name in ("run_weight", "loss_ceiling")
            for bad in (0.0, -1.0, True, np.inf, np.nan, "1", np.ones(2))
        ),
    ],
)
def test_wrong_meta_losses_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        inner_training(TASK._replace(constant_loss=None), OPTIMIZER, **settings)


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


@pytest.mark.parametrize("spoil", [lambda u: u[:1], lambda u: u[None], lambda u: {"a": u}])
def test_updates_of_another_shape_are_refused(spoil):
    """They would be broadcast to the parameters."""

    def bind(theta, num_steps):
        del theta, num_steps
        return optax.GradientTransformation(lambda p: (), lambda u, s, p=None: (spoil(u), s))

    system = inner_training(TASK, LearnedOptimizer(lambda key: {}, bind))
    state = system.init({}, jax.random.key(0), 5)
    with pytest.raises(ValueError, match="`learned_optimizer` must return updates of the param"):
        system.step({}, state, jax.random.key(1))


@pytest.mark.parametrize("name", ["mlp", "rnn_lm"])
def test_looking_at_the_constant_loss_is_one_program(name):
    """Evaluated at once in a caller's trace, each operation would be one."""
    task = cfg.task("reparametrized", base=cfg.task(name)).make()
    compiled = []

    def count(event, seconds, **_):
        compiled.extend([event] if event.endswith("backend_compile_duration") else [])

    jax.random.key(0), jnp.isfinite(jnp.float32(1)) & (jnp.float32(1) > 0)  # Themselves compiled.
    jax.monitoring.register_event_duration_secs_listener(count)
    try:
        inner_training(task, OPTIMIZER, scale="log")
    finally:
        jax.monitoring.unregister_event_duration_listener(count)
    assert len(compiled) <= 3


@pytest.mark.parametrize("around", [jax.jit, jax.vmap])
@pytest.mark.parametrize("disabled", [False, True])
def test_the_constant_loss_is_looked_at_while_the_caller_is_traced(around, disabled):
    def made(constant):
        def fn(x):
            task = TASK._replace(constant_loss=lambda instance: jnp.float32(constant))
            inner_training(task, OPTIMIZER, scale="log")
            return x

        return around(fn)

    with jax.disable_jit(disabled):
        np.testing.assert_array_equal(made(1.0)(jnp.ones(2)), np.ones(2))
        with pytest.raises(ValueError, match="above 0 for scale='log', got 0"):
            made(0.0)(jnp.ones(2))
