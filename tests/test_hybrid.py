"""Hybrid-ES: each mode against its formula, what crosses between workers, what is rebuilt."""

import dataclasses
import os
import re
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree
from safetensors.numpy import load_file

from launch import config as cfg
from launch.trainables import make_system
from meta_train import devices, estimators, trainer
from meta_train.estimators.hybrid import (
    compression,
    control_variate,
    guided,
    hybrid_es,
    messages,
    past_descent,
    replay,
    select,
    skip,
    stale,
)
from meta_train.estimators.hybrid import noise as noises
from meta_train.estimators.hybrid.state import SEARCH
from meta_train.unroll import UnrolledSystem
from tests.systems import leaves_equal, linear, some_fast, window_gradients, z_scores

ROOT = Path(__file__).parent.parent
SIZE, STALE = 6, np.array([0.4, -0.3, 0.2, 0.9, -0.05, 0.1])
MATRIX = np.diag(np.linspace(0.2, 2.0, SIZE)) + 0.1
THETA = np.linspace(-1.0, 1.0, SIZE)
ONE = estimators.fixed_horizon(1)


def quadratic(noise=0.0):
    """One step an episode: ``theta A theta / 2``, plus a random slope all candidates share."""

    def step(theta, state, key):
        slope = noise * jax.random.normal(key, theta.shape, theta.dtype) if noise else 0.0
        return state, theta @ (jnp.asarray(MATRIX, theta.dtype) @ theta) / 2 + jnp.sum(
            slope * theta
        )

    return UnrolledSystem(lambda theta, key, horizon: (), step)


def fixed_surrogate(gradient=STALE, num=8):
    """An estimator that always gives ``gradient``."""

    def estimate(theta, ids, key):
        metrics = {"loss": jnp.ones([]), "finite": jnp.ones([]), "grad_sq_norm": jnp.ones([])}
        return jnp.asarray(gradient, theta.dtype), ids, metrics

    return estimators.GradientEstimator(lambda theta, key: jnp.arange(num), estimate)


def tried(**how):
    """The search of steps at rate 1/2."""
    return select(**({"step_size": 0.5} | how))


def build(sigma=0.1, surrogate=None, system=None, **kwargs):
    defaults = {
        "horizons": ONE,
        "refresh_every": 1000,
        "num_workers": 4,
        "candidates_per_worker": 4,
        "noise": estimators.Noise(sigma),
        "search": tried(),
    }
    return hybrid_es(system or quadratic(), surrogate or fixed_surrogate(), **(defaults | kwargs))


def in_between(estimator, d=STALE, theta=THETA):
    """The state just after a refresh that gave ``d``."""
    state = jax.jit(estimator.init)(jnp.asarray(theta), jax.random.key(0))
    shared = state.shared
    d = jnp.asarray(d, jnp.asarray(theta).dtype)
    shared = shared._replace(step=shared.step + 1, surrogate=d)
    return state._replace(shared=shared)


def one_step(estimator, key=7, state=None, theta=THETA):
    state = in_between(estimator) if state is None else state
    return jax.jit(estimator.estimate)(jnp.asarray(theta), state, jax.random.key(key))


def draws(num, key=7, use=0):
    """The sampler's rows of a step, and the key they come from."""
    key = jax.random.split(jax.random.fold_in(jax.random.key(key), SEARCH), 3)[use]
    rows = [jax.random.normal(jax.random.fold_in(key, i), (SIZE,), jnp.float64) for i in range(num)]
    return np.stack(rows), key


def cost(theta):
    return np.einsum("...i,ij,...j", theta, MATRIX, theta) / 2


@pytest.mark.parametrize(
    "combine, antithetic",
    [("argmin", False), ("worker_mean", False), ("top", True), ("rank", False)],
)
def test_select(x64, combine, antithetic):
    rows = draws(16)[0]
    if antithetic:
        rows = np.stack([rows[:8], -rows[:8]], axis=1).reshape(16, SIZE)
    eps = 0.1 * rows
    costs = cost(THETA - 0.5 * (STALE + eps))
    order = np.argsort(costs)
    logs = np.log(8.5) - np.log(np.arange(1, 9))
    chosen, weights = {
        "argmin": (order[:1], [1.0]),
        "worker_mean": (np.arange(4) * 4 + costs.reshape(4, 4).argmin(axis=1), [0.25] * 4),
        "top": (order[:3], [1 / 3] * 3),
        "rank": (order[:8], logs / logs.sum()),
    }[combine]
    estimator = build(search=tried(combine=combine, top=3, antithetic=antithetic))
    grad, state, metrics = one_step(estimator)
    np.testing.assert_allclose(grad, STALE + np.array(weights) @ eps[chosen], rtol=1e-9)
    np.testing.assert_array_equal(state.shared.surrogate, STALE)
    sent = metrics["message"].costs
    if combine == "worker_mean":
        np.testing.assert_array_equal(sent.ids, chosen)
        np.testing.assert_allclose(sent.costs, costs[chosen], rtol=1e-9)
    if combine == "rank":
        np.testing.assert_allclose(sent.costs, costs, rtol=1e-9)
        np.testing.assert_allclose(metrics["loss"], costs.mean(), rtol=1e-9)


def test_candidates_of_a_step_share_tasks_and_data(x64):
    """With almost no perturbation all costs are equal, and noise is averaged over tasks."""
    estimator = build(
        sigma=1e-300, system=quadratic(noise=1.0), search=tried(combine="rank"), num_tasks=3
    )
    costs = np.asarray(one_step(estimator)[2]["message"].costs.costs)
    np.testing.assert_array_equal(costs, costs[0])
    other = np.asarray(one_step(estimator, key=8)[2]["message"].costs.costs)
    assert abs(other[0] - costs[0]) > 1e-3


def test_candidates_that_are_not_finite_are_never_chosen(x64):
    def step(theta, state, key):
        return state, jnp.where(theta[0] > -1.2, jnp.nan, jnp.sum(theta))

    system = UnrolledSystem(lambda theta, key, horizon: (), step)
    estimator = build(system=system, search=tried(combine="rank"))
    grad, _, metrics = one_step(estimator)
    costs = np.asarray(metrics["message"].costs.costs)
    assert 0 < metrics["finite"] < 1 and np.isinf(costs).sum() == round(
        16 * (1 - metrics["finite"])
    )
    assert THETA[0] - 0.5 * float(grad[0]) <= -1.2  # A mean of candidates that were finite.
    lost = UnrolledSystem(
        lambda theta, key, horizon: (), lambda theta, state, key: (state, jnp.nan)
    )
    np.testing.assert_array_equal(one_step(build(system=lost))[0], 0)


def test_control_variate_is_unbiased_whatever_the_surrogate(x64):
    """Exact on a quadratic if ``d`` is; else unbiased, with a variance that grows as its error."""
    true = MATRIX @ THETA
    estimator = build(sigma=0.3, search=control_variate(), system=quadratic())

    @jax.jit
    @partial(jax.vmap, in_axes=(0, None))
    def estimates(key, stale):
        state = in_between(estimator)
        state = state._replace(shared=state.shared._replace(surrogate=stale))
        return estimator.estimate(jnp.asarray(THETA), state, key)[0]

    keys = jax.random.split(jax.random.key(1), 2000)
    np.testing.assert_allclose(estimates(keys[:5], true), np.tile(true, (5, 1)), rtol=1e-9)
    off = np.asarray(estimates(keys, STALE))
    assert np.max(np.abs(z_scores(off, true))) < 4
    nearer = np.asarray(estimates(keys, true + (STALE - true) / 2))
    assert np.max(np.abs(z_scores(nearer, true))) < 4
    assert abs(off.var(axis=0).sum() / nearer.var(axis=0).sum() - 4) < 0.5


@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_control_variate_has_the_gradient_of_the_smoothed_loss(x64, fraction):
    """``E sum (theta + e)^4`` has slope ``4 theta^3 + 12 sigma^2 theta``; what a mask leaves out
    is the stale gradient's share."""
    sigma = 0.4
    system = UnrolledSystem(
        lambda theta, key, horizon: (), lambda theta, s, key: (s, jnp.sum(theta**4))
    )
    noise = estimators.Noise(sigma, mask="random", fraction=fraction)
    estimator = build(search=control_variate(), system=system, noise=noise)
    sample = jax.vmap(lambda k: estimator.estimate(jnp.asarray(THETA), in_between(estimator), k)[0])
    found = np.asarray(jax.jit(sample)(jax.random.split(jax.random.key(2), 20_000)))
    smoothed = 4 * THETA**3 + 12 * sigma**2 * THETA
    assert np.abs(z_scores(found, fraction * smoothed + (1 - fraction) * STALE)).max() < 4.5
    assert np.abs(z_scores(found, fraction * 4 * THETA**3 + (1 - fraction) * STALE)).max() > 10


@pytest.mark.parametrize("base", some_fast(["bptt", "tbptt", "pes", "truncated_es"], ("tbptt",)))
def test_control_variate_is_unbiased_on_any_base(x64, base):
    """Over episodes of several steps: a base that is blind beyond its window biases it not."""
    system, theta = linear(0)
    horizons = estimators.fixed_horizon(4)
    sizes = {"bptt": {}, "tbptt": {"truncation": 2}}
    sizes = sizes.get(base, {"truncation": 2, "sigma": 0.1})
    sizes |= {"num_particles" if "tt" in base else "num_pairs": 4}
    surrogate = getattr(estimators, base)(system, horizons=horizons, **sizes)
    estimator = build(
        sigma=0.2, search=control_variate(), system=system, surrogate=surrogate, horizons=horizons
    )

    @jax.jit
    @jax.vmap
    def two_steps(key):
        keys = jax.random.split(key, 3)
        first, state, _ = estimator.estimate(theta, estimator.init(theta, keys[0]), keys[1])
        return first, estimator.estimate(theta, state, keys[2])[0]

    stale, found = map(np.asarray, two_steps(jax.random.split(jax.random.key(3), 2000)))
    exact = window_gradients(system, theta, 4, 4).sum(axis=(0, 1)) / 4
    if base == "bptt":
        np.testing.assert_allclose(found, np.tile(exact, (2000, 1)), rtol=1e-9)
        return
    assert np.abs(z_scores(found, exact)).max() < 4.5
    if base != "pes":
        error = np.abs(stale.mean(axis=0) - exact).max()
        assert error > 0.1 * np.abs(exact).max()
        assert found.std(axis=0).max() / np.sqrt(2000) < 0.05 * error


def test_guided(x64):
    past = np.stack([STALE, np.arange(SIZE) / 3.0])
    estimator = build(search=guided(num_surrogates=2, alpha=0.3))
    state = in_between(estimator)
    state = state._replace(shared=state.shared._replace(past=jnp.asarray(past)))
    grad = one_step(estimator, state=state)[0]
    rows, key = draws(8)
    basis = np.linalg.qr(past.T)[0]
    inner = jax.random.fold_in(key, 2**32 - 4)  # An address of its own, beside the rows'.
    within = [jax.random.normal(jax.random.fold_in(inner, i), (2,), jnp.float64) for i in range(8)]
    eps = 0.1 * (np.sqrt(0.3) * rows + np.sqrt(0.7 * SIZE / 2) * np.array(within) @ basis.T)
    differences = cost(THETA + eps) - cost(THETA - eps)
    # The basis of a span is known up to signs of its vectors, which LAPACK fixes alike.
    np.testing.assert_allclose(grad, (differences / 2) @ eps / 8 / 0.1**2, rtol=1e-8)


def test_guided_before_there_are_enough_gradients(x64):
    """Missing ones are random: ``E v v^T = (I - u u^T) / (P - 1)`` beside the first one's ``u``."""
    estimator = build(search=guided(num_surrogates=2, alpha=0.3))

    def second(key):
        keys = jax.random.split(key, 3)
        state = estimator.init(jnp.asarray(THETA), keys[0])
        state = estimator.estimate(jnp.asarray(THETA), state, keys[1])[1]
        return estimator.estimate(jnp.asarray(THETA), state, keys[2])[0]

    found = np.asarray(jax.jit(jax.vmap(second))(jax.random.split(jax.random.key(5), 4000)))
    along = np.outer(STALE, STALE) / (STALE @ STALE)
    spread = along + (np.eye(SIZE) - along) / (SIZE - 1)
    expected = (0.3 * np.eye(SIZE) + 0.7 * SIZE / 2 * spread) @ MATRIX @ THETA
    assert np.abs(z_scores(found, expected)).max() < 4.5
    fewer = (0.3 * np.eye(SIZE) + 0.7 * SIZE / 2 * along) @ MATRIX @ THETA
    assert np.abs(z_scores(found, fewer)).max() > 8


def test_past_descent(x64):
    """The projection on the span of the old gradient and random directions: all of it, if that
    is the whole space; and it is the next surrogate."""
    true = MATRIX @ THETA
    whole = build(search=past_descent(), num_workers=2, candidates_per_worker=SIZE)
    grad, state, _ = one_step(whole)
    np.testing.assert_allclose(grad, true, rtol=1e-8)
    np.testing.assert_array_equal(state.shared.surrogate, grad)
    part = build(search=past_descent(), num_workers=2, candidates_per_worker=2)
    span = np.linalg.qr(np.stack([STALE, draws(2)[0][1]], axis=1))[0]
    np.testing.assert_allclose(one_step(part)[0], span @ span.T @ true, rtol=1e-8)


def test_controls_and_refresh():
    """``stale`` repeats, ``skip`` stays, and both return to the surrogate estimator in time."""
    theta = jnp.asarray(THETA)
    for search, expected in ((stale(), STALE), (skip(), 0 * STALE)):
        estimator = build(search=search, refresh_every=3)
        step = jax.jit(estimator.estimate)
        state = estimator.init(theta, jax.random.key(0))
        for number in range(4):
            grad, state, metrics = step(theta, state, jax.random.key(number))
            fresh = number % 3 == 0
            assert metrics["refresh"] == fresh == metrics["message"].refreshed
            np.testing.assert_allclose(grad, STALE if fresh else expected, rtol=1e-6)


def test_without_steps_in_between_it_is_the_surrogate():
    system, theta = quadratic(noise=0.3), jnp.asarray(THETA)
    surrogate = estimators.bptt(system, num_particles=4, horizons=ONE)
    estimator = build(surrogate=surrogate, system=system, refresh_every=1)
    key = jax.random.key(3)
    grad = jax.jit(estimator.estimate)(theta, estimator.init(theta, key), key)[0]
    plain = jax.jit(surrogate.estimate)(theta, surrogate.init(theta, key), key)[0]
    np.testing.assert_allclose(grad, plain, rtol=1e-6)


def test_assisted_searches_around_the_fresh_gradient(x64):
    estimator = build(assist=True, refresh_every=1)
    state = estimator.init(jnp.asarray(THETA), jax.random.key(0))
    grad, _, metrics = one_step(estimator, state=state)
    np.testing.assert_allclose(grad, one_step(build())[0], rtol=1e-12)
    assert metrics["message"].searched and metrics["refresh"] == 1


@pytest.mark.parametrize(
    "search",
    [pytest.param(tried(), marks=pytest.mark.slow), control_variate()],
    ids=lambda search: search.name,
)
def test_masks(search):
    def grad(mask, fraction, layers=()):
        noise = estimators.Noise(0.1, mask=mask, fraction=fraction, layers=layers)
        return np.asarray(one_step(build(search=search, noise=noise))[0])

    d = np.asarray(jnp.asarray(STALE, jnp.float32))
    dense = grad("none", 1.0)
    assert not np.any(dense == d)
    for mask in ("random", "largest", "layers"):
        layers = (2, 4) if mask == "layers" else ()
        np.testing.assert_array_equal(grad(mask, 1.0, layers), dense)
    largest = grad("largest", 0.5)
    np.testing.assert_array_equal(largest == d, np.abs(STALE) < 0.25)
    layer = grad("layers", 0.5, (2, 4)) == d
    assert layer.tolist() in ([True] * 2 + [False] * 4, [False] * 2 + [True] * 4)
    assert 0 < np.sum(grad("random", 0.5) == d) < SIZE


@pytest.mark.parametrize("sampler", some_fast(["rademacher", "orthogonal"], ("orthogonal",)))
def test_same_step_however_candidates_are_split_over_workers(sampler):
    grads = [
        one_step(
            build(
                num_workers=num,
                candidates_per_worker=16 // num,
                chunk=2,
                noise=estimators.Noise(0.1, sampler),
            )
        )[0]
        for num in (1, 4, 8)
    ]
    np.testing.assert_array_equal(grads[1], grads[0])
    np.testing.assert_array_equal(grads[2], grads[0])


def test_same_run_however_candidates_are_split_over_workers():
    """Refreshes too: to rounding, since each worker first averages its own gradients."""
    system, runs = quadratic(noise=0.3), []
    for num in (1, 2, 8):
        surrogate = estimators.bptt(system, num_particles=8, horizons=ONE)
        estimator = build(
            surrogate=surrogate, system=system, refresh_every=3,
            search=select(step_size=0.1, combine="rank"),
            num_workers=num, candidates_per_worker=16 // num,
            noise=estimators.Noise(0.5, relative=True),
        )  # fmt: skip
        step = jax.jit(trainer.make_step(estimator, optax.sgd(0.1)))
        start = partial(jnp.asarray, THETA, jnp.float32)
        state = trainer.init_state(estimator, optax.sgd(0.1), lambda key: start(), seed=0)  # noqa: B023
        thetas = []
        for _ in range(12):
            state, _ = step(state)
            thetas.append(state.theta)
        runs.append(np.stack(thetas))
    assert np.ptp(runs[0], axis=0).min() > 0.01
    for other in runs[1:]:
        np.testing.assert_allclose(other, runs[0], atol=2e-5)


# Theta after seven steps, as the first version of these searches computed it, in one function.
GOLDEN_CASES = {
    "select": {"search": select(step_size=0.1)},
    "select, mean of workers, success rule": {
        "search": select(step_size=0.1, combine="worker_mean", antithetic=True),
        "noise": estimators.Noise(0.3, success_rate=0.5),
        "compressor": compression.int8(),
    },
    "select, top, layers": {
        "search": select(step_size=0.1, combine="top", top=3),
        "noise": estimators.Noise(1.0, "sobol", True, (2, 4), mask="layers", fraction=0.5),
    },
    "select, rank, mask": {
        "search": select(step_size=0.1, combine="rank", antithetic=True),
        "noise": estimators.Noise(0.3, mask="random", fraction=0.5),
        "assist": True,
    },
    "control_variate": {
        "search": control_variate(),
        "noise": estimators.Noise(0.3, "rademacher", mask="largest", fraction=0.5),
        "predictor": estimators.learned_features(updates=2),
    },
    "guided": {
        "search": guided(num_surrogates=2, alpha=0.3),
        "num_tasks": 2,
        "compressor": compression.top_k(0.5),
    },
    "past_descent": {"search": past_descent(), "candidates_per_worker": 2, "assist": True},
    "stale": {"search": stale(), "predictor": estimators.learned_features(updates=2)},
    "skip": {"search": skip()},
}
GOLDEN = {
    "select": [-0.85039, -0.3282926, -0.07720896, 0.13715832, 0.13989405, 0.10889457],
    "select, mean of workers, success rule": [
        -0.83015996,
        -0.2709461,
        -0.05138435,
        0.13783266,
        0.13436434,
        0.15025842,
    ],
    "select, top, layers": [-0.8825637, -0.3668584, 0.030977359, 0.19036444, 0.1624358, 0.07040628],
    "select, rank, mask": [
        -0.7926374,
        -0.32839164,
        -0.067198366,
        0.15331043,
        0.102012515,
        0.12111859,
    ],
    "control_variate": [-0.89323133, -0.288681, -0.07815006, 0.10205127, 0.24517268, 0.22487026],
    # Of the second version, whose draws within the span have keys of their own.
    "guided": [-0.523498, -0.17088611, -0.089584984, 0.042974014, 0.046345472, 0.05023334],
    "past_descent": [-0.86735, -0.32666394, -0.074250795, 0.1796133, 0.21885093, 0.22741339],
    "stale": [-0.8818098, -0.39077652, -0.06735232, 0.11255017, 0.14789695, 0.1583127],
    "skip": [-0.95447624, -0.51533103, -0.13638812, 0.14408316, 0.3388766, 0.49482235],
}


# One of each kind of search; by formula there are all above.
GOLDEN_FAST = ("select, rank, mask", "control_variate", "guided", "past_descent")


@pytest.mark.parametrize("case", some_fast(GOLDEN_CASES, GOLDEN_FAST))
def test_thetas_are_those_of_the_first_version(case):
    system = quadratic(noise=0.3)
    surrogate = estimators.bptt(system, num_particles=8, horizons=ONE)
    estimator = build(surrogate=surrogate, system=system, refresh_every=3, **GOLDEN_CASES[case])

    def body(carry, key):
        theta, state = carry
        grad, state, _ = estimator.estimate(theta, state, key)
        return (theta - 0.1 * grad, state), None

    @jax.jit
    def run():
        theta = jnp.asarray(THETA, jnp.float32)
        state = estimator.init(theta, jax.random.key(0))
        keys = jax.random.split(jax.random.key(1), 7)
        return jax.lax.scan(body, (theta, state), keys)[0][0]

    np.testing.assert_allclose(run(), GOLDEN[case], rtol=0, atol=1e-6)


# What crosses between devices.

EXCHANGE = estimators.Exchange(devices.device_mean, devices.device_gather)


def compiled(num_devices, **kwargs):
    """A compiled step over devices, a placed state, and the axes."""
    system = quadratic(noise=0.3)
    surrogate = estimators.bptt(system, num_particles=8, horizons=ONE)
    search = select(step_size=0.1)
    arguments = {"exchange": EXCHANGE, "refresh_every": 3, "search": search} | kwargs
    estimator = build(surrogate=surrogate, system=system, **arguments)
    optimizer = optax.sgd(0.1, momentum=0.5)
    axes = trainer.state_axes(estimator)
    state = jax.jit(
        lambda: trainer.init_state(
            estimator, optimizer, lambda key: jnp.asarray(THETA, jnp.float32), seed=0
        )
    )()
    step = trainer.make_step(estimator, optimizer, devices.device_mean)
    step = devices.population_map(step, num_devices, axes, donate=False)
    placed = devices.place(state, num_devices, axes)
    return step.lower(placed).compile(), placed, axes, (estimator, optimizer, state)


@pytest.mark.exact
@pytest.mark.parametrize(
    "arguments",
    [
        {"compressor": compression.int8(), "noise": estimators.Noise(0.5, success_rate=0.5)},
        pytest.param(
            {"search": control_variate(), "predictor": estimators.learned_features(updates=2)},
            marks=pytest.mark.slow,
        ),
        pytest.param(
            {
                "search": guided(num_surrogates=2), "compressor": compression.top_k(0.5),
                "noise": estimators.Noise(0.5, "sobol", relative=True),
            },
            marks=pytest.mark.slow,
        ),
        pytest.param(
            {
                "search": past_descent(), "candidates_per_worker": 2, "assist": True,
                "noise": estimators.Noise(0.5, "orthogonal"),
            },
            marks=pytest.mark.slow,
        ),
        pytest.param(
            {
                "search": select(step_size=0.1, combine="rank"),
                "noise": estimators.Noise(0.5, mask="random", fraction=0.5),
            },
            marks=pytest.mark.slow,
        ),
    ],
    ids=["select-int8", "control_variate-predictor", "guided-top_k", "past_descent", "rank-mask"],
)  # fmt: skip
def test_same_run_on_any_number_of_devices_and_from_the_log(tmp_path, arguments):
    """To the bit, on 1, 2 and 4 devices; and rebuilt from the messages, past a torn record."""
    runs = []
    for num_devices in (1, 2, 4):
        step, state, axes, parts = compiled(num_devices, **arguments)
        log, messages = replay.ReplayLog(tmp_path / f"{num_devices}.log", 0), []
        for number in range(1, 8):
            state, metrics = step(state)
            messages.append(jax.device_get(metrics["message"]))
            log.append(number, messages[-1])
        log.close()
        runs.append(devices.to_host(state, axes))
    for other in runs[1:]:
        for a, b in zip(*map(jax.tree.leaves, (other, runs[0])), strict=True):
            np.testing.assert_array_equal(a, b)
    path = tmp_path / "4.log"
    whole = path.read_bytes()
    assert whole == (tmp_path / "1.log").read_bytes()
    assert len(whole) == log_bytes(arguments)
    path.write_bytes(whole + whole[:150])
    estimator, optimizer, start = parts
    # This estimator's exchange needs devices; what is rebuilt does not.
    rebuilt = replay.rebuild(
        estimator._replace(estimate=build_alone(arguments).estimate), optimizer, start, path
    )
    assert rebuilt.step == 7
    np.testing.assert_array_equal(rebuilt.theta, runs[0].theta)
    np.testing.assert_array_equal(rebuilt.meta_opt_state[0].trace, runs[0].meta_opt_state[0].trace)
    for a, b in zip(
        *map(jax.tree.leaves, (rebuilt.estimator_state.shared, runs[0].estimator_state.shared)),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)
    # Cut back at a resume: later records and the torn one go.
    replay.ReplayLog(path, 5).close()
    like = replay.message_spec(build_alone(arguments), start)
    numbers, read = zip(*replay.read_log(path, like), strict=True)
    assert numbers == (1, 2, 3, 4, 5)
    assert leaves_equal(read, tuple(messages[:5]))
    # A log that begins too late rebuilds nothing.
    late = replay.ReplayLog(tmp_path / "late.log", 0)
    late.append(2, messages[1])
    late.close()
    with pytest.raises(ValueError, match="no record of step 1, the next is 2"):
        replay.rebuild(build_alone(arguments), optimizer, start, tmp_path / "late.log")


def test_a_log_may_be_torn_anywhere(tmp_path):
    """Every whole record is read, and a resume cuts the rest off."""
    path = tmp_path / "log"
    costs = messages.Costs(np.arange(2, dtype=np.uint32), np.ones(2, np.float32))
    like = messages.Message(np.array(True), np.zeros(3, np.float32), np.array(True), costs)
    log, ends = replay.ReplayLog(path, 0), [0]
    for step, refreshed in ((1, True), (2, False)):
        sent = like._replace(refreshed=np.array(refreshed), searched=np.array(not refreshed))
        log.append(step, sent)
        ends.append(path.stat().st_size)
    log.close()
    whole = path.read_bytes()
    for size in range(len(whole) + 1):
        path.write_bytes(whole[:size])
        number = sum(size >= end for end in ends[1:])
        assert [step for step, _ in replay.read_log(path, like)] == [1, 2][:number]
        replay.ReplayLog(path, number).close()
        assert path.stat().st_size == ends[number]


def log_bytes(arguments):
    """Of seven steps by formula: what was sent, and a header of 128 bytes for each array."""
    search = arguments.get("search", tried())
    per_worker = arguments.get("candidates_per_worker", 4)
    coder, rule = (
        arguments.get("compressor"),
        arguments.get("noise", estimators.Noise(0.1)).success_rate > 0,
    )
    sent = messages.traffic(
        SIZE,
        num_workers=4,
        candidates_per_worker=per_worker,
        sends=search.sends,
        success_rule=rule,
        compressor=coder,
    )
    ids = search.sends is messages.Sends.BESTS
    refreshes, searches = 3, 7 if arguments.get("assist") else 4
    # A gradient that is not compressed is in the log once: the mean over workers.
    gradient = sent.refresh if coder else 4 * SIZE
    refresh = gradient + 128 * (2 if coder else 1)
    return 7 * (128 + 64) + refreshes * refresh + searches * (sent.between + 128 * (1 + ids + rule))


def build_alone(arguments):
    system = quadratic(noise=0.3)
    surrogate = estimators.bptt(system, num_particles=8, horizons=ONE)
    return build(surrogate=surrogate, system=system, **{"refresh_every": 3} | arguments)


def collective_bytes(text):
    """Operand bytes of the collectives of a compiled program: those of in-between steps, others.

    The program has one conditional on the step's kind; its branches are told apart by the
    computations they call.
    """
    bodies = dict(re.findall(r"^%?([\w.\-]+) [^\n]*\{\n(.*?)^\}", text, re.M | re.S))
    sizes = {"f32": 4, "u32": 4, "s32": 4, "s8": 1}

    def own(body):
        total = 0
        for line in body.splitlines():
            if re.search(r"\b(all-gather|all-reduce|collective-permute)(-start)?\(", line):
                names = re.search(
                    r"(?:all-gather|all-reduce|collective-permute)(?:-start)?\((.*?)\)", line
                )
                for name in re.findall(r"%([\w.\-]+)", names.group(1)):
                    shape = re.search(rf"%{re.escape(name)} = (\w+)\[([\d,]*)\]", body)
                    dims = [int(d) for d in shape.group(2).split(",") if d]
                    total += sizes[shape.group(1)] * int(np.prod(dims))
        return total

    def reached(name, seen):
        if name in seen or name not in bodies:
            return 0
        seen.add(name)
        called = re.findall(r"%([\w.\-]+)", bodies[name])
        return own(bodies[name]) + sum(reached(n, seen) for n in called if n in bodies)

    for body in bodies.values():
        for line in body.splitlines():
            if " conditional(" not in line:
                continue
            branches = re.search(r"branch_computations=\{(.*?)\}", line)
            names = (
                re.findall(r"%([\w.\-]+)", branches.group(1))
                if branches
                else [
                    re.search(rf"{kind}_computation=%([\w.\-]+)", line).group(1)
                    for kind in ("false", "true")
                ]
            )
            found = [reached(n, set()) for n in names]
            if all(found):
                return found
    raise AssertionError("no conditional with collectives in both branches")


METRICS = 3  # Numbers that cross at a refresh beside the gradient.


def bytes_of_a_mean(size, num_devices):
    """From each device: its half, a quarter, ... of the sum, and the same back."""
    padded = -(-size // num_devices) * num_devices
    return 4 * 2 * padded * (num_devices - 1) // num_devices


@pytest.mark.parametrize("combine, success_rate", [("argmin", 0.0), ("rank", 0.5)])
def test_bytes_that_cross_are_those_of_the_formula(combine, success_rate):
    search = select(step_size=0.1, combine=combine)
    step, *_ = compiled(2, search=search, noise=estimators.Noise(0.1, success_rate=success_rate))
    between, refresh = collective_bytes(step.as_text())
    sent = messages.traffic(
        SIZE,
        num_workers=4,
        candidates_per_worker=4,
        sends=search.sends,
        success_rule=success_rate > 0,
    )
    assert 2 * between == sent.between == {"argmin": 32, "rank": 80}[combine]
    assert refresh == bytes_of_a_mean(SIZE + METRICS, 2)
    assert sent.refresh == 4 * 4 * SIZE
    nothing = messages.traffic(SIZE, num_workers=4, candidates_per_worker=4, sends=stale().sends)
    assert nothing.between == 0


@pytest.mark.parametrize("num_devices", [pytest.param(2, marks=pytest.mark.slow), 4])
@pytest.mark.parametrize("coder", [None, compression.int8(), compression.top_k(0.4)])
def test_bytes_of_a_refresh_are_those_of_the_formula(num_devices, coder):
    """Compressed gradients cross once each; the mean of others less than twice, from each."""
    step, *_ = compiled(num_devices, compressor=coder)
    found = collective_bytes(step.as_text())[1]
    sent = messages.traffic(SIZE, num_workers=4, candidates_per_worker=4, compressor=coder).refresh
    if coder:
        assert num_devices * (found - bytes_of_a_mean(METRICS, num_devices)) == sent
    else:
        assert found == bytes_of_a_mean(SIZE + METRICS, num_devices) < 2 * sent
    assert sent // 4 == (coder.num_bytes(SIZE) if coder else 4 * SIZE)


# Sigma, predictions, compression.


def test_sigma_follows_the_gradient():
    noise = estimators.Noise(2.0, relative=True, layers=(2, 4))
    scale = noises.init_scale(noise, jnp.float32)
    gradients = np.random.default_rng(0).normal(size=(3, SIZE)) * np.array([1, 1, 5, 5, 5, 5])
    variance, weight = np.zeros(2), 0.0
    for gradient in gradients:
        scale = noises.observe_gradient(noise, scale, jnp.asarray(gradient, jnp.float32))
        variance = 0.9 * variance + 0.1 * np.array([gradient[:2].var(), gradient[2:].var()])
        weight = 0.9 * weight + 0.1
    expected = np.repeat(2 * np.sqrt(variance / weight), (2, 4))
    np.testing.assert_allclose(noises.standard_deviation(noise, scale, SIZE), expected, rtol=1e-5)
    noise = estimators.Noise(0.3, success_rate=0.5)
    scale = noises.observe_success(noise, noises.init_scale(noise, jnp.float32), jnp.array(0.6))
    sigma = noises.standard_deviation(noise, scale, SIZE)
    np.testing.assert_allclose(sigma, 0.3 * np.exp(0.5 * 0.4), rtol=1e-6)


@pytest.mark.parametrize("bad, factor", [(1e30, 1.0), (np.inf, 1.0), (1e6, 10.0)])
def test_one_exploding_gradient_does_not_blow_sigma_up(bad, factor):
    noise = estimators.Noise(1.0, relative=True)
    scale = noises.init_scale(noise, jnp.float32)
    good = jax.random.normal(jax.random.key(0), (SIZE,))
    for _ in range(20):
        scale = noises.observe_gradient(noise, scale, good)
    before = noises.standard_deviation(noise, scale, SIZE)
    scale = noises.observe_gradient(noise, scale, bad * good)
    after = noises.standard_deviation(noise, scale, SIZE)
    assert np.all(after <= (1 + 1e-5) * factor * before)
    assert np.all(after > (factor > 1) * before)
    for _ in range(60):
        scale = noises.observe_gradient(noise, scale, good)
    np.testing.assert_allclose(noises.standard_deviation(noise, scale, SIZE), before, rtol=0.05)


@pytest.mark.parametrize(
    "bad, arguments",
    [
        (np.nan, {"noise": estimators.Noise(0.1, relative=True)}),
        (np.nan, {"search": guided(num_surrogates=2)}),
        (np.inf, {"search": past_descent(), "candidates_per_worker": 2, "assist": True}),
        (1e20, {"search": control_variate(), "predictor": estimators.learned_features()}),
    ],
)
def test_a_refresh_that_is_not_finite_teaches_nothing(bad, arguments):
    """What is known stays, and the steps in between go on from it."""
    theta, keys = jnp.asarray(THETA), jax.random.split(jax.random.key(0), 4)
    good, ill = (
        build(surrogate=fixed_surrogate(scale * STALE), refresh_every=2, **arguments)
        for scale in (1, bad)
    )
    state = good.init(theta, keys[0])
    if "predictor" in arguments:  # It learns from the second gradient on.
        state = jax.jit(good.estimate)(theta, state, keys[0])[1]
        state = jax.jit(good.estimate)(theta, state, keys[1])[1]
    state = jax.jit(good.estimate)(theta, state, keys[1])[1]
    state = state._replace(shared=state.shared._replace(step=jnp.int32(2)))
    grad, after, _ = jax.jit(ill.estimate)(theta, state, keys[2])
    if arguments.get("assist"):
        assert np.isfinite(grad).all()
    else:
        assert not np.abs(grad).max() < 1e19  # Said, not hidden; the trainer stays.
        for a, b in zip(
            *(jax.tree.leaves(s.shared._replace(step=0)) for s in (after, state)), strict=True
        ):
            np.testing.assert_array_equal(a, b)
    grad = jax.jit(ill.estimate)(theta, after, keys[3])[0]
    assert np.isfinite(grad).all() and np.abs(grad).max() < 10


def test_layers_of_one_entry_are_perturbed():
    noise = estimators.Noise(1.0, relative=True, layers=(1, 1))
    scale = noises.init_scale(noise, jnp.float32)
    scale = noises.observe_gradient(noise, scale, jnp.array([3.0, -0.5]))
    np.testing.assert_allclose(noises.standard_deviation(noise, scale, 2), [3, 0.5], rtol=1e-6)


def test_the_success_rule_ends_somewhere():
    noise = estimators.Noise(1.0, success_rate=5.0)
    scale = noises.init_scale(noise, jnp.float32)
    for _ in range(100):
        scale = noises.observe_success(noise, scale, jnp.zeros([]))
    np.testing.assert_allclose(noises.standard_deviation(noise, scale, 1), [1e-3], rtol=1e-5)


def test_a_mask_of_the_largest_is_no_larger_where_entries_are_equal():
    noise = estimators.Noise(1.0, mask="largest", fraction=0.2)
    surrogate = jnp.zeros(10).at[3].set(2.0)
    chosen = np.asarray(noises.mask(noise, jax.random.key(0), surrogate))
    assert chosen.sum() == 2 and chosen[3]


def test_masked_select_without_a_finite_candidate_is_zero(x64):
    system = UnrolledSystem(
        lambda theta, key, horizon: (), lambda theta, s, key: (s, jnp.nan * theta[0])
    )
    noise = estimators.Noise(0.1, mask="random", fraction=0.5)
    estimator = build(system=system, noise=noise)
    grad = jax.jit(estimator.estimate)(
        jnp.asarray(THETA), in_between(estimator), jax.random.key(1)
    )[0]
    np.testing.assert_array_equal(grad, np.zeros(SIZE))


def test_the_best_of_one_candidate_by_rank_is_that_candidate(x64):
    one = {"num_workers": 1, "candidates_per_worker": 1}
    found = []
    for combine in ("rank", "argmin"):
        estimator = build(search=tried(combine=combine), **one)
        state = in_between(estimator)
        found.append(estimator.estimate(jnp.asarray(THETA), state, jax.random.key(1))[0])
    np.testing.assert_array_equal(*found)
    assert np.all(np.isfinite(found[0]))


@pytest.mark.exact
@pytest.mark.parametrize(
    "base", some_fast(["bptt", "tbptt", "pes", "nres", "reversible"], ("pes",))
)
def test_the_gradients_are_those_of_the_base(base):
    """Two workers' refresh is the base's own estimate, its population goes on as alone."""
    sizes = {"num_particles": 8} | ({"truncation": 2} if base in ("tbptt", "pes", "nres") else {})
    config = cfg.Config(
        task=cfg.task("quadratic"),
        optimizer=cfg.optimizer(
            "reversible_mlp" if base == "reversible" else "mlp", hidden_sizes=(4,)
        ),
        inner=cfg.InnerConfig(horizon=4),
        estimator=cfg.estimator(
            "hybrid_es",
            base=cfg.estimator(base, **sizes),
            refresh_every=2,
            num_workers=2,
            candidates_per_worker=2,
        ),
    )
    optimizer = config.optimizer.make()
    system = make_system(config, config.task.make(None), optimizer)
    mixed = config.estimator.make(system, config.horizons())
    alone = config.estimator.base.make(system, config.horizons())
    theta = jax.jit(optimizer.init)(jax.random.key(0))
    state = jax.jit(mixed.init)(theta, jax.random.key(1))
    particles = jax.jit(alone.init)(theta, jax.random.key(1))
    step, step_alone = jax.jit(mixed.estimate), jax.jit(alone.estimate)
    for number in range(4):
        key = jax.random.fold_in(jax.random.key(2), number)
        grad, state, metrics = step(theta, state, key)
        assert np.isfinite(ravel_pytree(grad)[0]).all()
        if number % 2:
            assert not np.isnan(metrics["loss"])
            continue
        expected, particles, metrics_alone = step_alone(theta, particles, key)
        expected = ravel_pytree(expected)[0]
        scale = np.abs(expected).max()
        assert scale > 0
        np.testing.assert_allclose(ravel_pytree(grad)[0], expected, atol=2e-5 * scale)
        np.testing.assert_allclose(metrics["loss"], metrics_alone["loss"], rtol=1e-5)


def test_success_rule_forgets_where_sigma_started():
    """From a sigma 100 times apart, the same sigma and the same loss in the end."""

    def final(sigma):
        system = quadratic(noise=0.05)
        surrogate = estimators.bptt(system, num_particles=4, horizons=ONE)
        estimator = build(
            surrogate=surrogate, system=system, refresh_every=4,
            search=select(step_size=0.1, combine="rank"),
            candidates_per_worker=8, noise=estimators.Noise(sigma, success_rate=0.5),
        )  # fmt: skip
        step = trainer.make_step(estimator, optax.sgd(0.1))

        @jax.jit
        def run():
            theta = jnp.asarray(THETA, jnp.float32)
            state = trainer.init_state(estimator, optax.sgd(0.1), lambda key: theta, seed=0)

            def body(state, _):
                state, metrics = step(state)
                loss = state.theta @ (jnp.asarray(MATRIX, jnp.float32) @ state.theta) / 2
                return state, (loss, metrics["sigma"])

            return jax.lax.scan(body, state, None, length=600)[1]

        losses, sigmas = map(np.asarray, run())
        return np.mean(losses[-300:]), np.exp(np.nanmean(np.log(sigmas[-300:])))

    small, large = final(0.003), final(0.3)
    np.testing.assert_allclose(small, large, rtol=0.25)


@pytest.mark.slow  # From a sigma 100 times apart: `test_success_rule_forgets_where_sigma_started`.
def test_success_rule_makes_up_for_a_wrong_sigma():
    """Where the stale gradient overshoots: from a tenth or ten times the best fixed sigma, the
    loss ends within 10% of its; a fixed one is then 3 times as high, or diverges."""
    factors = jnp.array([0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0])
    system, start = quadratic(noise=0.05), jnp.asarray(THETA, jnp.float32)

    def final(success_rate):
        """Of each sigma; the geometric mean over seeds."""

        def run(sigma, seed):
            estimator = build(
                surrogate=estimators.bptt(system, num_particles=4, horizons=ONE), system=system,
                refresh_every=10, search=select(step_size=0.2, combine="rank", antithetic=True),
                noise=estimators.Noise(sigma, relative=True, success_rate=success_rate),
            )  # fmt: skip
            step = trainer.make_step(estimator, optax.sgd(0.2))
            state = trainer.init_state(estimator, optax.sgd(0.2), lambda key: start, seed=0)
            state = state._replace(key=jax.random.key(seed))

            def body(state, _):
                state = step(state)[0]
                return state, state.theta @ (jnp.asarray(MATRIX, jnp.float32) @ state.theta) / 2

            losses = jax.lax.scan(body, state, None, length=300)[1]
            return jnp.mean(jnp.log(losses[-100:]))

        every = jax.vmap(jax.vmap(run, (None, 0)), (0, None))
        return np.exp(np.mean(jax.jit(every)(factors, jnp.arange(32)), axis=1))

    fixed, adapted = final(0.0), final(0.5)
    best = int(np.nanargmin(fixed))
    assert 2 <= best <= len(factors) - 3
    assert np.max(adapted[[best - 2, best + 2]]) < 1.1 * fixed[best]
    assert not np.any(fixed[[best - 2, best + 2]] < 3 * fixed[best])


def test_prediction_beats_the_stale_gradient():
    """Gradients that turn slowly, seen with noise: the prediction points nearer to the next."""
    predictor = estimators.learned_features()
    rng = np.random.default_rng(0)
    size, phases = 300, rng.uniform(0, 2 * np.pi, 300)
    state = predictor.init(jax.random.key(0), size, jnp.float32)
    learn, predict = jax.jit(predictor.learn), jax.jit(predictor.predict)
    stale, cosines = np.zeros(size), []
    for number in range(120):
        true = np.sin(0.15 * number + phases)
        guess = np.asarray(predict(state))
        if number >= 60:
            cosines.append(
                [g @ true / np.linalg.norm(g) / np.linalg.norm(true) for g in (guess, stale)]
            )
        stale = true + 0.5 * rng.normal(size=size)
        state = learn(state, jnp.asarray(stale, jnp.float32))
    assert np.all(np.mean(cosines, axis=0) > 0.5)
    predicted, repeated = np.array(cosines).T
    assert np.mean(predicted) > np.mean(repeated) + 0.05


def test_prediction_of_gradients_that_are_zero():
    """It predicts zero, and learns from the first one that is not as if they had not been."""
    predictor = estimators.learned_features()
    state = predictor.init(jax.random.key(0), 5, jnp.float32)
    for _ in range(2):
        state = predictor.learn(state, jnp.zeros(5))
        np.testing.assert_array_equal(predictor.predict(state), np.zeros(5))
    gradient = jnp.arange(5.0)
    np.testing.assert_allclose(predictor.predict(predictor.learn(state, gradient)), gradient)


@pytest.mark.parametrize("search", [control_variate(), guided(num_surrogates=2)])
def test_a_relative_sigma_of_gradients_that_are_zero(search):
    """Perturbations of size zero say nothing, rather than 0 / 0."""
    estimator = build(
        search=search,
        noise=estimators.Noise(0.1, relative=True),
        surrogate=fixed_surrogate(np.zeros(SIZE)),
        refresh_every=3,
    )
    state = estimator.init(jnp.asarray(THETA), jax.random.key(0))
    estimate = jax.jit(estimator.estimate)
    for step in range(6):
        grad, state, _ = estimate(jnp.asarray(THETA), state, jax.random.key(step))
        np.testing.assert_array_equal(grad, np.zeros(SIZE))


@pytest.mark.parametrize("name", ["int8", "top_k"])
def test_error_feedback_loses_nothing(x64, name):
    """What was sent, plus what is left, is what should have been sent."""
    coder = compression.COMPRESSORS[name](0.2)
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(20, 50))
    residual, total = jnp.zeros(50), 0.0
    for vector in vectors:
        payload, residual = compression.with_feedback(coder, jnp.asarray(vector), residual)
        total = total + coder.decode(payload, 50, jnp.float64)
        sent = sum(leaf.nbytes for leaf in jax.tree.leaves(payload))
        assert sent == coder.num_bytes(50) == {"int8": 54, "top_k": 80}[name]
    np.testing.assert_allclose(total + residual, vectors.sum(axis=0), atol=1e-5)
    bound = np.abs(vectors).max() / 127 if name == "int8" else 5 * np.abs(vectors).max()
    assert np.abs(residual).max() < bound
    bad = jnp.full(50, jnp.nan)
    np.testing.assert_array_equal(compression.with_feedback(coder, bad, residual)[1], residual)


# Refusals, and whole jobs.


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"search": guided(), "candidates_per_worker": 3}, "`candidates_per_worker` must be even"),
        ({"chunk": 3}, "`chunk` must divide"),
        ({"search": tried(combine="top", top=17)}, "got top=17 for 16"),
        ({"noise": estimators.Noise(0.1, mask="random", fraction=0.0)}, "`fraction` must be above"),
        ({"noise": estimators.Noise(0.1, fraction=0.5)}, "`fraction` needs a mask"),
        ({"noise": estimators.Noise(0.1, sampler="gauss")}, "`sampler` must be one of"),
        (
            {"search": control_variate(), "noise": estimators.Noise(0.1, success_rate=1.0)},
            "`success_rate` needs the search 'select'",
        ),
        (
            {"search": guided(), "noise": estimators.Noise(0.1, mask="random", fraction=0.5)},
            "'guided' chooses its own directions",
        ),
        (
            {"search": past_descent(), "predictor": estimators.learned_features()},
            "`predictor` cannot be used with the search 'past_descent'",
        ),
    ],
)
def test_contradictions_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        build(**arguments)


@pytest.mark.parametrize(
    "search, arguments, message",
    [
        (select, {"step_size": 1.0, "combine": "best"}, "`combine` must be one of"),
        (select, {"step_size": 1.0, "top": 0}, "`top` must be"),
        (select, {"step_size": 0.0}, "`step_size` must be"),
        (guided, {"alpha": 0.0}, "`alpha` must be above 0"),
        (guided, {"num_surrogates": 0}, "`num_surrogates` must be"),
    ],
)
def test_searches_check_their_arguments(search, arguments, message):
    with pytest.raises(ValueError, match=message):
        search(**arguments)


def test_sizes_that_do_not_fit_are_refused():
    for arguments, message in (
        ({"num_workers": 3}, "`num_workers` must divide"),
        ({"noise": estimators.Noise(0.1, layers=(2, 3))}, "`layers` must sum"),
        ({"search": past_descent()}, "needs 8 independent directions, but theta has 6"),
    ):
        with pytest.raises(ValueError, match=message):
            build(**arguments).init(jnp.asarray(THETA), jax.random.key(0))


def test_configuration_is_checked():
    preset = cfg.load_preset("hybrid_es_digits")
    for changes, message in (
        ({"meta": cfg.meta_optimizer("adam")}, "plain gradient descent"),
        ({"num_workers": 3}, "must divide the population"),
        ({"base": preset.estimator}, "`base` must be an estimator of its own"),
        ({"mask": "layers"}, "`mask`='layers' needs `per_layer`"),
        ({"inner": cfg.InnerConfig(horizon=20)}, "`trains`=network needs"),
        ({"mode": "best"}, "`mode` must be one of"),
        ({"mode": "guided", "antithetic": True}, "`antithetic` is for mode='select'"),
        ({"mode": "guided", "top": 33}, "`top` must be at most"),
    ):
        with pytest.raises(ValueError, match=message):
            own = {name: value for name, value in changes.items() if hasattr(preset, name)}
            rest = {name: value for name, value in changes.items() if name not in own}
            own |= {"estimator": dataclasses.replace(preset.estimator, **rest)} if rest else {}
            dataclasses.replace(preset, **own)
    # 8 gradients of one step every third step; else 32 candidates on 8 batches each.
    np.testing.assert_allclose(preset.inner_steps(), 8 / 3 + 2 / 3 * 32 * 8)


def command(workdir, *flags, module="launch.train"):
    return [sys.executable, "-m", module, f"--workdir={workdir}", *flags]


@pytest.mark.slow  # In one process: `test_replay_command.py`; killed jobs: `test_train.py`.
def test_killed_job_is_rebuilt_from_its_log_and_resumes(tmp_path):
    """The preset, killed with SIGKILL: the log gives the very weights that a resumed job has."""
    workdir = tmp_path / "job"
    env = {k: v for k, v in os.environ.items() if k not in ("JAX_NUM_CPU_DEVICES", "XLA_FLAGS")}
    options = {"cwd": ROOT, "env": env, "text": True, "stderr": subprocess.PIPE}
    flags = ["--preset=hybrid_es_digits", "--cfg.checkpoint_every=50", "--cfg.keep_checkpoints=100",
             "--cfg.eval_every=0", "--cfg.num_devices=2", "--cfg.wandb_mode=disabled"]  # fmt: skip
    process = subprocess.Popen(command(workdir, *flags, "--cfg.num_steps=100000"), **options)
    log, record = workdir / "replay.log", 1
    deadline = time.monotonic() + 400
    while process.poll() is None and (not log.exists() or log.stat().st_size < 300_000 * record):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert process.poll() is None, process.communicate()[1]
    process.send_signal(signal.SIGKILL)
    process.communicate()
    flag = ["--from_step=0"]
    done = subprocess.run(
        command(workdir, *flag, module="launch.replay"), stdout=subprocess.PIPE, **options
    )
    assert done.returncode == 0, done.stderr
    step = int(re.search(r"outer step (\d+)", done.stdout).group(1))
    assert step > 50
    done = subprocess.run(
        command(workdir, *flags, f"--cfg.num_steps={step}"), stdout=subprocess.PIPE, **options
    )
    assert done.returncode == 0, done.stderr
    assert "Continuing" in done.stderr
    rebuilt, trained = (
        load_file(workdir / name / "weights.safetensors") for name in ("network_rebuilt", "network")
    )
    assert set(trained) == {"0/b", "0/w", "1/b", "1/w"}
    for name in trained:
        np.testing.assert_array_equal(rebuilt[name], trained[name])
