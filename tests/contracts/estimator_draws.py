"""The contract of every estimator on randomness: each outer step draws anew, for every use."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from meta_train import estimators, trainer
from meta_train.estimators.hybrid import control_variate, guided, past_descent, select
from meta_train.unroll import UnrolledSystem
from tests import systems

NUM_STEPS, COMPARED = 7, 4
LONGEST, TRUNCATION = 8, 4
# What counts in the losses of `systems.shown_draws`: the batches, the starts, theta, or nothing.
USES = np.eye(4, dtype=np.float32)
THETA = jnp.array([0.3, -0.2, 0.5], jnp.float32)
# A large sigma, so that what is drawn shows where the rest of an estimate is exact.
NOISY = {name: {"sigma": 0.5} for name in ("reparam", "reparam_es", "pes_analytic", systems.HYBRID)}
# With theta held and all data alike, these give the same estimate again and again.
EXACT = ("bptt", "tbptt", "rtrl", "reversible")


def outer_steps(estimator_of, theta=THETA):
    """What the real train step reports of its last steps, for each row of ``USES``.

    Returns:
      The estimates, ``[4, COMPARED, P]``, and the losses, ``[4, COMPARED]``.
    """
    # Holds theta, and remembers the gradient it was given.
    remember = optax.GradientTransformation(
        lambda theta: jnp.zeros_like(theta),
        lambda grad, _, theta: (jnp.zeros_like(theta), grad),
    )

    def run(use):
        estimator = estimator_of(systems.shown_draws(use))
        state = trainer.init_state(estimator, remember, lambda key: theta, seed=0)
        step = trainer.make_step(estimator, remember)

        def body(state, _):
            state, metrics = step(state)
            return state, (state.meta_opt_state, metrics["meta_loss"])

        return jax.lax.scan(body, state, None, length=NUM_STEPS)[1]

    found = jax.jit(lambda uses: jax.lax.map(run, uses))(USES)
    return [np.asarray(x)[:, -COMPARED:] for x in found]


def all_differ(values):
    """Whether no two of ``values [n, ...]`` are equal but for rounding."""
    values = values.reshape(len(values), -1)
    distances = np.abs(values[:, None] - values[None]).max(axis=-1)
    return distances[~np.eye(len(values), dtype=bool)].min() > 1e-3 * np.abs(values).max()


# Uses that one estimator has beside the common ones.
CASES = {
    "guided_es": [{"alpha": 1.0}, {"alpha": 1e-6}],  # The isotropic part alone; the other alone.
    systems.HYBRID: [
        {"search": search, "refresh_every": 100, "candidates_per_worker": 2}
        for search in (
            control_variate(),
            select(step_size=1.0),
            select(step_size=1.0, combine="rank"),
            guided(num_surrogates=1),
            past_descent(),
        )
    ],
}


# By the same functions as others: without what `pes` sums, without what `artbp` cuts.
ALIKE = ("bptt", "full_es", "rtrl", "truncated_es")


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        pytest.param(name, case, marks=[pytest.mark.slow] if name in ALIKE else [])
        for name in systems.ESTIMATORS
        for case in CASES.get(name, [{}])
    ],
    ids=lambda value: (
        "-".join(str(getattr(x, "name", x)) for x in value.values())
        if isinstance(value, dict)
        else value
    ),
)
def test_every_outer_step_draws_anew(name, arguments):
    """Batches, starts, and what the estimator draws itself: perturbations, signs, cuts, ..."""
    grads, losses = outer_steps(
        lambda system: systems.on_system(
            name,
            system,
            estimators.fixed_horizon(LONGEST),
            TRUNCATION,
            **NOISY.get(name, {}) | arguments,
        )
    )
    batches, starts, itself, nothing = range(4)
    assert all_differ(losses[batches])
    assert all_differ(losses[starts])
    np.testing.assert_allclose(losses[nothing], 1.0, rtol=1e-5)
    if name in EXACT:
        assert np.ptp(grads[itself], axis=0).max() < 1e-4 * np.abs(grads[itself]).max()
    else:
        assert all_differ(grads[itself])


# Of each way to draw them one; that every episode has the horizon drawn for it is asked of every
# estimator (`test_the_drawn_horizon_reaches_the_start_of_every_episode`).
HORIZONS_DRAWN = ("artbp", "bptt", "guided_es", "pes", "reversible", "uoro", systems.HYBRID)


@pytest.mark.parametrize("name", systems.some_fast(systems.ESTIMATORS, HORIZONS_DRAWN))
def test_every_outer_step_draws_horizons_anew(name):
    horizons = estimators.Horizons(np.arange(1, LONGEST + 1), np.full(LONGEST, 1 / LONGEST))
    more = {"refresh_every": 100} if name == systems.HYBRID else {}
    _, losses = outer_steps(
        lambda system: systems.on_system(name, system, horizons, TRUNCATION, **more)
    )
    assert np.ptp(losses[3]) > 0.05  # Of losses that are all 1.


# All take their rows from `perturbations.perturbation_sampler`: a pair a particle, several, or
# beside a guide.
@pytest.mark.parametrize(
    "name", systems.some_fast(systems.PERTURBING, ("guided_es", "pes", "reparam_es"))
)
def test_every_outer_step_draws_a_block_anew(name):
    """Rows of a block that share nothing but its key: a shift of Sobol points."""
    grads, _ = outer_steps(
        lambda system: systems.on_system(
            name,
            system,
            estimators.fixed_horizon(LONGEST),
            TRUNCATION,
            sampler="sobol",
            **NOISY.get(name, {}),
        )
    )
    assert all_differ(grads[2])


def test_every_outer_step_masks_other_entries():
    """Between refreshes, entries that are not perturbed have the stale gradient, to the bit."""
    size = 12
    slopes = jnp.arange(1.0, size + 1)
    noise = estimators.Noise(0.1, mask="random", fraction=0.5)

    def estimator_of(system):
        del system

        def step(theta, state, key):
            return state, jnp.sum(slopes * theta**3)

        plain = UnrolledSystem(lambda theta, key, horizon: (), step)
        one = estimators.fixed_horizon(1)
        return systems.on_system(systems.HYBRID, plain, one, 1, refresh_every=100, noise=noise)

    theta = jnp.linspace(0.5, 1.0, size)
    grads = outer_steps(estimator_of, theta)[0][0]
    perturbed = np.abs(grads / (3 * slopes * theta**2) - 1) > 1e-5
    assert 0 < perturbed.mean() < 1
    assert len({tuple(row) for row in perturbed}) == COMPARED


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] if name in ALIKE else [])
        for name in systems.ESTIMATORS
        if name != systems.HYBRID
    ],
)
def test_every_particle_draws_on_its_own(name):
    """Batches, starts, and what the estimator draws itself."""

    def run(use):
        estimator = systems.on_system(
            name,
            systems.shown_draws(use),
            estimators.fixed_horizon(LONGEST),
            TRUNCATION,
            **NOISY.get(name, {}),
        )
        state = estimator.init(THETA, jax.random.key(0))
        if name == "pes_analytic":  # Exact in the first truncation of an episode: take the second.
            state = estimator.estimate(THETA, estimators.synchronized(state), jax.random.key(2))[1]

        def alone(i):
            particle = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, i, 1), state)
            grad, _, metrics = estimator.estimate(THETA, particle, jax.random.key(1))
            return grad, metrics["loss"]

        return jax.lax.map(alone, jnp.arange(4))

    grads, losses = map(np.asarray, jax.jit(lambda uses: jax.lax.map(run, uses))(USES))
    assert all_differ(losses[0]) and all_differ(losses[1])
    assert name in EXACT or all_differ(grads[2])
