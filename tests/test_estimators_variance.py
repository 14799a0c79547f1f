"""The exact variance of PES, NRES and forward gradients, against closed forms."""

import numpy as np
import pytest

from meta_train import estimators as est
from tests import systems

T, K = 12, 3
TOLERANCE = 0.03  # Of pes a standard error is 0.5%, and the crossed term 8%.
SAMPLES = 100_000


def measured_variance(estimator, theta, samples=SAMPLES):
    """The trace of the covariance of one particle's estimate of the whole episode's gradient."""
    samples = systems.replicates(estimator, theta, samples, T // K)
    return samples.var(axis=0, ddof=1).sum()


def pes_variance(g):
    """Of one antithetic pair, summed over the windows of an episode, for a quadratic loss.

    With ``G[a, b]`` the sum over windows ``t >= max(a, b)`` of the gradient ``g[t, b]`` of
    window ``t``'s loss by the theta of window ``b``, the estimate is
    ``sum_{a, b} e_a (e_b . G[a, b])`` with ``e`` standard normal. Its covariance by Isserlis'
    theorem: the pairing of ``e_a`` with itself gives ``P |G[a, b]|^2``, the crossed one
    ``G[a, b] . G[b, a]``, and on the diagonal both are there.
    """
    windows, size = g.shape[0], g.shape[-1]
    total = np.zeros((windows, windows, size))
    for a in range(windows):
        for b in range(windows):
            total[a, b] = g[max(a, b) :, b].sum(axis=0)
    return size * np.sum(total**2) + np.einsum("abp,bap->", total, total)


@pytest.fixture(
    params=[(1, 5, 7), pytest.param((0, 4, 3), marks=pytest.mark.slow)], ids=["P=7", "P=3"]
)
def case(x64, request):
    seed, state_size, theta_size = request.param
    system, theta = systems.linear(seed, state_size, theta_size)
    return system, theta, systems.window_gradients(system, theta, T, K)


def test_pes(case):
    system, theta, g = case
    estimator = est.pes(system, num_pairs=1, truncation=K, horizons=est.fixed_horizon(T), sigma=0.3)
    expected = pes_variance(g) / T**2
    assert measured_variance(estimator, theta) == pytest.approx(expected, rel=TOLERANCE)


def test_pes_analytic_is_far_below_pes(case):
    system, theta, g = case
    estimator = est.pes_analytic(
        system, num_pairs=1, truncation=K, horizons=est.fixed_horizon(T), sigma=0.3
    )
    assert measured_variance(estimator, theta, 20_000) < pes_variance(g) / T**2 / 5


@pytest.mark.parametrize("name", ["nres", "forward_gradient"])
def test_one_direction_an_episode(case, name):
    """``u (u . grad)`` with normal ``u`` has variance ``(P + 1) |grad|^2``."""
    system, theta, g = case
    online = {"truncation": K, "horizons": est.fixed_horizon(T)}
    if name == "nres":
        estimator = est.nres(system, num_pairs=1, sigma=0.3, **online)
    else:
        estimator = est.forward_gradient(system, num_particles=1, **online)
    gradient = g.sum(axis=(0, 1)) / T
    expected = (theta.size + 1) * gradient @ gradient
    assert measured_variance(estimator, theta) == pytest.approx(expected, rel=TOLERANCE)


def test_the_variance_falls_with_the_number_of_pairs(case):
    system, theta, g = case
    estimator = est.pes(system, num_pairs=5, truncation=K, horizons=est.fixed_horizon(T), sigma=0.3)
    samples = systems.replicates(estimator, theta, SAMPLES // 5, T // K)
    expected = pes_variance(g) / T**2 / 5
    assert samples.var(axis=0, ddof=1).sum() == pytest.approx(expected, rel=TOLERANCE)
