"""Directions of unit variance: moments, structure, and what they do to an ES gradient."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import norm, qmc

from launch import config as cfg
from meta_train import checks, samplers
from meta_train import estimators as est
from meta_train.estimators.config import ONE_DEVICE
from meta_train.unroll import UnrolledSystem
from tests import systems

NAMES = sorted(samplers.SAMPLERS)
BLOCKS = ("orthogonal", "sobol")
Z = 4.5
SIGMA = 0.3


def blocks(name, count, num, dim):
    """Independent blocks, float64 ``[count, num, dim]``."""
    keys = jax.random.split(jax.random.key(0), count)
    return np.asarray(jax.jit(jax.vmap(lambda k: samplers.draw(name, k, num, dim)))(keys), float)


@pytest.mark.parametrize("name", NAMES)
def test_moments(name):
    """Of every component of every row: mean 0, variance 1, skewness 0, no correlation."""
    x = blocks(name, 20_000, 6, 5)
    expected = {"mean": (x, 0), "variance": (x**2, 1), "skewness": (x**3, 0)}
    expected["within a row"] = x * np.roll(x, 1, axis=2), 0
    if name not in BLOCKS:
        expected["between rows"] = x * np.roll(x, 1, axis=1), 0
    for moment, (values, value) in expected.items():
        error = values.std(axis=0, ddof=1) / np.sqrt(len(x))
        assert (np.abs(values.mean(axis=0) - value) <= Z * error + 1e-6).all(), moment
        assert error.max() < 0.1, moment


@pytest.mark.parametrize("name", NAMES)
def test_a_row_is_drawn_alone(name):
    """Bit for bit, whatever other rows are drawn, and in a population of any size."""
    key = jax.random.key(3)
    whole = np.asarray(samplers.draw(name, key, 8, 20))
    for split in ([6], [7, 2]):
        some = samplers.rows(name, key, jnp.array(split), 8, 20)
        np.testing.assert_array_equal(some, whole[np.array(split)])
    if name not in BLOCKS:
        np.testing.assert_array_equal(samplers.draw(name, key, 3, 20), whole[:3])
    assert len(np.unique(np.asarray(whole), axis=0)) == 8
    assert not np.array_equal(samplers.draw(name, jax.random.key(4), 8, 20), whole)


@pytest.mark.parametrize("name", NAMES)
def test_the_type_is_that_of_theta(x64, name):
    for dtype in map(jnp.dtype, ("bfloat16", "float64")):
        x = jax.jit(lambda key, t=dtype: samplers.draw(name, key, 7, 3, t))(jax.random.key(0))
        assert x.dtype == dtype and np.isfinite(x.astype(float)).all()


def test_the_largest_clipped_cauchy_value():
    """Clipped at 10, over the standard deviation of the clipped variable."""
    x = np.tan(np.pi * ((np.arange(2_000_000) + 0.5) / 2_000_000 - 0.5))
    largest = 10 / np.clip(x, -10, 10).std()
    assert np.abs(blocks("cauchy", 100, 10, 10)).max() == pytest.approx(largest, rel=1e-5)


@pytest.mark.parametrize(("num", "dim"), [(3, 8), (8, 8), (20, 8)])
def test_orthogonal_rows(x64, num, dim):
    rows = samplers.draw("orthogonal", jax.random.key(0), num, dim, jnp.float64)
    products = np.asarray(rows @ rows.T)
    group = np.arange(num) // dim
    same = group[:, None] == group[None, :]
    np.testing.assert_allclose(products[same], dim * np.eye(num)[same], atol=1e-12)
    if num > dim:
        assert np.abs(products[~same]).max() > 0.1


def test_no_batches_are_factorized():
    """On several devices those were seen to wait for each other for ever (jaxlib 0.10.2)."""
    draw = jax.make_jaxpr(lambda key: samplers.draw("orthogonal", key, 20, 7))(jax.random.key(0))
    shapes = re.findall(r":f32\[([\d,]+)\] \w+:f32\[[\d,]+\] = qr\[", str(draw))
    assert shapes == ["7,7"]


def test_sobol_points_are_those_of_scipy_shifted():
    dim, num = 40, 64
    uniform = norm.cdf(np.asarray(samplers.draw("sobol", jax.random.key(0), num, dim), float))
    cells = np.floor(uniform * num).astype(int)
    reference = np.floor(qmc.Sobol(dim, scramble=False).random(num) * num).astype(int)
    shift = cells[0]  # Row 0 is the origin of the sequence.
    assert {tuple(row ^ shift) for row in cells} == {tuple(row) for row in reference}
    # Of 2^m points one lies in each of 2^m intervals, along every axis.
    np.testing.assert_array_equal(np.sort(cells, axis=0), np.arange(num)[:, None] + 0 * cells)


def test_sobol_points_fill_the_cube_more_evenly():
    def discrepancy(name):
        found = [qmc.discrepancy(norm.cdf(x)) for x in blocks(name, 8, 64, 6)]
        return np.mean(found)

    assert discrepancy("sobol") < 0.3 * discrepancy("normal")


def test_sobol_beyond_its_dimensions_is_normal():
    dim = samplers.SOBOL_MAX_DIM + 5000
    x = np.asarray(samplers.draw("sobol", jax.random.key(0), 16, dim))
    beyond = x[:, samplers.SOBOL_MAX_DIM :]
    assert x.shape == (16, dim)
    assert abs(np.mean(beyond**2) - 1) < Z * np.sqrt(2 / beyond.size)
    # Stratified below: the mean over 16 points is far less variable.
    assert x[:, :5000].mean(axis=0).std() < 0.5 * beyond.mean(axis=0).std()


def squared_error(name, num_pairs, theta_size, replicates=2000):
    """Of the ES gradient of a quadratic, in units of the squared gradient."""
    system, theta = systems.linear(0, theta_size=theta_size)
    horizons = est.fixed_horizon(4)
    estimator = est.full_es(system, num_pairs=num_pairs, horizons=horizons, sigma=0.1, sampler=name)
    exact = systems.replicates(est.bptt(system, num_particles=1, horizons=horizons), theta, 1, 1)
    samples = systems.replicates(estimator, theta, replicates, 1)
    return np.mean(np.sum((samples - exact) ** 2, axis=1)) / np.sum(exact**2)


KURTOSIS = {"normal": 3.0, "rademacher": 1.0, "uniform": 1.8, "laplace": 6.0}


@pytest.mark.parametrize("name", sorted(KURTOSIS))
def test_the_error_of_the_gradient_grows_with_the_fourth_moment(x64, name):
    """``e (e . g)`` with independent components has variance ``(P - 2) |g|^2 + sum_i k g_i^2``."""
    found = squared_error(name, 4, 8)
    assert found == pytest.approx((8 - 2 + KURTOSIS[name]) / 4, rel=0.12)


def test_orthogonal_directions_lower_the_error(x64):
    """N of P orthogonal directions: ``P / N - 1`` instead of ``(P + 1) / N``; all P: exact."""
    assert squared_error("orthogonal", 4, 8) == pytest.approx(8 / 4 - 1, rel=0.05)
    assert squared_error("orthogonal", 8, 8, replicates=10) < 1e-20
    assert squared_error("orthogonal", 4, 8) < 0.6 * squared_error("normal", 4, 8)


def test_sobol_directions_lower_the_error(x64):
    assert squared_error("sobol", 64, 8) < 0.5 * squared_error("normal", 64, 8)


@pytest.mark.parametrize(
    ("estimator", "sampler"),
    [("pes", name) for name in ("orthogonal", "sobol", "cauchy")]
    + [
        pytest.param(*case, marks=pytest.mark.slow)
        for case in (
            ("pes", "rademacher"),
            ("nres", "orthogonal"),
            ("pes_analytic", "sobol"),
            ("truncated_es", "orthogonal"),
        )
    ],
)
def test_any_sampler_is_unbiased_for_a_quadratic_loss(x64, estimator, sampler):
    system, theta = systems.linear(0)
    g = systems.window_gradients(system, theta, 12, 3)
    whole, blind = g.sum(axis=(0, 1)) / 12, np.einsum("ttp->p", g) / 12
    expected, other = (blind, whole) if estimator == "truncated_es" else (whole, blind)
    built = getattr(est, estimator)(
        system,
        num_pairs=100,
        truncation=3,
        horizons=est.fixed_horizon(12),
        sigma=0.3,
        sampler=sampler,
    )
    samples = systems.replicates(built, theta, 1024, 4)
    assert systems.standard_errors(samples).max() < 0.1 * np.abs(whole - blind).max()
    assert np.abs(systems.z_scores(samples, expected)).max() < Z
    assert np.abs(systems.z_scores(samples, other)).max() > 10


def test_the_halves_of_reparam_es_draw_blocks_of_their_own(x64):
    """Unbiased though the weights are those of few draws; a common block would bias them."""
    system, horizons, theta = systems.quartic(2), est.fixed_horizon(2), jnp.float64(0.7)
    shared = {"horizons": horizons, "sigma": SIGMA, "sampler": "sobol"}
    built = est.reparam_es(system, num_particles=50, pairs_per_particle=4, **shared)
    found = systems.replicates(built, theta, 2000, 1)
    # d/dtheta E[(2 theta + 2 eps)^4] / 2, with eps ~ N(0, sigma^2).
    expected = 4 * (2 * theta) ** 3 + 12 * (2 * theta) * 4 * SIGMA**2
    assert systems.standard_errors(found).max() < 0.01 * expected
    assert np.abs(systems.z_scores(found, expected)).max() < Z


@pytest.mark.parametrize(
    "name",
    systems.PERTURBING,
)
def test_every_es_estimator_of_the_command_line_takes_the_sampler(name):
    with pytest.raises(ValueError, match="`sampler` must be one of"):
        cfg.estimator(name, sampler="gauss")
    chosen = cfg.estimator(name, sampler="sobol")
    assert chosen.arguments(ONE_DEVICE)["sampler"] == "sobol"


@pytest.mark.parametrize(("num", "dim"), [(2.5, 3), (0, 3), (2, 0), (2, 3.0), (True, 3), (2, -1)])
@pytest.mark.parametrize("name", NAMES)
def test_sizes_are_whole_numbers(name, num, dim):
    with pytest.raises(ValueError, match=r"`(num|dim)` must be a whole number from 1"):
        samplers.draw(name, jax.random.key(0), num, dim)


def test_unknown_samplers_are_named():
    with pytest.raises(ValueError, match=r"`sampler` must be one of \['cauchy'.*got 'gauss'"):
        samplers.draw("gauss", jax.random.key(0), 2, 3)
    system, _ = systems.linear(0)
    with pytest.raises(ValueError, match=r"`sampler` must be one of"):
        est.full_es(
            system, num_pairs=2, horizons=est.fixed_horizon(3), sigma=0.1, sampler="gaussian"
        )


@pytest.mark.parametrize("name", NAMES)
def test_a_sigma_that_is_not_refused_is_resolved(name):
    """At the least sigma the rounding of theta + eps takes up to 2% from the slope of 2; below, it
    is refused."""
    system = UnrolledSystem(
        lambda theta, key, horizon: jnp.zeros(()),
        lambda theta, state, key: (state, 2 * (jnp.sum(theta) - 1)),
    )
    num, spacing = 4096, float(np.spacing(np.float32(1.0)))
    least = checks.LEAST_SPACINGS[name] * spacing

    def full_es(sigma):
        return est.full_es(
            system, num_pairs=num, horizons=est.fixed_horizon(1), sigma=sigma, sampler=name
        )

    @jax.jit
    def slopes(thetas):
        def one(theta):
            state = full_es(1.3 * least).init(theta, jax.random.key(0))
            grad, _, metrics = full_es(1.3 * least).estimate(theta, state, jax.random.key(1))
            return grad, jnp.sqrt(metrics["grad_sq_norm"] / num)

        return jax.lax.map(one, thetas)

    found, errors = slopes(jnp.linspace(1.0, 1.99, 12))
    assert np.all(np.abs(found / 2 - 1) < 0.02 + 4 * errors / 2)
    with pytest.raises(ValueError, match="`sigma` must move every entry of theta"):
        full_es(0.9 * least).init(jnp.float32(1.0), jax.random.key(0))
