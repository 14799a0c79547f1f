"""Backpropagation against closed forms; horizons, phases and chunks.

That each estimator is unbiased, or biased as it should be, is in `test_estimators_family.py`.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from meta_train import estimators
from meta_train.estimators.particles import init_particles
from meta_train.unroll import UnrolledSystem, unroll

STATE, THETA, HORIZON, WINDOW = 4, 3, 12, 3


def linear_system(seed=0):
    """``s <- A s + B theta``, ``L = |s - y|^2 / 2``; quadratic, so smoothing adds no bias."""
    rng = np.random.default_rng(seed)
    a = rng.normal(size=(STATE, STATE))
    a *= 0.9 / np.max(np.abs(np.linalg.eigvals(a)))
    b, y = rng.normal(size=(STATE, THETA)), rng.normal(size=STATE)

    def step(theta, state, key):
        del key
        vector = jnp.concatenate([theta["x"], theta["y"][None]])
        state = a @ state + b @ vector
        return state, 0.5 * jnp.sum((state - y) ** 2)

    return UnrolledSystem(lambda theta, key, horizon: jnp.ones(STATE), step), (a, b, y)


THETA0 = {"x": np.array([0.3, -0.2]), "y": np.array(0.5)}


def exact_gradients(matrices):
    """Per-step gradients ``g[t, tau]``: of ``L_t`` by theta as used at step ``tau``."""
    a, b, y = matrices
    state, theta = np.ones(STATE), np.concatenate([THETA0["x"], [THETA0["y"]]])
    states = []
    for _ in range(HORIZON):
        state = a @ state + b @ theta
        states.append(state)
    g = np.zeros((HORIZON, HORIZON, THETA))
    for t in range(HORIZON):
        for tau in range(t + 1):
            g[t, tau] = b.T @ np.linalg.matrix_power(a, t - tau).T @ (states[t] - y)
    return g


def full_gradient(matrices):
    return exact_gradients(matrices).sum(axis=(0, 1)) / HORIZON


def truncated_gradient(matrices):
    g = exact_gradients(matrices)
    same_window = [
        g[t, tau] for t in range(HORIZON) for tau in range(t + 1) if t // WINDOW == tau // WINDOW
    ]
    return np.sum(same_window, axis=0) / HORIZON


def vector(grad):
    return np.concatenate([np.ravel(grad["x"]), np.ravel(grad["y"])])


def run_episode(estimator, theta=THETA0):
    """Mean estimate over one whole episode with theta frozen, after the first, shortened ones."""
    windows = HORIZON // WINDOW

    @jax.jit
    def run(theta):
        def body(state, key):
            grad, state, metrics = estimator.estimate(theta, state, key)
            return state, (grad, metrics["finite"])

        state = estimator.init(theta, jax.random.key(0))
        keys = jax.random.split(jax.random.key(1), 2 * windows)
        return jax.lax.scan(body, state, keys)[1]

    grads, finite = run(theta)
    assert np.all(finite == 1.0)
    grads = np.concatenate([grads["x"], grads["y"][:, None]], axis=1)
    return grads[windows:].mean(axis=0)


FIXED = estimators.fixed_horizon(HORIZON)


def test_bptt_is_the_gradient_of_the_plain_loop(x64):
    system, matrices = linear_system()
    grad = run_episode(estimators.bptt(system, num_particles=2, horizons=FIXED))
    np.testing.assert_allclose(grad, full_gradient(matrices), rtol=1e-12)


def test_tbptt_is_biased_as_predicted(x64):
    system, matrices = linear_system()
    # Four phases, four windows: every window is in every phase once.
    estimator = estimators.tbptt(system, num_particles=4, truncation=WINDOW, horizons=FIXED)
    grad = run_episode(estimator)
    np.testing.assert_allclose(grad, truncated_gradient(matrices), rtol=1e-12)
    assert np.linalg.norm(grad - full_gradient(matrices)) > 0.1 * np.linalg.norm(grad)


def test_full_es_masks_shorter_horizons(x64):
    system, matrices = linear_system()
    horizons = estimators.Horizons(np.array([6, 12]), np.array([0.5, 0.5]))
    estimator = estimators.bptt(system, num_particles=4000, horizons=horizons)
    estimate = jax.jit(estimator.estimate)
    grad = vector(estimate(THETA0, jnp.arange(4000), jax.random.key(0))[0])
    g = exact_gradients(matrices)
    short, long = g[:6].sum(axis=(0, 1)) / 9, g.sum(axis=(0, 1)) / 9
    share = (grad - short) / (long - short)  # The fraction of long episodes, in each coordinate.
    np.testing.assert_allclose(share, share[0], rtol=1e-9)
    assert abs(share[0] - 0.5) < 4.5 * 0.5 / np.sqrt(4000)


# A chunk of one particle is every estimator's in `test_estimators_family.py`.
@pytest.mark.parametrize("chunk", [4, 5, 100])
def test_chunks_change_nothing(x64, chunk):
    system, _ = linear_system()
    size = {"num_pairs": 12, "truncation": WINDOW, "horizons": FIXED, "sigma": 0.1}
    whole = run_episode(estimators.pes(system, **size))
    chunked = run_episode(estimators.pes(system, **size, chunk=chunk))
    np.testing.assert_allclose(chunked, whole, rtol=1e-12)


def test_phases_are_spread_evenly():
    system, _ = linear_system()
    estimator = estimators.pes(system, num_pairs=8, truncation=WINDOW, horizons=FIXED, sigma=0.1)
    particles = jax.jit(estimator.init)(THETA0, jax.random.key(0))
    left = np.asarray(particles.horizon - particles.position)
    np.testing.assert_array_equal(np.sort(left), [0, 0, 3, 3, 6, 6, 9, 9])


@pytest.mark.parametrize(
    ("horizon", "truncation", "num"),
    [(10**6, 1, 4000), (2**30, 1, 1000), (2**30, 2**30, 7), (100, 3, 70_000), (7, 5, 3)],
)
def test_phases_are_exact_however_large(horizon, truncation, num):
    """``windows * index`` does not fit int32 here."""
    particles = jax.jit(
        lambda key: init_particles(
            num, estimators.fixed_horizon(horizon), truncation, key, lambda *_: (), ()
        )
    )(jax.random.key(0))
    windows = -(-horizon // truncation)
    expected = [truncation * (windows - windows * i // num) for i in range(num)]
    np.testing.assert_array_equal(particles.position, expected)


def test_an_episode_without_an_end_counts(x64):
    """The longest horizon there is: each window is that of an episode which is never over."""
    system, _ = linear_system()
    endless = estimators.fixed_horizon(2**30)
    estimator = estimators.tbptt(system, num_particles=1, truncation=WINDOW, horizons=endless)
    state = estimators.synchronized(jax.jit(estimator.init)(THETA0, jax.random.key(0)))
    estimate = jax.jit(estimator.estimate)
    for _ in range(2):
        grad, state, metrics = estimate(THETA0, state, jax.random.key(1))
        assert metrics["loss"] > 0 and np.abs(vector(grad)).min() > 0
    assert state.position[0] == 2 * WINDOW


@pytest.mark.parametrize(
    ("values", "probs", "message"),
    [
        ([2**31 + 4], [1.0], "`horizon` must be .* 1073741824, .*2147483652.*never reached"),
        ([2**30 + 1], [1.0], "`horizon` must be"),
        ([0, 3], [0.5, 0.5], "`horizon` must be"),
        ([-3], [1.0], "`horizon` must be"),
        ([2.5], [1.0], "`horizon` must be"),
        ([np.nan], [1.0], "`horizon` must be"),
        ([6, 3], [0.5, 0.5], "ascending"),
        ([3, 3], [0.5, 0.5], "ascending"),
        ([], [], "`horizon` must be"),
        ([[3, 6]], [[0.5, 0.5]], "`horizon` must be"),
        (["3"], [1.0], "`horizon` must be"),
        ([3, 6], [0.5, 0.6], "`probs` must be 2 probabilities that sum to 1"),
        ([3, 6], [1.5, -0.5], "`probs` must be"),
        ([3, 6], [1.0], "`probs` must be"),
        ([3, 6], [np.nan, 1.0], "`probs` must be"),
        ([3, 6], [0.5j, 0.5], "`probs` must be"),
    ],
)
def test_horizons_that_are_none_are_refused(values, probs, message):
    with pytest.raises(ValueError, match=message):
        estimators.Horizons(np.array(values), np.array(probs))


@pytest.mark.parametrize(
    "make",
    [
        lambda: estimators.fixed_horizon(2**31 + 4),
        lambda: estimators.fixed_horizon(2.0),
        lambda: estimators.fixed_horizon(0),
        lambda: estimators.fixed_horizon(True),
        lambda: estimators.log_uniform_horizons(2.5, 10, 1),
        lambda: estimators.log_uniform_horizons(2, 10.0, 1),
        lambda: estimators.log_uniform_horizons(2, 10, 2.5),
        lambda: estimators.log_uniform_horizons(2, 2**32, 1 << 31),
    ],
)
def test_horizons_are_whole_however_they_are_made(make):
    with pytest.raises(ValueError, match=r"`(min_)?horizon`|`truncation`"):
        make()


def test_artbp_leaves_an_infinite_state_alone(x64):
    """A best loss so far starts at infinity; the cuts must not make it a number that is none."""

    def step(theta, state, key):
        x, best = state
        x = 0.9 * x + theta["y"]
        best = jnp.minimum(best, x**2)
        return (x, best), best + x

    system = UnrolledSystem(lambda theta, key, horizon: (jnp.ones(()), jnp.asarray(jnp.inf)), step)
    shared = {"num_particles": 2, "horizons": FIXED}
    exact = run_episode(estimators.bptt(system, **shared))
    uncut = run_episode(estimators.artbp(system, mean_truncation=1e13, **shared))
    np.testing.assert_allclose(uncut, exact, rtol=1e-9)


def test_nonfinite_particles_contribute_zero_and_restart():
    """A particle that diverges is dropped, counted, and back one truncation later."""

    def step(theta, state, key):
        bad, value = state
        return (bad, value + 1.0), jnp.where(bad & (value >= 2), jnp.nan, theta["y"] * value)

    def init(theta, key, horizon):
        return jax.random.bernoulli(key, 0.5), jnp.zeros([])

    system = UnrolledSystem(init, step)
    estimator = estimators.tbptt(
        system, num_particles=64, truncation=WINDOW, horizons=estimators.fixed_horizon(300)
    )
    state = jax.jit(estimator.init)(THETA0, jax.random.key(0))
    estimate = jax.jit(estimator.estimate)
    first = estimate(THETA0, state, jax.random.key(0))[2]
    for i in range(12):
        grad, state, metrics = estimate(THETA0, state, jax.random.key(i))
        assert np.all(np.isfinite(vector(grad)))
    # Every bad particle restarts in each truncation until it draws a good episode.
    assert metrics["finite"] == 1.0
    assert 0.3 < first["finite"] < 0.7


def test_log_uniform_horizons():
    horizons = estimators.log_uniform_horizons(100, 1000, 20)
    assert horizons.values[0] == 100 and horizons.max == 1000
    assert np.all(horizons.values % 20 == 0)
    np.testing.assert_allclose(horizons.probs.sum(), 1.0)
    draws = jax.vmap(horizons.draw)(jax.random.split(jax.random.key(0), 20000))
    exact = np.exp(np.random.default_rng(0).uniform(np.log(100), np.log(1000), 20000))
    z = (np.mean(draws) - np.mean(np.ceil(exact / 20) * 20)) / (np.std(draws) / 100)
    assert abs(z) < 4.5
    np.testing.assert_allclose(np.mean(draws), horizons.mean, rtol=0.02)


BUILDERS = {
    "bptt": lambda s, **k: estimators.bptt(s, num_particles=2, **k),
    "tbptt": lambda s, **k: estimators.tbptt(s, num_particles=2, **k),
    "pes": lambda s, **k: estimators.pes(s, num_pairs=2, **k),
    "full_es": lambda s, **k: estimators.full_es(s, num_pairs=2, **k),
    "truncated_es": lambda s, **k: estimators.truncated_es(s, num_pairs=2, **k),
}


@pytest.mark.parametrize("name", ["tbptt", "pes", "truncated_es"])
@pytest.mark.parametrize("truncation", [0, 21])
def test_truncations_are_within_the_horizon(name, truncation):
    system, _ = linear_system()
    sigma = {} if name == "tbptt" else {"sigma": 0.1}
    message = rf"`truncation` must be at least 1.*truncation={truncation}, horizon=20"
    with pytest.raises(ValueError, match=message):
        BUILDERS[name](
            system, truncation=truncation, horizons=estimators.fixed_horizon(20), **sigma
        )


@pytest.mark.parametrize("sigma", [0.0, -1.0, float("nan")])
def test_sigma_must_be_positive(sigma):
    system, _ = linear_system()
    with pytest.raises(ValueError, match="`sigma` must be a finite number above 0"):
        BUILDERS["full_es"](system, horizons=FIXED, sigma=sigma)


def test_unroll_matches_a_python_loop(x64):
    system, _ = linear_system()
    key = jax.random.key(0)
    state = system.init(THETA0, key, 5)
    final, losses = unroll(system, THETA0, state, key, 5)
    for step_key, loss in zip(jax.random.split(key, 5), losses, strict=True):
        state, expected = system.step(THETA0, state, step_key)
        np.testing.assert_allclose(loss, expected, rtol=1e-14)
    np.testing.assert_allclose(final, state, rtol=1e-14)
