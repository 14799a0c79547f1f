"""The contract of every estimator on what it is given: systems, trees, numbers."""

import inspect
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from meta_train import estimators
from meta_train.unroll import UnrolledSystem, with_flat_theta
from tests import systems
from tests.systems import ESTIMATORS, flat_estimates, on_system

K, TWO_WINDOWS = 3, estimators.fixed_horizon(6)
# Its states are those of its own reversible form, three real weights.
OWN_STATES = ("reversible",)


def refusal(name, system, theta):
    """What ``init`` says, before anything is computed."""
    estimator = on_system(name, system._replace(reversible=system.reversible or ()), TWO_WINDOWS, K)
    with pytest.raises(ValueError) as error:
        estimator.init(theta, jax.random.key(0))
    return str(error.value)


def plain(
    loss=lambda x: jnp.sum(x**2), state=lambda x: x, result=lambda state, loss: (state, loss)
):
    """A state of shape ``[3]`` that moves with theta."""

    def step(theta, x, key):
        x = 0.9 * x + sum(jnp.sum(leaf) for leaf in jax.tree.leaves(theta))
        return result(state(x), loss(x))

    return UnrolledSystem(lambda theta, key, horizon: jnp.ones(3), step)


THETA = {"a": jnp.ones(2), "b": jnp.ones(())}
WRONG = {
    "loss of shape (1,)": (plain(lambda x: jnp.sum(x**2)[None]), THETA, r"loss .* shape \(1,\)"),
    "loss of shape (3,)": (plain(lambda x: x**2), THETA, r"loss .* shape \(3,\)"),
    "whole loss": (plain(lambda x: jnp.sum(x > 0)), THETA, "loss .* int"),
    "bool loss": (plain(lambda x: jnp.all(x > 0)), THETA, "loss .* bool"),
    "complex loss": (plain(lambda x: jnp.sum(x) * 1j), THETA, "loss .* complex"),
    "two losses": (plain(lambda x: (x[0], x[1])), THETA, "loss .* tuple of 2"),
    "no loss": (plain(result=lambda state, loss: state), THETA, r"\(state, loss\)"),
    "longer state": (plain(state=lambda x: jnp.append(x, 0)), THETA, r"state.*\(4,\).*\(3,\)"),
    "other dtype": (plain(state=lambda x: x.astype(jnp.bfloat16)), THETA, "state.*bfloat16"),
    "other structure": (plain(state=lambda x: (x, 0)), THETA, "state structured like"),
    "whole theta": (plain(), {"n": jnp.arange(3)}, r"`theta` must hold real.*int.*\['n'\]"),
    "a whole entry": (plain(), {"a": 1.0, "n": 3}, r"`theta` must hold real.*int.*\['n'\]"),
    "complex theta": (plain(), [jnp.ones(2), 1j * jnp.ones(2)], r"`theta` .*complex.*\[1\]"),
    "a word in theta": (plain(), {"a": "b"}, r"`theta` .*str.*\['a'\]"),
    "empty theta": (plain(), {}, "`theta` must have at least one entry"),
    "theta of no entries": (plain(), {"a": jnp.ones((0, 3)), "b": None}, "at least one entry"),
}


@pytest.mark.parametrize("name", ESTIMATORS)
@pytest.mark.parametrize("case", WRONG)
def test_wrong_types_are_refused(name, case):
    system, theta, message = WRONG[case]
    assert re.search(message, refusal(name, system, theta), re.DOTALL)


def odd(theta):
    """Leaves of shape () and of no entries, Python numbers and None, in theta and the state."""
    dtype = jax.tree.leaves(theta)[-1].dtype

    def begin(theta, key, horizon):
        return 1 + systems.cheap_noise(key, 3).astype(dtype)

    def move(theta, step):
        return (0.1 * theta["vector"] * theta["number"]).astype(dtype)

    def observe(theta, w, step, key):
        noise = systems.cheap_noise(key, 1)[0].astype(dtype)
        return jnp.sum(w**2 * theta["scalar"]) + noise * jnp.sum(theta["none at all"]) + noise

    reversible = systems.undoable(begin, move, observe, dtype)

    def init(theta, key, horizon):
        inner = reversible.init(theta, key, horizon)
        return {"inner": inner, "half": 0.5, "no": None, "none": jnp.zeros((0, 2)), "count": 0}

    def step(theta, state, key):
        inner, loss = reversible.step(theta, state["inner"], key)
        return state | {"inner": inner, "count": state["count"] + 1}, loss * 2 * state["half"]

    return UnrolledSystem(init, step, reversible.reversible)


ODD = {
    "none at all": np.zeros((0,), np.float32),
    "nothing": None,
    "number": 0.7,
    "scalar": np.float32(1.5),
    "vector": np.array([0.3, -0.2, 0.5], np.float32),
}


@pytest.mark.parametrize("name", ESTIMATORS)
def test_degenerate_trees(name):
    """As with theta in one vector, draw for draw; also in a loop over outer steps."""
    system = odd(ODD)
    found, metrics = flat_estimates(name, system, ODD, TWO_WINDOWS, K)
    spec = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, ODD))
    flat = with_flat_theta(system, spec)[0]
    expected, _ = flat_estimates(name, flat, ravel_pytree(ODD)[0], TWO_WINDOWS, K)
    assert np.abs(expected).min() > 1e-3 and np.all(np.asarray(metrics["finite"]) == 1)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())


def spiral(split):
    """A complex state, or the same as two real ones."""

    def init(theta, key, horizon):
        parts = systems.cheap_noise(key, 2).astype(theta.dtype)
        return (parts[0], parts[1]) if split else jax.lax.complex(parts[0], parts[1])

    def step(theta, state, key):
        z = jax.lax.complex(*state) if split else state
        z = z * jnp.exp(1j * theta[0]).astype(z.dtype) * theta[1] + theta[2]
        loss = jnp.abs(z - 1) ** 2 + jnp.real(z**2 * systems.cheap_noise(key, 1)[0])
        return (jnp.real(z), jnp.imag(z)) if split else z, loss.astype(theta.dtype)

    return UnrolledSystem(init, step)


# Each way to take a state apart: backpropagation with and without cuts, forward derivatives, an
# old gradient as a guide, the candidates of Hybrid-ES, and none at all (`pes`).
STATES = [name for name in ESTIMATORS if name not in OWN_STATES]
TAKEN_APART = ("artbp", "bptt", "forward_gradient", "guided_es", "hybrid_es", "pes", "uoro")


@pytest.mark.parametrize("name", systems.some_fast(STATES, TAKEN_APART))
def test_a_complex_state_is_two_real_ones(name):
    theta = jnp.array([0.4, 0.9, 0.3], jnp.float32)
    found, expected = (
        flat_estimates(name, spiral(split), theta, TWO_WINDOWS, K)[0] for split in (False, True)
    )
    assert np.abs(expected).max() > 1e-3
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())


def ending_schedule(rest):
    """A schedule ``sqrt(7 - t)``, which after seven steps is not a number, or rests."""

    def init(theta, key, horizon):
        return jnp.sum(theta), jnp.zeros((), theta.dtype)

    def step(theta, state, key):
        x, t = state
        left = jnp.where(t < 7, 7 - t, 1) if rest else 7 - t
        x = x + jnp.sqrt(left) * jnp.sin(theta[0]) + theta[1] * systems.cheap_noise(key, 1)[0]
        return (x, t + 1), x**2 + jnp.log(left) * theta[1]

    return UnrolledSystem(init, step)


# Where derivatives rest after the end: in whole episodes, in windows, forward, behind the cuts of
# `artbp`, the guide's. The others run no derivative, or by the same functions.
RESTING = ("artbp", "bptt", "guided_es", "hybrid_es", "pes_analytic", "tbptt", "uoro")


@pytest.mark.parametrize("name", systems.some_fast(STATES, RESTING))
def test_steps_after_the_end_of_an_episode_are_harmless(name):
    """Seven steps in truncations of five: the last three do not count, whatever they do."""
    horizons = estimators.Horizons(np.array([7, 10]), np.array([1.0, 0.0]))
    theta = jnp.array([0.5, 0.3], jnp.float32)
    found, metrics = flat_estimates(name, ending_schedule(False), theta, horizons, 5)
    expected, _ = flat_estimates(name, ending_schedule(True), theta, horizons, 5)
    assert np.all(np.asarray(metrics["finite"]) == 1)
    assert np.abs(expected).min() > 1e-3
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())


def told(horizons):
    """Losses that count at the last step of the horizon that the start was told, theta's alone."""

    def begin(theta, key, horizon):
        return jnp.ones(3, jnp.float32).at[0].set(jnp.asarray(horizon, jnp.float32))

    def move(theta, step):
        return jnp.array([0.0, 0.1, 0.1], jnp.float32) * theta

    def observe(theta, w, step, key):
        return horizons.mean * theta[0] * (step == jnp.round(w[0]) - 1)

    return systems.undoable(begin, move, observe)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_the_drawn_horizon_reaches_the_start_of_every_episode(name):
    """The mean loss is theta if the start is told how long its episode is; else some episodes
    have no last step, or one too early."""
    horizons = estimators.Horizons(np.array([K, 3 * K]), np.array([0.5, 0.5]))
    theta = jnp.array([1.0, 0.5, 0.5], jnp.float32)
    _, metrics = flat_estimates(name, told(horizons), theta, horizons, K, num_steps=48)
    losses = np.asarray(metrics["loss"])
    if name in ("bptt", "artbp", "reversible", "hybrid_es"):  # Every estimate is of whole episodes.
        np.testing.assert_allclose(losses, 1.0, rtol=0.3 if name == "hybrid_es" else 1e-4)
    assert abs(losses.mean() - 1) < 0.15  # Told the longest always, it is a half.


def test_a_start_that_takes_no_horizon_is_refused():
    system = plain()._replace(init=lambda theta, key: jnp.ones(3))
    message = refusal("pes", system, THETA)
    assert (
        "`system.init` must take (theta, key, horizon), got one that takes (theta, key)" in message
    )


COUNTS = (
    "num_particles",
    "num_pairs",
    "truncation",
    "noise_period",
    "num_surrogates",
    "pairs_per_particle",
    "chunk",
    "refresh_every",
    "num_workers",
    "candidates_per_worker",
    "num_tasks",
    "top",
)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_counts_are_whole_numbers(name):
    asked = [
        key for key in inspect.signature(getattr(estimators, name)).parameters if key in COUNTS
    ]
    assert asked
    for argument in asked:
        for value in (2.5, 4.0, True, "4", 0, -2, np.float32(2), 2**40):
            if argument == "noise_period" and value == 2**40:
                continue  # As long as an episode.
            with pytest.raises(ValueError, match=f"`{argument}.*{argument}"):
                on_system(name, plain(), TWO_WINDOWS, **{"truncation": 2, argument: value})


@pytest.mark.parametrize("name", ESTIMATORS)
def test_lengths_of_episodes_are_horizons(name):
    for value in (6, None, [3, 6], np.array(6), "6"):
        with pytest.raises(ValueError, match=r"`horizons` must be a distribution .*fixed_horizon"):
            on_system(name, plain(), value, truncation=K)


@pytest.mark.parametrize("name", ESTIMATORS)
@pytest.mark.parametrize("x64", [False, True], ids=["default", "x64"])
def test_types_stay(name, x64):
    """Whatever the default type, states and gradients keep theirs: outer steps may be scanned."""
    low = "bfloat16" if name not in OWN_STATES else "float32"
    with jax.enable_x64(x64):
        theta = jax.tree.map(lambda x: jnp.asarray(x, "float32" if x64 else low), ODD)
        estimator = on_system(name, odd(theta), TWO_WINDOWS, K)

        def steps(theta):
            state = estimator.init(theta, jax.random.key(0))

            def body(carry, key):
                grad, state, _ = estimator.estimate(theta, carry[0], key)
                return (state, jax.tree.map(jnp.add, carry[1], grad)), None

            zeros = jax.tree.map(jnp.zeros_like, theta)
            return jax.lax.scan(body, (state, zeros), jax.random.split(jax.random.key(1), 2))[0]

        types = [leaf.dtype for leaf in jax.tree.leaves(jax.eval_shape(steps, theta)[1])]
        assert types == [leaf.dtype for leaf in jax.tree.leaves(theta)]


# The estimates of `reparam` are divided by no sigma, and right with any.
DIVIDED_BY_SIGMA = [
    name
    for name in ESTIMATORS
    if name in {*systems.PERTURBING, systems.HYBRID} and name != "reparam"
]


@pytest.mark.parametrize("name", DIVIDED_BY_SIGMA)
def test_a_sigma_below_the_resolution_of_theta_is_refused(name):
    theta = {"small": jnp.zeros(3, "float32"), "large": jnp.array([0.1, 1.0], "float32")}
    fine, lost = (on_system(name, plain(), TWO_WINDOWS, K, sigma=s) for s in (1e-6, 1e-8))
    fine.init(theta, jax.random.key(0))
    with pytest.raises(ValueError, match=r"`sigma` must move every entry.*sigma=.*float32.*large"):
        lost.init(theta, jax.random.key(0))
    lost.init({"a": jnp.zeros(3)}, jax.random.key(0))
    for sigma in (1e-25, 1e25):
        with pytest.raises(ValueError, match="`sigma` must"):
            on_system(name, plain(), TWO_WINDOWS, K, sigma=sigma).init(theta, jax.random.key(0))


@pytest.mark.parametrize("name", DIVIDED_BY_SIGMA)
def test_entries_that_outgrow_sigma_are_counted(name):
    """Theta grows in training: of its four entries one is now too large for a sigma of 0.01."""
    estimator = on_system(name, plain(), TWO_WINDOWS, K, sigma=0.01)
    key = jax.random.key(0)

    def unperturbed(theta):
        state = estimator.init(jnp.ones(4, "float32"), key)
        if name == systems.HYBRID:  # A step between refreshes.
            state = state._replace(shared=state.shared._replace(step=jnp.int32(1)))
        return estimator.estimate(theta, state, key)[2]["unperturbed"]

    grown = jnp.array([0.0, 1.0, 1e4, 1e7], "float32")
    np.testing.assert_allclose(jax.jit(unperturbed)(grown), 0.25)
