"""Systems with known gradients, and how the tests run an estimator on them."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from meta_train import estimators
from meta_train.estimators import synchronized
from meta_train.estimators.config import PairsConfig
from meta_train.estimators.hybrid import control_variate
from meta_train.reversible.dynamics import Dynamics
from meta_train.reversible.system import Start, reversible_system
from meta_train.unroll import UnrolledSystem, unroll


def linear(seed, state_size=4, theta_size=3, radius=0.9):
    """``s <- A s + B theta``, ``L = |s - y|^2 / 2``: every loss is quadratic in theta.

    Returns the system and a theta, float64.
    """
    rng = np.random.default_rng(seed)
    a = rng.normal(size=(state_size, state_size))
    a *= radius / np.abs(np.linalg.eigvals(a)).max()
    b = rng.normal(size=(state_size, theta_size)) / np.sqrt(theta_size)
    target, start = rng.normal(size=(2, state_size))

    def init(theta, key, horizon):
        return jnp.asarray(start)

    def step(theta, state, key):
        state = a @ state + b @ theta
        return state, jnp.sum((state - target) ** 2) / 2

    return UnrolledSystem(init, step), jnp.asarray(rng.normal(size=theta_size))


def nonlinear(seed):
    """Everything a state may hold: theta enters its start, and it has a counter, a key and noise.

    Theta is a dict of three leaves. Returns the system and a theta, in the default precision.
    """
    rng = np.random.default_rng(seed)
    theta = {
        "start": jnp.asarray(rng.normal(size=2)),
        "weight": jnp.asarray(rng.normal(size=(5, 5)) / np.sqrt(5)),
        "scale": jnp.asarray(rng.normal()),
    }

    def init(theta, key, horizon):
        noise = cheap_noise(key, 3).astype(theta["start"].dtype)
        return {
            "x": jnp.concatenate([theta["start"], noise]),
            "count": jnp.int32(0),
            "key": key,
            "trace": jnp.zeros((), theta["scale"].dtype),
        }

    def step(theta, state, key):
        drive = cheap_noise(key, 5) + state["count"] * cheap_noise(state["key"], 5)
        drive = (0.3 * drive).astype(theta["scale"].dtype)
        x = jnp.tanh(theta["weight"] @ state["x"] + theta["scale"] * drive)
        trace = 0.8 * state["trace"] + jnp.sum(x) * theta["scale"]
        loss = jnp.sum(x**2) + trace**2 / (1 + state["count"])
        return {"x": x, "count": state["count"] + 1, "key": state["key"], "trace": trace}, loss

    return UnrolledSystem(init, step), theta


def cheap_noise(key, size):
    """Some function of a key with zero mean, ``[size]``; compiles faster than ``jax.random``."""
    words = jax.random.key_data(key)[-1] >> jnp.arange(size, dtype=jnp.uint32)
    return (words % 1024).astype(jnp.float32) / 512 - 1  # Exact, so equal however it is compiled.


def quartic(horizon):
    """``s <- s + theta`` from 0, ``L = s^4`` at the last step and 0 before; theta is a scalar."""

    def init(theta, key, horizon):
        return jnp.zeros_like(theta), jnp.int32(0)

    def step(theta, state, key):
        total, count = state[0] + theta, state[1] + 1
        return (total, count), jnp.where(count == horizon, total**4, 0.0)

    return UnrolledSystem(init, step)


def window_gradients(system, theta, horizon, truncation):
    """``g[t, r, P]``: the gradient of the summed loss of window ``t`` by the theta of window ``r``.

    For systems without randomness.
    """
    windows = horizon // truncation
    key = jax.random.key(0)

    def losses(thetas):
        def window(state, theta):
            state, losses = unroll(system, theta, state, key, truncation)
            return state, jnp.sum(losses)

        return jax.lax.scan(window, system.init(thetas[0], key, horizon), thetas)[1]

    return np.asarray(jax.jit(jax.jacobian(losses))(np.tile(theta, (windows, 1))))


def replicates(estimator, theta, num_replicates, num_steps, *, burn_in=0, together=True, seed=0):
    """Independent estimates with theta held: the mean over ``num_steps`` outer steps each.

    Args:
      burn_in: outer steps before those that count.
      together: all particles start an episode in the first truncation (else the phases of
        ``estimator.init``); ignored by estimators without phases.

    Returns:
      Estimates, ``[num_replicates, P]`` with theta flattened.
    """

    def one(key):
        key_init, key_steps = jax.random.split(key)
        state = estimator.init(theta, key_init)
        if together and hasattr(state, "position"):
            state = synchronized(state)

        def body(state, key):
            grad, state, _ = estimator.estimate(theta, state, key)
            return state, jax.flatten_util.ravel_pytree(grad)[0]

        keys = jax.random.split(key_steps, burn_in + num_steps)
        state, _ = jax.lax.scan(body, state, keys[:burn_in])
        return jnp.mean(jax.lax.scan(body, state, keys[burn_in:])[1], axis=0)

    keys = jax.random.split(jax.random.key(seed), num_replicates)
    return np.asarray(jax.jit(jax.vmap(one))(keys))


def z_scores(samples, expected):
    """How many standard errors the mean of ``samples [R, P]`` is from ``expected [P]``."""
    error = samples.std(axis=0, ddof=1) / np.sqrt(len(samples))
    return (samples.mean(axis=0) - np.asarray(expected)) / error


def standard_errors(samples):
    return samples.std(axis=0, ddof=1) / np.sqrt(len(samples))


def leaves_equal(a, b):
    """Whether two trees hold the same arrays, NaN where NaN."""
    pairs = zip(*map(jax.tree.leaves, (a, b)), strict=True)
    return all(
        np.array_equal(x, y, equal_nan=np.issubdtype(x.dtype, np.floating)) for x, y in pairs
    )


# The estimators by name, on any system: what the contracts run over.

ESTIMATORS = sorted(estimators.ESTIMATORS)
# Those that perturb theta.
PERTURBING = [name for name in ESTIMATORS if issubclass(estimators.ESTIMATORS[name], PairsConfig)]
HYBRID = "hybrid_es"


def some_fast(names, fast):
    """Parameters: the names, with all but those of ``fast`` among the slow tests."""
    assert set(fast) <= set(names), fast
    return [name if name in fast else pytest.param(name, marks=pytest.mark.slow) for name in names]


ARGUMENTS = {
    "num_particles": 4,
    "num_pairs": 4,
    "mean_truncation": 3.0,
    "num_surrogates": 1,
    "pairs_per_particle": 4,
    "sigma": 0.1,
}
HYBRID_ARGUMENTS = {
    "refresh_every": 3,
    "num_workers": 2,
    "candidates_per_worker": 4,
    "search": control_variate(),
}


def on_system(name, system, horizons, truncation, *, base="bptt", **arguments):
    """The estimator of that name, with the arguments that its signature asks for.

    Args:
      base: what ``hybrid_es`` refreshes with.
      arguments: in place of those of ``ARGUMENTS`` (``HYBRID_ARGUMENTS``).
    """
    build = getattr(estimators, name)
    known = ARGUMENTS | {"horizons": horizons, "truncation": truncation}
    known |= {"noise_period": 2 * truncation}
    taken = {key: known[key] for key in known if key in inspect.signature(build).parameters}
    if name == HYBRID:
        sigma = arguments.pop("sigma", ARGUMENTS["sigma"])
        refresh = on_system(base, system, horizons, truncation)
        taken = {"horizons": horizons, "noise": estimators.Noise(sigma)} | HYBRID_ARGUMENTS
        return build(system, refresh, **taken | arguments)
    return build(system, **taken | arguments)


def flat_estimates(name, system, theta, horizons, truncation, num_steps=4, seed=0, **arguments):
    """Estimates of as many outer steps with theta held, ``[num_steps, P]``, and their metrics."""
    estimator = on_system(name, system, horizons, truncation, **arguments)

    def run(theta):
        state = estimator.init(theta, jax.random.key(seed))

        def body(state, key):
            grad, state, metrics = estimator.estimate(theta, state, key)
            metrics.pop("message", None)
            return state, (jax.flatten_util.ravel_pytree(grad)[0], metrics)

        return jax.lax.scan(body, state, jax.random.split(jax.random.key(seed + 1), num_steps))[1]

    grads, metrics = jax.jit(run)(theta)
    return np.asarray(grads), metrics


def undoable(start, move, observe, dtype=jnp.float32):
    """A system that every estimator can run, ``reversible`` too.

    Three weights ``w <- w + move(theta, step)`` from ``start(theta, key, horizon)``, and losses
    ``observe(theta, w, step, key)``.
    """

    def begin(theta, key, horizon):
        return Start((), start(theta, key, horizon), jnp.zeros((1, 3), dtype))

    dynamics = Dynamics(
        loss=lambda theta, weights, x: jnp.sum(weights**2),
        decay=lambda theta, hyper: jnp.full((1, 1), 0.5, dtype),
        absorb=lambda theta, hyper, gradient, x: gradient[None],
        move=lambda theta, hyper, accumulators, x: move(theta, x[0]),
        observe=lambda theta, loss, weights, x: observe(theta, weights, *x),
    )
    return reversible_system(begin, lambda context: dynamics, np.array([0.5]))


def shown_draws(weights):
    """A system whose losses show what was drawn, for every estimator; theta is ``[3]``.

    The loss is ``weights @ (batch, start, state^3, 1)`` with a number of the batch and one of the
    start, drawn from their keys, and a state that moves with theta. A loss that theta does not
    enter says the same of both halves of a pair.
    """
    batch, start, cubed, constant = weights

    def begin(theta, key, horizon):
        return 1 + start * cheap_noise(key, 3)

    def observe(theta, state, step, key):
        loss = batch * cheap_noise(key, 1)[0] + cubed * jnp.sum(state**3) + constant
        return loss + start * jnp.sum(jax.lax.stop_gradient(state - step * 0.1 * theta))

    return undoable(begin, lambda theta, step: 0.1 * theta, observe)
