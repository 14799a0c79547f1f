"""Every estimator against exact gradients: equal where it must be, unbiased where it claims to be.

Statistical tests use fixed keys, over 2e5 draws in float64, and demand |z| <= 4.5 in every
coordinate together with a standard error far below the bias they are there to detect.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

from meta_train import estimators as est
from meta_train.estimators import fixed_horizon
from meta_train.unroll import UnrolledSystem
from tests import systems

T, K = 12, 3
Z = 4.5
SIGMA = 0.3
REPLICATES, PAIRS = 512, 400


def build(name, system, num, horizons, truncation=K, sigma=SIGMA, chunk=None):
    """The estimator of that name with ``num`` particles."""
    full = {"horizons": horizons, "chunk": chunk}
    online = dict(full, truncation=truncation)
    kwargs = {
        "bptt": dict(full, num_particles=num),
        "tbptt": dict(online, num_particles=num),
        "artbp": dict(full, num_particles=num, mean_truncation=4.0),
        "rtrl": dict(online, num_particles=num),
        "uoro": dict(online, num_particles=num),
        "forward_gradient": dict(online, num_particles=num),
        "full_es": dict(full, num_pairs=num, sigma=sigma),
        "truncated_es": dict(online, num_pairs=num, sigma=sigma),
        "reparam": dict(full, num_pairs=num, sigma=sigma),
        "reparam_es": dict(full, num_particles=num, pairs_per_particle=6, sigma=sigma),
        "guided_es": dict(online, num_pairs=num, num_surrogates=2, sigma=sigma),
        "pes": dict(online, num_pairs=num, sigma=sigma),
        "pes_analytic": dict(online, num_pairs=num, sigma=sigma),
        "gpes": dict(online, num_pairs=num, noise_period=2 * truncation, sigma=sigma),
        "nres": dict(online, num_pairs=num, sigma=sigma),
    }
    return getattr(est, name)(system, **kwargs[name])


DIFFERENTIATING = (
    "bptt",
    "tbptt",
    "artbp",
    "rtrl",
    "uoro",
    "forward_gradient",
    "reparam",
    "reparam_es",
    "guided_es",
    "pes_analytic",
)
EVALUATING = ("full_es", "truncated_es", "pes", "gpes", "nres")
NAMES = DIFFERENTIATING + EVALUATING


def estimate(estimator, theta, seed=0):
    """One estimate from the start of an episode, flat."""

    def run(theta):
        state = estimator.init(theta, jax.random.key(seed))
        if hasattr(state, "position"):
            state = est.synchronized(state)
        return estimator.estimate(theta, state, jax.random.key(seed + 100))

    grad, state, _ = jax.jit(run)(theta)
    return np.asarray(ravel_pytree(grad)[0]), state


def assert_equal(a, b, tolerance):
    np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * np.abs(b).max())


# Equalities to rounding, on the same draws.


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_rtrl_is_bptt(x64, seed):
    system, theta = systems.nonlinear(seed)
    exact = estimate(build("bptt", system, 3, fixed_horizon(T)), theta)[0]
    forward = estimate(build("rtrl", system, 3, fixed_horizon(T), truncation=T), theta)[0]
    assert_equal(forward, exact, 1e-10)


def test_rtrl_is_bptt_in_single_precision():
    system, theta = systems.nonlinear(2)
    exact = estimate(build("bptt", system, 3, fixed_horizon(T)), theta)[0]
    forward = estimate(build("rtrl", system, 3, fixed_horizon(T), truncation=T), theta)[0]
    assert exact.dtype == np.float32
    assert_equal(forward, exact, 1e-5)


def test_rtrl_truncations_add_up_to_the_whole_gradient(x64):
    system, theta = systems.linear(3, state_size=5, theta_size=7)
    exact = estimate(build("bptt", system, 1, fixed_horizon(T)), theta)[0]
    parts = systems.replicates(build("rtrl", system, 1, fixed_horizon(T)), theta, 1, T // K)
    assert_equal(parts[0], exact, 1e-10)


def test_bptt_is_jax_grad_of_a_plain_loop(x64):
    system, theta = systems.nonlinear(0)
    key, num = jax.random.key(3), 3

    def loss(theta, particle_id):
        key_restart, key_data = jax.random.split(jax.random.fold_in(key, particle_id))
        state = system.init(theta, jax.random.split(key_restart)[1], T)
        total = 0.0
        for step_key in jax.random.split(key_data, T):
            state, loss = system.step(theta, state, step_key)
            total += loss
        return total / T

    estimator = build("bptt", system, num, fixed_horizon(T))

    @jax.jit
    def both(theta):
        state = estimator.init(theta, jax.random.key(0))
        grads = jax.vmap(jax.grad(loss), (None, 0))(theta, jnp.arange(num))
        return estimator.estimate(theta, state, key)[0], grads

    grad, grads = both(theta)
    expected = ravel_pytree(jax.tree.map(lambda g: np.mean(g, axis=0), grads))[0]
    np.testing.assert_allclose(ravel_pytree(grad)[0], expected, rtol=1e-10)


def test_bptt_is_the_central_difference(x64):
    system, theta = systems.nonlinear(0)
    flat, unravel = ravel_pytree(theta)
    estimator = build("bptt", system, 3, fixed_horizon(T))
    exact = estimate(estimator, theta)[0]

    @jax.jit
    def loss(flat):
        state = estimator.init(unravel(flat), jax.random.key(0))
        return estimator.estimate(unravel(flat), state, jax.random.key(100))[2]["loss"]

    step = 1e-6 * np.eye(flat.size)
    up, down = (np.array([loss(point) for point in flat + h]) for h in (step, -step))
    assert_equal((up - down) / 2e-6, exact, 1e-6)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"name": "tbptt", "truncation": T}, {"name": "bptt"}),
        ({"name": "pes_analytic", "truncation": T}, None),
        ({"name": "pes", "truncation": T}, {"name": "full_es"}),
        ({"name": "nres", "truncation": T}, {"name": "full_es"}),
        ({"name": "gpes", "truncation": T}, {"name": "pes", "truncation": T}),
    ],
    ids=lambda case: case and case["name"],
)
def test_one_truncation_per_episode_is_the_full_estimator(x64, one, other):
    system, theta = systems.nonlinear(1)
    if other is None:  # Only the analytic part is left; the ES keys differ from those of BPTT.
        other = {"name": "tbptt", "truncation": T}
        system = systems.linear(1)[0]
        theta = systems.linear(1)[1]
    estimates = [
        estimate(build(**case, system=system, num=3, horizons=fixed_horizon(T)), theta)[0]
        for case in (one, other)
    ]
    assert np.abs(estimates[0]).max() > 1e-3
    assert_equal(*estimates, 1e-10)


def test_gpes_with_a_perturbation_per_truncation_is_pes(x64):
    system, theta = systems.nonlinear(1)
    shared = {"num_pairs": 8, "truncation": K, "horizons": fixed_horizon(T), "sigma": SIGMA}
    pes = systems.replicates(est.pes(system, **shared), theta, 2, T // K)
    gpes = systems.replicates(est.gpes(system, noise_period=K, **shared), theta, 2, T // K)
    nres = systems.replicates(est.nres(system, **shared), theta, 2, T // K)
    longer = systems.replicates(est.gpes(system, noise_period=2 * T, **shared), theta, 2, T // K)
    assert_equal(gpes, pes, 1e-10)
    assert_equal(longer, nres, 1e-10)
    assert np.abs(nres - pes).max() > 1e-3


def test_noise_is_drawn_anew_once_per_period_and_episode(x64):
    system, theta = systems.linear(0)
    estimator = build("gpes", system, 1, fixed_horizon(T))  # A period of two truncations.
    state = est.synchronized(jax.jit(estimator.init)(theta, jax.random.key(0)))
    sums, draws = [], []
    estimate = jax.jit(estimator.estimate)
    for step in range(5):
        _, state, _ = estimate(theta, state, jax.random.key(step))
        sums.append(np.asarray(state.memory[0][0]))
        draws.append(np.asarray(state.memory[1][0]))
    assert (draws[0] == draws[1]).all() and (draws[2] == draws[3]).all()
    assert len({tuple(draw) for draw in draws}) == 3
    assert_equal(
        np.array(sums), np.array([draws[0], draws[0], *2 * [draws[0] + draws[2]], draws[4]]), 1e-12
    )


def test_a_mid_episode_start_has_a_perturbation():
    system, theta = systems.nonlinear(0)
    state = jax.jit(build("nres", system, 4, fixed_horizon(T)).init)(theta, jax.random.key(0))
    norms = jax.vmap(lambda eps: jnp.linalg.norm(ravel_pytree(eps)[0]))(state.memory[1])
    started = np.asarray(state.position % T != 0)
    assert started.sum() == 3
    np.testing.assert_array_equal(np.asarray(norms) > 0, started)


def test_forward_gradient_is_the_projected_gradient(x64):
    system, theta = systems.nonlinear(1)
    exact = estimate(build("bptt", system, 1, fixed_horizon(T)), theta)[0]
    estimator = build("forward_gradient", system, 1, fixed_horizon(T), truncation=T)
    projected, state = estimate(estimator, theta)
    direction = np.asarray(ravel_pytree(state.states.sensitivity[1])[0])
    assert_equal(projected, direction * (direction @ exact), 1e-10)


def test_artbp_without_cuts_is_bptt(x64):
    system, theta = systems.nonlinear(1)
    shared = {"num_particles": 3, "horizons": fixed_horizon(T)}
    exact = estimate(est.bptt(system, **shared), theta)[0]
    uncut = estimate(est.artbp(system, mean_truncation=1e13, **shared), theta)[0]
    assert_equal(uncut, exact, 1e-9)


def test_isotropic_guided_es_is_full_es(x64):
    system, theta = systems.nonlinear(1)
    shared = {"num_pairs": 3, "horizons": fixed_horizon(T), "sigma": SIGMA}
    isotropic = est.guided_es(system, alpha=1.0, num_surrogates=2, truncation=K, **shared)
    assert_equal(
        estimate(isotropic, theta)[0], estimate(est.full_es(system, **shared), theta)[0], 1e-10
    )


@pytest.mark.parametrize("name", ["reparam", "reparam_es"])
def test_reparam_is_exact_for_quadratic_losses(x64, name):
    system, theta = systems.linear(4)
    exact = estimate(build("bptt", system, 1, fixed_horizon(T)), theta)[0]
    pathwise = estimate(build(name, system, 4, fixed_horizon(T)), theta)[0]
    assert_equal(pathwise, exact, 1e-10 if name == "reparam" else 1e-5)


def test_a_noise_period_beyond_every_episode_is_an_episode(x64):
    system, theta = systems.linear(4)
    long = build("nres", system, 3, fixed_horizon(T))
    longer = est.gpes(
        system,
        num_pairs=3,
        truncation=K,
        horizons=fixed_horizon(T),
        noise_period=K * 2**40,
        sigma=SIGMA,
    )
    assert_equal(estimate(longer, theta)[0], estimate(long, theta)[0], 1e-12)


@pytest.mark.parametrize("name", ["guided_es", "pes", "uoro"])
def test_a_theta_in_bfloat16_is_estimated_in_it(name):
    """As well as its eight bits let it be: QR, for one, has no such type."""
    system, theta = systems.linear(4)
    low = jnp.asarray(theta, jnp.bfloat16)
    wide = UnrolledSystem(
        lambda theta, key, horizon: system.init(theta, key, horizon).astype(jnp.float32),
        lambda theta, state, key: system.step(theta.astype(jnp.float32), state, key),
    )
    grad, _ = estimate(build(name, wide, 2000, fixed_horizon(T), sigma=0.5), low)
    assert np.all(np.isfinite(grad.astype(np.float32))) and grad.dtype == jnp.bfloat16


def test_horizons_are_kept_wide():
    """Whatever integers they come in: positions are added to them."""
    given = est.Horizons(np.array([3, 100], np.int8), np.array([0.5, 0.5], np.float16))
    assert (given.values.dtype, given.probs.dtype) == (np.int64, np.float64)


def test_truncated_es_goes_on_from_the_unperturbed_run(x64):
    """Whatever sigma is: its state, and the loss it reports, are those of theta itself."""
    system, theta = systems.nonlinear(1)
    found = []
    for sigma in (1e-3, 1.0):
        estimator = build("truncated_es", system, 3, fixed_horizon(T), sigma=sigma)

        def run(theta, estimator=estimator):
            state = est.synchronized(estimator.init(theta, jax.random.key(0)))
            return estimator.estimate(theta, state, jax.random.key(1))

        grad, state, metrics = jax.jit(run)(theta)
        found.append((state.states, metrics["loss"]))
        assert optax.tree.norm(grad) > 0
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-12), *map(comparable, found))


def comparable(tree):
    """Its arrays, with keys as their numbers."""
    return [
        jax.random.key_data(x) if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) else x
        for x in jax.tree.leaves(tree)
    ]


@pytest.mark.parametrize("name", ["full_es", "truncated_es", "pes", "gpes", "nres", "guided_es"])
def test_the_halves_of_a_pair_share_everything_but_the_sign(x64, name):
    system, theta = systems.nonlinear(0)
    tiny = 1e-60  # theta +- eps is theta.
    estimates = estimate(build(name, system, 2, fixed_horizon(T), sigma=tiny), theta)[0]
    # Vectorized code may round the lanes of a batch differently in the last place.
    assert np.abs(estimates).max() * tiny < 1e-14


# Expectations.


@pytest.fixture(scope="module")
def exact():
    """By system seed: the system, theta, its gradient and the one blind across truncations."""
    with jax.enable_x64(True):
        cases = {}
        for seed, sizes in {0: (4, 3), 1: (5, 7)}.items():
            system, theta = systems.linear(seed, *sizes)
            g = systems.window_gradients(system, theta, T, K)
            cases[seed] = system, theta, g.sum((0, 1)) / T, np.einsum("ttp->p", g) / T
        return cases


# Slow: `test_theta_counts_where_it_enters_the_start` has the same of other systems, and
# `test_staggered_phases_add_up_to_the_whole_gradient` of `uoro`.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "seed"),
    [
        ("uoro", 0),
        ("full_es", 0),
        ("forward_gradient", 0),
        ("pes_analytic", 0),
        ("pes", 0),
        ("pes", 1),
        ("gpes", 0),
        ("gpes", 1),
        ("nres", 0),
        ("nres", 1),
    ],
)
def test_unbiased_for_a_quadratic_loss(x64, exact, name, seed):
    system, theta, whole, blind = exact[seed]
    estimator = build(name, system, PAIRS, fixed_horizon(T))
    samples = systems.replicates(estimator, theta, REPLICATES, T // K)
    bias = np.abs(whole - blind).max()
    assert np.abs(samples - whole).max() > 1e-9
    assert systems.standard_errors(samples).max() < 0.1 * bias
    assert np.abs(systems.z_scores(samples, whole)).max() < Z


@pytest.mark.parametrize("sigma", [pytest.param(1e-3, marks=pytest.mark.slow), 10.0])
@pytest.mark.parametrize("name", ["pes", "gpes", "nres", "pes_analytic"])
def test_the_same_draws_for_any_sigma_if_the_loss_is_quadratic(x64, exact, name, sigma):
    """The difference over a pair is linear in sigma, so the estimate does not depend on it."""
    system, theta, *_ = exact[0]
    reference, scaled = (
        systems.replicates(build(name, system, 4, fixed_horizon(T), sigma=s), theta, 2, T // K)
        for s in (SIGMA, sigma)
    )
    assert_equal(scaled, reference, 1e-8)


@pytest.mark.parametrize(
    ("mean_truncation", "alpha"),
    [
        (10.0, 2.0),
        (10 / 3, np.inf),
        pytest.param(10.0, np.inf, marks=pytest.mark.slow),
        pytest.param(10 / 3, 2.0, marks=pytest.mark.slow),
    ],
)
def test_artbp_is_unbiased_for_any_cut_probability(x64, exact, alpha, mean_truncation):
    system, theta, whole, blind = exact[0]
    estimator = est.artbp(
        system,
        num_particles=PAIRS,
        mean_truncation=mean_truncation,
        alpha=alpha,
        horizons=fixed_horizon(T),
    )
    samples = systems.replicates(estimator, theta, REPLICATES, 1)
    assert systems.standard_errors(samples).max() < 0.01 * np.abs(whole - blind).max()
    assert np.abs(systems.z_scores(samples, whole)).max() < Z


@pytest.mark.parametrize(("alpha", "uncut"), [(2.0, 6 / (7 * 8)), (np.inf, (1 - 1 / 3) ** 5)])
def test_artbp_cuts_as_often_as_it_says(x64, alpha, uncut):
    """Theta enters at the start only, so what comes back was never cut, and is reweighted.

    With ``alpha = 2`` and mean 3, ``1 - c_k = (k + 1) / (k + 3)``, so ``t`` steps pass with
    probability ``6 / ((t + 2) (t + 3))``, and the sum of these over ``t`` is the mean, 3.
    """
    horizon, num = 5, 2000

    def step(theta, state, key):
        return (state[0], state[1] + 1), jnp.where(state[1] == horizon, state[0], 0.0)

    system = UnrolledSystem(lambda theta, key, horizon: (theta, jnp.int32(0)), step)
    estimator = est.artbp(
        system, num_particles=1, horizons=fixed_horizon(horizon + 1), mean_truncation=3, alpha=alpha
    )

    def one(key):
        return estimator.estimate(jnp.float64(1.0), jnp.zeros(1, jnp.int32), key)[0]

    grads = jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(0), num)) * (horizon + 1)
    passed = grads > 0
    np.testing.assert_allclose(grads[passed], 1 / uncut, rtol=1e-9)
    assert abs(np.mean(passed) - uncut) < Z * np.sqrt(uncut * (1 - uncut) / num)


@pytest.mark.parametrize(("name", "reference"), [("uoro", "rtrl"), ("artbp", "bptt")])
def test_unbiased_on_shared_episodes_of_a_nonlinear_system(x64, name, reference):
    system, theta = systems.nonlinear(0)
    horizons = fixed_horizon(6)
    noisy, sharp = (
        systems.replicates(build(n, system, 50, horizons, truncation=6), theta, 1024, 1)
        for n in (name, reference)
    )
    difference = noisy - sharp
    assert difference.std(axis=0).min() > 1e-4
    assert np.abs(systems.z_scores(difference, 0.0)).max() < Z


def test_truncated_es_expects_truncated_backpropagation(x64, exact):
    system, theta, whole, blind = exact[0]
    estimator = build("truncated_es", system, PAIRS, fixed_horizon(T))
    samples = systems.replicates(estimator, theta, REPLICATES, T // K)
    assert np.abs(systems.z_scores(samples, blind)).max() < Z
    assert np.abs(systems.z_scores(samples, whole)).max() > 20
    backprop = build("tbptt", system, 1, fixed_horizon(T))
    assert_equal(systems.replicates(backprop, theta, 1, T // K)[0], blind, 1e-10)


# By the same functions as `pes`: `gpes`, and `truncated_es` without the sum of perturbations.
@pytest.mark.parametrize(
    "name",
    systems.some_fast(
        ["full_es", "truncated_es", "pes", "gpes", "nres", "pes_analytic", "forward_gradient"],
        ("full_es", "pes", "pes_analytic", "forward_gradient"),
    ),
)
def test_theta_counts_where_it_enters_the_start(x64, name):
    linear, theta = systems.linear(0)
    start = jnp.asarray(np.random.default_rng(1).normal(size=(4, 3)))
    system = UnrolledSystem(lambda theta, key, horizon: start @ theta, linear.step)
    constant = UnrolledSystem(lambda _, key, horizon: start @ theta, linear.step)
    expected, other = (
        np.einsum("ttp->p", g) / T if name == "truncated_es" else g.sum((0, 1)) / T
        for g in (systems.window_gradients(s, theta, T, K) for s in (system, constant))
    )
    samples = systems.replicates(
        build(name, system, PAIRS, fixed_horizon(T)), theta, REPLICATES, T // K
    )
    assert np.abs(systems.z_scores(samples, expected)).max() < Z
    assert np.abs(systems.z_scores(samples, other)).max() > 10


def test_guided_es_expects_its_covariance_times_the_gradient(x64, exact):
    system, theta, whole, blind = exact[1]
    estimator = est.guided_es(
        system,
        num_pairs=PAIRS,
        truncation=K,
        num_surrogates=1,
        horizons=fixed_horizon(T),
        sigma=SIGMA,
        alpha=0.4,
    )
    samples = systems.replicates(estimator, theta, REPLICATES, 1, burn_in=1)
    surrogate = blind / np.linalg.norm(blind)
    expected = 0.4 * whole + 0.6 * theta.size * surrogate * (surrogate @ whole)
    assert np.abs(systems.z_scores(samples, expected)).max() < Z
    assert np.abs(systems.z_scores(samples, whole)).max() > 20


def test_guided_es_is_unbiased_before_it_has_a_guide(x64, exact):
    system, theta, whole, _ = exact[1]
    estimator = build("guided_es", system, PAIRS, fixed_horizon(T))
    samples = systems.replicates(estimator, theta, REPLICATES, 1)
    assert systems.standard_errors(samples).max() < 0.02 * np.abs(whole).max()
    assert np.abs(systems.z_scores(samples, whole)).max() < Z


@pytest.mark.parametrize("name", ["pes", "nres", "uoro"])
def test_staggered_phases_add_up_to_the_whole_gradient(x64, exact, name):
    system, theta, whole, blind = exact[0]
    phases = T // K
    estimator = build(name, system, 50 * phases, fixed_horizon(T))
    samples = systems.replicates(estimator, theta, 1024, 1, burn_in=phases, together=False)
    assert np.abs(systems.z_scores(samples, whole)).max() < Z
    assert np.abs(systems.z_scores(samples, blind)).max() > 10


# The others have drawn horizons in `test_an_episode_may_end_within_a_truncation`.
@pytest.mark.parametrize(
    "name", systems.some_fast(["full_es", "rtrl", "pes", "gpes"], ("full_es",))
)
def test_random_horizons_weigh_every_inner_step_alike(x64, name):
    system, theta = systems.linear(0)
    horizons = est.Horizons(np.array([3, 6, 12]), np.array([0.5, 0.2, 0.3]))
    g = systems.window_gradients(system, theta, T, K)
    totals = [g[: h // K].sum((0, 1)) for h in horizons.values]
    expected = horizons.probs @ totals / horizons.mean
    samples = systems.replicates(build(name, system, 16, horizons), theta, 1024, 4, burn_in=24)
    assert np.abs(systems.z_scores(samples, expected)).max() < Z
    assert np.abs(systems.z_scores(samples, totals[-1] / T)).max() > 10


@pytest.mark.parametrize(
    "name",
    systems.some_fast(
        ["tbptt", "truncated_es", "rtrl", "pes", "pes_analytic", "gpes", "nres"],
        ("tbptt", "rtrl", "pes", "pes_analytic", "gpes"),
    ),
)
def test_an_episode_may_end_within_a_truncation(x64, name):
    """Steps after its end count nothing, and those before it what they count in others."""
    system, theta = systems.linear(0)
    horizons = est.Horizons(np.array([2, 5, 11]), np.array([0.4, 0.3, 0.3]))
    g = systems.window_gradients(system, theta, T, 1)
    if name in ("tbptt", "truncated_es"):
        window = np.arange(T) // K
        g = g * (window[:, None] == window)[..., None]
    expected, rounded_up = (
        horizons.probs @ [g[:h].sum((0, 1)) for h in values] / (horizons.probs @ values)
        for values in (horizons.values, -(-horizons.values // K) * K)
    )
    samples = systems.replicates(build(name, system, 16, horizons), theta, 1024, 4, burn_in=24)
    assert np.abs(systems.z_scores(samples, expected)).max() < Z
    assert np.abs(systems.z_scores(samples, rounded_up)).max() > 5


def test_telescoping_over_drawn_horizons(x64):
    """The last loss of each episode, also of one that ends within a truncation."""
    system, theta = systems.linear(0)
    horizons = est.Horizons(np.array([2, 5, 11]), np.array([0.4, 0.3, 0.3]))
    last = systems.window_gradients(system, theta, T, 1).sum(axis=1)[horizons.values - 1]
    final = est.telescoped(system, horizons)
    samples = systems.replicates(build("pes", final, 16, horizons), theta, 1024, 4, burn_in=24)
    expected = horizons.probs @ last
    assert np.abs(systems.z_scores(samples, expected)).max() < Z
    assert systems.standard_errors(samples).max() < 0.1 * np.abs(expected).max()


def test_telescoping_gives_the_gradient_of_the_last_loss(x64, exact):
    system, theta, _, _ = exact[0]
    horizons = fixed_horizon(T)
    last = systems.window_gradients(system, theta, T, 1)[-1].sum(axis=0)
    final = est.telescoped(system, horizons)
    backprop = estimate(build("bptt", final, 1, horizons), theta)[0]
    assert_equal(backprop, last, 1e-10)
    samples = systems.replicates(build("pes", final, PAIRS, horizons), theta, REPLICATES, T // K)
    assert systems.standard_errors(samples).max() < 0.1 * np.abs(last).max()
    assert np.abs(systems.z_scores(samples, last)).max() < Z


# What is smoothed: PES and full ES differ beyond quadratic losses.


def smoothed_quartic(theta, period, horizon):
    """The gradient of ``E[(sum_t theta_t)^4] / T`` for one perturbation every ``period`` steps.

    The sum is Gaussian with mean ``T theta`` and variance ``T period sigma^2``, and
    ``d/dm E[x^4] = 4 m^3 + 12 m v`` for mean ``m`` and variance ``v``.
    """
    mean, variance = horizon * theta, horizon * period * SIGMA**2
    return 4 * mean**3 + 12 * mean * variance


QUARTIC_STEPS = 6
SMOOTHED_OVER = {
    "pes": 1,
    "gpes": 2,
    "nres": QUARTIC_STEPS,
    "full_es": QUARTIC_STEPS,
    "reparam": QUARTIC_STEPS,
    "reparam_es": QUARTIC_STEPS,
}


@pytest.mark.parametrize("name", SMOOTHED_OVER)
def test_each_estimator_smooths_its_own_objective(x64, name):
    theta, horizon = jnp.array(0.3), QUARTIC_STEPS
    num = PAIRS // 8 if name == "reparam_es" else PAIRS
    estimator = build(name, systems.quartic(horizon), num, fixed_horizon(horizon), truncation=1)
    samples = systems.replicates(estimator, theta, REPLICATES, horizon)
    for period in (0, 1, 2, horizon):
        z = systems.z_scores(samples, smoothed_quartic(theta, period, horizon))[0]
        if period == SMOOTHED_OVER[name]:
            assert abs(z) < Z
        else:
            assert abs(z) > 10


def test_the_analytic_part_of_pes_is_not_smoothed(x64):
    theta, horizon = jnp.array(0.3), QUARTIC_STEPS
    system = systems.quartic(horizon)
    estimator = build("pes_analytic", system, PAIRS, fixed_horizon(horizon), truncation=1)
    samples = systems.replicates(estimator, theta, REPLICATES, horizon)
    raw, smooth = (smoothed_quartic(theta, period, horizon) for period in (0, 1))
    expected = (raw + (horizon - 1) * smooth) / horizon
    assert abs(systems.z_scores(samples, expected)[0]) < Z
    assert abs(systems.z_scores(samples, smooth)[0]) > 10


# The contract of every estimator.


# One of each kind of state, and groups of pairs; the others estimate by the same functions.
@pytest.mark.parametrize(
    "name",
    systems.some_fast(NAMES, ("bptt", "uoro", "reparam_es", "guided_es", "pes_analytic", "pes")),
)
def test_shards_in_chunks_agree_with_the_whole(name):
    system, theta = systems.nonlinear(0)
    whole = build(name, system, 4, fixed_horizon(6))
    chunked = build(name, system, 4, fixed_horizon(6), chunk=1)

    def step(states, key):
        state, shards = states
        grad, state, metrics = whole.estimate(theta, state, key)
        # Halves of one shape: mapped, not compiled twice.
        parts = jax.lax.map(lambda shard: chunked.estimate(theta, shard, key)[:2], shards)
        mean = jax.tree.map(lambda g: g.mean(axis=0), parts[0])
        return (state, parts[1]), (grad, mean, metrics["finite"])

    @jax.jit
    def run():
        state = whole.init(theta, jax.random.key(0))
        shards = jax.tree.map(lambda x: x.reshape(2, 2, *x.shape[1:]), state)
        keys = jax.vmap(jax.random.key)(jnp.arange(3))
        return state, jax.lax.scan(step, (state, shards), keys)[1]

    state, (grads, means, finite) = run()
    assert all(leaf.shape[0] == 4 for leaf in jax.tree.leaves(state))
    assert jax.tree.structure(grads) == jax.tree.structure(theta)
    assert np.all(finite == 1)
    for i in range(3):
        grad, mean = (ravel_pytree(jax.tree.map(lambda g, i=i: g[i], x))[0] for x in (grads, means))
        assert_equal(mean, grad, 2e-4)


def diverging(system):
    """The system, half of whose episodes have an infinite loss at the third step."""

    def init(theta, key, horizon):
        return system.init(theta, key, horizon), jax.random.bernoulli(key)

    def step(theta, state, key):
        third = state[0]["count"] == 2
        inner, loss = system.step(theta, state[0], key)
        return (inner, state[1]), loss * jnp.where(state[1] & third, jnp.inf, 1.0)

    return UnrolledSystem(init, step)


# What is not finite is dropped by one function, `base.population_mean`; the fast tests take one of
# each kind of state, and groups of pairs, the slow ones all.
@pytest.mark.parametrize(
    "name", systems.some_fast(NAMES, ("bptt", "tbptt", "uoro", "reparam_es", "guided_es", "pes"))
)
def test_a_diverged_episode_counts_nothing_and_ends(name):
    system, theta = systems.nonlinear(0)
    num = 2 if name == "reparam_es" else 16  # Groups of 6 pairs: few are without a diverged one.
    estimator = build(name, diverging(system), num, fixed_horizon(6))

    def run(theta):
        state = estimator.init(theta, jax.random.key(0))
        if hasattr(state, "position"):
            state = est.synchronized(state)
        return estimator.estimate(theta, state, jax.random.key(1))

    grad, state, metrics = jax.jit(run)(theta)
    assert np.isfinite(ravel_pytree(grad)[0]).all() and metrics["finite"] < 1
    if name == "reparam_es":
        return
    assert metrics["finite"] > 0 and np.abs(ravel_pytree(grad)[0]).max() > 0
    if hasattr(state, "position"):
        assert np.mean(state.position == 3) == metrics["finite"]  # The others restart.
        assert set(np.unique(state.position)) == {3, 6}


# `tests/contracts/estimator_inputs.py` has the same of every estimator, on another system.
@pytest.mark.parametrize(
    "name",
    systems.some_fast(
        ["bptt", "artbp", "reparam", "reparam_es", "guided_es", "full_es"], ("guided_es",)
    ),
)
def test_what_comes_after_a_drawn_horizon_is_harmless(x64, name):
    """Cubed without end, the state overflows in eight steps; episodes have three of the twelve."""

    def step(theta, state, key):
        return state**3 * theta, theta @ state

    system = UnrolledSystem(lambda theta, key, horizon: jnp.ones_like(theta), step)
    horizons = est.Horizons(np.array([3, T]), np.array([1.0, 0.0]))
    theta = jnp.array([1.5, 1.5])
    grad, state = estimate(build(name, system, 8, horizons, sigma=1e-4), theta)
    assert np.isfinite(grad).all() and (grad != 0).all()
    if name == "guided_es":
        assert (state.surrogates[:, 0] == state.surrogates[0, 0]).all()  # The new ones: no noise.
    if name in ("bptt", "reparam", "reparam_es"):  # theta + theta^2 + theta^5, over three steps.
        np.testing.assert_allclose(grad, (1 + 2 * 1.5 + 5 * 1.5**4) / 3, rtol=1e-4)


# Refusals.


def accuracy(system):
    """The system with a loss that is piecewise constant."""

    def step(theta, state, key):
        state, loss = system.step(theta, state, key)
        return state, jnp.round(loss)

    return UnrolledSystem(system.init, step)


@pytest.mark.parametrize("name", NAMES)
def test_a_loss_without_a_derivative_is_refused_by_those_that_need_one(name):
    system, theta = systems.nonlinear(0)
    estimator = build(name, accuracy(system), 2, fixed_horizon(T))
    if name in DIFFERENTIATING:
        with pytest.raises(ValueError, match=rf"`{name}` differentiates.*use .*`pes`"):
            estimator.init(theta, jax.random.key(0))
    else:
        jax.eval_shape(estimator.init, theta, jax.random.key(0))
        assert name != "pes" or np.isfinite(estimate(estimator, theta)[0]).all()


def driven(by):
    """A state that moves by ``by(theta)``, seen by the loss two steps later only."""

    def step(theta, state, key):
        first, second = state
        return (first + by(jnp.sum(theta)), first), second**2

    return UnrolledSystem(lambda theta, key, horizon: (jnp.ones([]), jnp.ones([])), step)


def test_a_state_that_theta_moves_in_jumps_is_refused():
    theta = jnp.ones(3)
    smooth = build("bptt", driven(jnp.sin), 2, fixed_horizon(T))
    jax.eval_shape(smooth.init, theta, jax.random.key(0))
    for name in ("bptt", "rtrl"):
        with pytest.raises(ValueError, match=rf"`{name}` differentiates"):
            build(name, driven(jnp.floor), 2, fixed_horizon(T)).init(theta, jax.random.key(0))


def test_reparam_es_without_finite_backpropagation_is_es(x64):
    def step(theta, state, key):  # The derivative of the root is 0 * inf below zero.
        return state, theta + jnp.sqrt(jnp.maximum(theta, 0.0))

    system = UnrolledSystem(lambda theta, key, horizon: (), step)
    estimator = build("reparam_es", system, 200, fixed_horizon(1), sigma=0.1)
    theta = jnp.asarray(-3.0)
    assert np.isnan(jax.grad(lambda t: step(t, (), None)[1])(theta))
    grad = estimate(estimator, theta)[0]
    np.testing.assert_allclose(grad, 1.0, atol=5 * np.sqrt(2 / (200 * 6)))


def test_an_integer_loss_is_refused():
    system, theta = systems.nonlinear(0)
    counted = UnrolledSystem(system.init, lambda t, s, k: (system.step(t, s, k)[0], s["count"]))
    with pytest.raises(ValueError, match="int32"):
        build("bptt", counted, 2, fixed_horizon(T)).init(theta, jax.random.key(0))


def test_rtrl_refuses_a_sensitivity_too_large_for_memory():
    system, theta = systems.nonlinear(0)  # 6 float state entries, 28 entries of theta.
    shared = {"num_particles": 10, "truncation": K, "horizons": fixed_horizon(T)}
    with pytest.raises(ValueError, match=r"6 state entries.*28 entries.*10 particles.*`uoro`"):
        est.rtrl(system, max_bytes=6 * 28 * 10 * 4 - 1, **shared).init(theta, jax.random.key(0))
    est.rtrl(system, max_bytes=6 * 28 * 10 * 4, **shared).init(theta, jax.random.key(0))


@pytest.mark.parametrize(
    ("name", "wrong", "message"),
    [
        ("gpes", {"noise_period": 4}, "`noise_period` .* noise_period=4, truncation=3"),
        ("gpes", {"sigma": 0.0}, "sigma=0.0"),
        ("nres", {"truncation": 13}, "truncation=13, horizon=12"),
        ("guided_es", {"truncation": 5}, "horizon=12, truncation=5"),
        ("artbp", {"mean_truncation": 1.0}, "mean_truncation=1.0"),
        ("artbp", {"alpha": 1.0}, "alpha=1.0"),
        ("reparam_es", {"pairs_per_particle": 5}, "pairs_per_particle=5"),
        ("guided_es", {"alpha": 0.0}, "alpha=0.0"),
        ("guided_es", {"num_surrogates": 29}, "num_surrogates=29 for 28 entries"),
    ],
)
def test_wrong_arguments_are_named(name, wrong, message):
    online = {"truncation": K, "horizons": fixed_horizon(T)}
    right = {
        "gpes": dict(online, num_pairs=2, noise_period=6, sigma=SIGMA),
        "nres": dict(online, num_pairs=2, sigma=SIGMA),
        "artbp": {"num_particles": 2, "mean_truncation": 4.0, "horizons": fixed_horizon(T)},
        "reparam_es": {
            "num_particles": 2,
            "pairs_per_particle": 4,
            "horizons": fixed_horizon(T),
            "sigma": SIGMA,
        },
        "guided_es": dict(online, num_pairs=2, num_surrogates=1, sigma=SIGMA),
    }[name]
    system, theta = systems.nonlinear(0)
    with pytest.raises(ValueError, match=message):
        getattr(est, name)(system, **{**right, **wrong}).init(theta, jax.random.key(0))
