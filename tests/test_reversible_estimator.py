"""The reversible learned optimizer and the estimator that walks its runs back."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

from learned_opt import mlp_optimizer, reversible_mlp_optimizer
from meta_train.estimators import bptt, fixed_horizon, log_uniform_horizons, reversible
from meta_train.estimators.horizons import Horizons
from meta_train.inner import inner_training
from meta_train.reversible import DOUBLE, explain
from meta_train.reversible.dynamics import Dynamics
from meta_train.reversible.inner import reversible_inner_training
from meta_train.reversible.system import Start, episode_gradient, plan, reversible_system
from meta_train.unroll import unroll
from tasks.base import Task

pytestmark = pytest.mark.exact


def regression(dtype=np.float32):
    """Fitting a random teacher with a small tanh network, on fresh inputs."""

    def init(instance, key):
        del instance
        w = 0.5 * jax.random.normal(key, (6, 5), dtype)
        return {"b": jnp.zeros(5, dtype), "w": w[:5], "out": w[5]}

    def batch(instance, key, split):
        x = jax.random.normal(key, (8, 5), dtype)
        return x, jnp.sin(x @ instance) + (0.1 if split == "validation" else 0.0)

    def loss(params, instance, batch, key):
        del instance, key
        x, y = batch
        return jnp.mean((jnp.tanh(x @ params["w"] + params["b"]) @ params["out"] - y) ** 2)

    return Task(lambda key: jax.random.normal(key, (5,), dtype), init, batch, loss)


def make(dtype=np.float32, step_mult=0.01, kind=reversible_inner_training, **kwargs):
    optimizer = reversible_mlp_optimizer((8,), step_mult=step_mult)
    theta = jax.tree.map(lambda x: x.astype(dtype), optimizer.init(jax.random.key(1)))
    return kind(regression(dtype), optimizer, **kwargs), theta


def relative_error(a, b):
    # In NumPy, which compiles nothing.
    a, b = (np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)]) for tree in (a, b))
    assert np.linalg.norm(b) > 1e-6, "a comparison with zero proves nothing"
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def episode(system, theta, key, keys):
    """The mean loss of an episode, its derivative by theta and the report."""

    @jax.jit
    def run(theta):
        return episode_gradient(system.reversible, theta, key, len(keys), keys, jnp.mean)

    return run(theta)


def estimates(estimator, theta, key):
    state = estimator.init(theta, jax.random.key(3))
    grad, _, metrics = jax.jit(estimator.estimate)(theta, state, key)
    return grad, metrics


@pytest.mark.parametrize(
    "kwargs",
    [
        {"meta_loss": "fresh", "loss_ceiling": 1.6},
        pytest.param({"meta_loss": "validation"}, marks=pytest.mark.slow),
        {"meta_loss": "validation", "reduction": "last"},
        pytest.param({"meta_loss": "both"}, marks=pytest.mark.slow),
        pytest.param({"meta_loss": "both", "reduction": "last"}, marks=pytest.mark.slow),
        pytest.param({"meta_loss": "train", "reduction": "last"}, marks=pytest.mark.slow),
    ],
    ids=lambda kwargs: " ".join(map(str, kwargs.values())),
)
def test_every_meta_loss_equals_bptt_through_ordinary_inner_training(kwargs, x64):
    """Two implementations of the inner run, with the same keys; of drawn lengths, too."""
    kwargs = {"dtype": np.float64, "step_mult": 0.003} | kwargs
    system, theta = make(**kwargs, fixed=DOUBLE)
    plain, _ = make(**kwargs, kind=inner_training)
    drawn = log_uniform_horizons(20, 60, 20)
    horizons = fixed_horizon(30) if "reduction" in kwargs else drawn
    population = {"num_particles": 2, "horizons": horizons}
    grad, metrics = estimates(reversible(system, **population), theta, jax.random.key(7))
    assert sum(metrics[name] for name in metrics if name.startswith("failed_")) == 0.0
    expected, expected_metrics = estimates(bptt(plain, **population), theta, jax.random.key(7))
    assert metrics["exact"] == 1.0
    assert metrics["loss"] == pytest.approx(float(expected_metrics["loss"]), rel=1e-9)
    assert relative_error(grad, expected) < 1e-7
    if "loss_ceiling" in kwargs:

        @jax.jit
        def losses(theta):
            state = plain.init(theta, jax.random.key(0), 30)
            return unroll(plain, theta, state, jax.random.key(1), 30)[1]

        capped = losses(theta) == kwargs["loss_ceiling"]
        assert 3 < np.sum(capped) < 27, "a ceiling that caps all or nothing proves nothing"


def test_estimate_equals_bptt_in_single_on_a_parallel_map():
    """Two devices, one particle each; the scoped 64-bit state must survive `pmap`."""
    system, theta = make(step_mult=0.003)
    kwargs = {"num_particles": 2, "horizons": fixed_horizon(60)}
    estimator, key = reversible(system, **kwargs), jax.random.key(7)
    ids = estimator.init(theta, key)
    on_devices = jax.pmap(estimator.estimate, in_axes=(None, 0, None))
    grads, _, metrics = on_devices(theta, ids.reshape(2, 1), key)
    expected, _ = estimates(bptt(system, **kwargs), theta, key)
    assert np.all(metrics["exact"] == 1.0)
    assert relative_error(jax.tree.map(lambda g: jnp.mean(g, 0), grads), expected) < 1e-4


def test_thousands_of_inner_steps_are_recovered_to_the_bit():
    system, theta = make(step_mult=0.001)
    grad, metrics = estimates(
        reversible(system, num_particles=2, horizons=fixed_horizon(3000)), theta, jax.random.key(7)
    )
    assert metrics["exact"] == 1.0
    assert metrics["finite"] == 1.0
    assert 0 < jnp.linalg.norm(ravel_pytree(grad)[0]) < 1e6


def test_diverged_episodes_are_dropped_and_counted():
    system, theta = make(step_mult=1e30)
    grad, metrics = estimates(
        reversible(system, num_particles=2, horizons=fixed_horizon(20)), theta, jax.random.key(7)
    )
    assert metrics["exact"] == 0.0
    assert metrics["finite"] == 0.0
    assert metrics["failed_weight"] == 1.0
    assert metrics["failed_step"] == 0.0
    assert np.all(ravel_pytree(grad)[0] == 0)


def test_the_first_failure_is_counted_by_kind_and_step():
    """Half of the episodes have a loss that is not finite at step 7, all at step 12."""
    system, theta = make(step_mult=0.001)
    form = system.reversible

    def dynamics(context):
        given = form.dynamics(context)
        instance, _ = context

        def loss(theta, weights, x):
            at = jnp.where(instance[0] > 0, 7, 12)
            return jnp.where(x[0] == at, jnp.nan, given.loss(theta, weights, x))

        return given._replace(loss=loss)

    broken = system._replace(reversible=form._replace(dynamics=dynamics))
    kwargs = {"num_particles": 8, "horizons": fixed_horizon(20)}
    grad, metrics = estimates(reversible(broken, **kwargs), theta, jax.random.key(7))
    assert metrics["failed_loss"] == 1.0
    early = (12.0 - metrics["failed_step"]) / 5.0
    assert early * 8 == pytest.approx(round(float(early) * 8))
    assert 0 < early < 1
    assert np.all(ravel_pytree(grad)[0] == 0)


def test_a_program_that_replays_differently_poisons_the_whole_estimate():
    """A loss that is no function of its arguments, in one of many episodes, once in a while."""
    system, theta = make(step_mult=0.001)
    form, calls = system.reversible, iter(range(10**6))

    def dynamics(instance):
        given = form.dynamics(instance)

        def loss(theta, weights, x):
            noise = jax.pure_callback(
                lambda _: np.float32(1e-3 * (next(calls) == 33)),
                jax.ShapeDtypeStruct((), np.float32),
                jax.random.key_data(x[1]),
                vmap_method="sequential",
            )
            return given.loss(theta, weights, x) + noise * jnp.sum(weights)

        return given._replace(loss=loss)

    broken = system._replace(reversible=form._replace(dynamics=dynamics))
    estimator = reversible(broken, num_particles=4, horizons=fixed_horizon(20))
    grad, metrics = estimates(estimator, theta, jax.random.key(7))
    assert metrics["failed_replay"] + metrics["failed_start"] == 0.25
    assert metrics["exact"] == metrics["finite"] == 0.75
    assert np.all(np.isnan(ravel_pytree(grad)[0]))


def test_diverged_losses_count_as_the_ceiling(x64):
    system, theta = make(np.float64, step_mult=1e30, loss_ceiling=3.0)
    key, keys = jax.random.key(0), jax.random.split(jax.random.key(1), 20)
    value, grad, report = episode(system, theta, key, keys)
    assert not report.ok
    assert value == pytest.approx(3.0, rel=0.06)  # all but the first step
    assert np.all(np.isnan(ravel_pytree(grad)[0]))


def test_gradient_flows_through_a_start_that_depends_on_theta(x64):
    inner = make(np.float64, fixed=DOUBLE)[0].reversible
    theta = make(np.float64)[1]

    def begin(theta, key, horizon):
        start = inner.begin(theta["optimizer"], key, horizon)
        return start._replace(weights=start.weights * theta["scale"])

    def dynamics(context):
        given = inner.dynamics(context)
        return given._replace(
            loss=lambda theta, w, x: given.loss(theta["optimizer"], w, x),
            move=lambda theta, hyper, a, x: given.move(theta["optimizer"], hyper, a, x),
        )

    system = reversible_system(begin, dynamics, inner.decays, DOUBLE)
    theta = {"optimizer": theta, "scale": jnp.float64(1.2)}
    key, keys = jax.random.key(0), jax.random.split(jax.random.key(1), 30)
    value, grad, report = episode(system, theta, key, keys)
    assert explain(report) == "exact: no failure."

    @jax.jit
    @jax.value_and_grad
    def by_backpropagation(theta):
        state = system.init(theta, key, len(keys))
        return jnp.mean(jax.lax.scan(lambda s, k: system.step(theta, s, k), state, keys)[1])

    expected_value, expected = by_backpropagation(theta)
    assert value == pytest.approx(float(expected_value), rel=1e-10)
    for part in theta:
        assert relative_error(grad[part], expected[part]) < 1e-7


def test_systems_that_cannot_be_undone_are_refused():
    plain, _ = make(kind=inner_training)
    with pytest.raises(ValueError, match=r"`system` must have a reversible form.*bptt"):
        reversible(plain, num_particles=1, horizons=fixed_horizon(10))
    with pytest.raises(ValueError, match=r"`learned_optimizer` must have a reversible form"):
        reversible_inner_training(regression(), mlp_optimizer())


def test_tasks_whose_parameters_have_no_one_format_are_refused():
    task = regression()
    mixed = task._replace(
        init=lambda instance, key: task.init(instance, key) | {"h": jnp.zeros(3, jnp.bfloat16)}
    )
    with pytest.raises(ValueError, match=r"`task`.*\['bfloat16', 'float32'\].*Cast them"):
        reversible_inner_training(mixed, reversible_mlp_optimizer())


def test_tape_is_near_the_information_bound():
    spills = plan(make()[0].reversible, 5000)
    assert spills.bound_bits / 5000 == pytest.approx(1.181, rel=0.01)
    assert spills.tape_bits < 1.1 * spills.bound_bits


def test_bound_optimizer_takes_the_steps_of_the_system(x64):
    """The optax form that a user runs, against the system that is meta-trained."""
    task, optimizer = regression(np.float64), reversible_mlp_optimizer((8,), step_mult=0.01)
    theta = jax.tree.map(lambda x: x.astype(np.float64), optimizer.init(jax.random.key(1)))
    system = reversible_inner_training(task, optimizer, fixed=DOUBLE)
    state, losses = unroll(
        system, theta, system.init(theta, jax.random.key(5), 12), jax.random.key(6), 12
    )

    key_sample, key_init = jax.random.split(jax.random.key(5))
    instance = task.sample(key_sample)
    params = task.init(instance, key_init)
    transform = optimizer.bind(theta, 12)
    opt_state = transform.init(params)
    loss_and_grads, update = jax.jit(jax.value_and_grad(task.loss)), jax.jit(transform.update)
    for i, key in enumerate(jax.random.split(jax.random.key(6), 12)):
        key_batch, key_loss, _, _ = jax.random.split(key, 4)
        batch = task.batch(instance, key_batch, "train")
        loss, grads = loss_and_grads(params, instance, batch, key_loss)
        assert loss == pytest.approx(float(losses[i]), rel=1e-12)
        updates, opt_state = update(grads, opt_state)
        params = optax.apply_updates(params, updates)
    np.testing.assert_allclose(ravel_pytree(params)[0], state.weights, rtol=1e-11)


def test_decays_off_the_grid_are_refused():
    system = make()[0].reversible
    with pytest.raises(ValueError, match=r"`decays` must be positive multiples of 2\^-10"):
        reversible_system(system.begin, system.dynamics, np.array([0.9]))
    with pytest.raises(ValueError, match="`decays` must be at most 1"):
        reversible_system(system.begin, system.dynamics, np.array([1025 / 1024]))
    assert reversible_system(system.begin, system.dynamics, np.array([1.0])).reversible is not None


@pytest.mark.parametrize("bad", [{"hidden_sizes": ()}, {"step_mult": 0.0}])
def test_bad_sizes_are_refused(bad):
    with pytest.raises(ValueError, match=f"`{next(iter(bad))}` must"):
        reversible_mlp_optimizer(**bad)


def test_automatic_derivatives_of_an_exact_gradient_are_refused():
    system, theta = make()
    key, keys = jax.random.key(0), jax.random.split(jax.random.key(1), 20)

    def value(theta):
        return episode_gradient(system.reversible, theta, key, len(keys), keys, jnp.mean)[0]

    assert jax.eval_shape(value, theta).shape == ()
    with pytest.raises(TypeError, match="the estimator `reversible`"):
        jax.grad(value)(theta)


def test_a_task_with_an_empty_tensor_is_trained_as_without_it():
    task, (system, theta) = regression(), make()
    fuller = task._replace(
        init=lambda instance, key: task.init(instance, key) | {"a": jnp.zeros((0, 2))}
    )
    optimizer = reversible_mlp_optimizer((8,), step_mult=0.01)
    with_empty = reversible_inner_training(fuller, optimizer)
    kwargs = {"num_particles": 1, "horizons": fixed_horizon(5)}
    grads = [
        estimates(reversible(s, **kwargs), theta, jax.random.key(7))[0]
        for s in (system, with_empty)
    ]
    assert relative_error(*grads) < 1e-5
    nothing = task._replace(init=lambda instance, key: {"a": jnp.zeros((0, 2))})
    with pytest.raises(ValueError, match="`task` must have at least one parameter"):
        reversible_inner_training(nothing, optimizer)


def test_what_comes_after_a_drawn_horizon_does_not_count(x64):
    """Equal to ``bptt``, particle by particle; one whose horizon is longer fails in both."""
    short = 3  # Of horizons 3 and 8.
    kinds = ("infinite", "no derivative", "diverges", "move", "observed")

    def system(kind):
        def late(name, x):
            return (x[0] >= short) & (kind == kinds.index(name))

        def loss(theta, w, x):
            value = 0.5 * jnp.sum((w - theta["aim"]) ** 2)
            value += jnp.sqrt(jnp.where(late("no derivative", x), 0.0, 1.0) * value)
            value *= jnp.where(late("diverges", x), 1e40, 1.0)
            return value + jnp.where(late("infinite", x), jnp.inf, 0.0)

        def move(theta, hyper, a, x):
            size = jnp.sqrt(jnp.where(late("move", x), 0.0, 1.0) * a[0] ** 2)
            return -theta["rate"] * jnp.sign(a[0]) * size

        def observe(theta, loss, w, x):
            return loss + jnp.sqrt(jnp.where(late("observed", x), 0.0, 1.0) * jnp.sum(w**2))

        def decay(theta, hyper):
            return jnp.array([[0.5]])

        def absorb(theta, hyper, gradient, x):
            return gradient[None]

        return reversible_system(
            lambda theta, key, horizon: Start(
                (), theta["start"] + jnp.arange(2.0), jnp.zeros((1, 2))
            ),
            lambda context: Dynamics(loss, decay, absorb, move, observe),
            np.array([0.5]),
            DOUBLE,
        )

    theta = {"aim": jnp.array([3.0, -1.0]), "rate": jnp.array(0.1), "start": jnp.array(0.5)}
    horizons = Horizons(np.array([short, 8]), np.array([0.5, 0.5]))

    def estimate(make):
        def one(kind, key):
            estimator = make(system(kind), num_particles=1, horizons=horizons)
            return estimator.estimate(theta, jnp.arange(1, dtype=jnp.int32), key)

        return jax.jit(one)

    reversed_, expected = estimate(reversible), estimate(bptt)
    for kind, name in enumerate(kinds):
        finite = []
        for seed in range(4, 9):
            (grad, _, metrics), (other, _, other_metrics) = (
                one(kind, jax.random.key(seed)) for one in (reversed_, expected)
            )
            finite.append(float(metrics["finite"]))
            assert other_metrics["finite"] == finite[-1], name
            if finite[-1]:
                assert metrics["exact"] == 1 and relative_error(grad, other) < 1e-7, name
                np.testing.assert_allclose(metrics["loss"], other_metrics["loss"], rtol=1e-9)
        assert set(finite) == {0.0, 1.0}, name


@pytest.mark.parametrize("wrong", [lambda x: x[None], lambda x: x + 0j, lambda x: jnp.int32(x)])
def test_losses_that_are_no_real_scalar_are_refused(wrong):
    task = regression()
    bad = task._replace(loss=lambda *args: wrong(task.loss(*args)))
    with pytest.raises(ValueError, match=r"`task.loss` must give a loss that is a real float of"):
        reversible_inner_training(bad, reversible_mlp_optimizer((8,)))
