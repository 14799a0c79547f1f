"""Where training turns chaotic, exact gradients turn to noise and evolution strategies do not."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from matplotlib.figure import Figure

from launch.studies.base import Claim, Result, Study
from launch.studies.shared import classifier, plots
from launch.studies.shared.compare import in_parallel
from launch.studies.shared.episodes import estimates
from meta_train.estimators import fixed_horizon, pes, reversible
from meta_train.reversible.dynamics import Dynamics
from meta_train.reversible.system import Start, reversible_system
from meta_train.unroll import UnrolledSystem, unroll

NUM_STEPS = 50
TRUNCATION = 10
BATCH = 100
HIDDEN = (50, 50)
MOMENTUM = 922 / 1024
SIGMA = 0.1
PAIRS = 16
EPISODES = 8  # forward and back cost about as much as the pairs' 2 x 16 forward runs


def run(quick: bool, data_dir: str | None) -> Result:
    """The derivative of the mean training loss by the log learning rate, along a sweep."""
    train, _, side = classifier.splits(data_dir)
    system = sgd_system(train, (side**2, *HIDDEN, 10))
    log_rates = np.linspace(-3.0, 4.0, 8 if quick else 22)
    repeats = 6 if quick else 12
    exact = reversible(system, num_particles=EPISODES, horizons=fixed_horizon(NUM_STEPS))
    smoothed = pes(
        system,
        num_pairs=PAIRS,
        truncation=TRUNCATION,
        horizons=fixed_horizon(NUM_STEPS),
        sigma=SIGMA,
    )

    @jax.jit
    def exact_estimates(theta):
        ids = exact.init(theta, jax.random.key(0))
        keys = jax.random.split(jax.random.key(1), repeats)
        return jax.lax.map(lambda key: exact.estimate(theta, ids, key)[0], keys)

    @jax.jit
    def pes_estimates(theta):
        windows = NUM_STEPS // TRUNCATION
        keys = jax.random.split(jax.random.key(2), (repeats + 1) * windows)
        grads = estimates(smoothed, theta, smoothed.init(theta, jax.random.key(3)), keys)[1]
        return jnp.mean(grads.reshape(repeats + 1, windows)[1:], axis=1)

    @jax.jit
    def mean_losses(theta):
        def one(key):
            begin, steps = jax.random.split(key)
            return jnp.mean(
                unroll(system, theta, system.init(theta, begin, NUM_STEPS), steps, NUM_STEPS)[1]
            )

        return jax.vmap(one)(jax.random.split(jax.random.key(4), 8 if quick else 16))

    fine = np.arange(-3.4, 4.4, 0.1 if quick else 0.05)

    def along(of, points):
        return np.array([of(jnp.float32(x)) for x in points])

    found = in_parallel(
        {
            "landscape": partial(along, mean_losses, fine),
            "exact": partial(along, exact_estimates, log_rates),
            "PES": partial(along, pes_estimates, log_rates),
        }
    )
    landscape = found.pop("landscape")
    reference = smooth_slope(fine, landscape.mean(axis=1), log_rates)
    rows = [
        {"learning rate": float(np.exp(log_rate)), "smoothed slope": float(slope)}
        | {f"error of {name}": rms(values[i] - slope) for name, values in found.items()}
        for i, (log_rate, slope) in enumerate(zip(log_rates, reference, strict=True))
    ]
    low = [row for row in rows if row["learning rate"] < 1.0]
    high = rows[-(2 if quick else 4) :]
    low_ratio = float(np.median([row["error of PES"] / row["error of exact"] for row in low]))
    high_ratio = float(np.median([row["error of exact"] / row["error of PES"] for row in high]))
    claims = [
        Claim(
            "At learning rates below 1 exact gradients are the better estimate of the smoothed "
            "slope.",
            low_ratio > 1,
            f"median error of PES / error of exact: {low_ratio:.1f}",
        ),
        Claim(
            "At the highest learning rates they are noise: PES has an error at least 10 times "
            "smaller at the same compute.",
            high_ratio > 10,
            f"median error of exact / error of PES: {high_ratio:.3g} at learning rates from "
            f"{high[0]['learning rate']:.1f}",
        ),
    ]
    data = {"log_rates": log_rates, "estimates": found, "landscape": landscape}
    caption = (
        f"{classifier.name(data_dir)} tanh MLP, hidden {HIDDEN}, batch {BATCH}, T = {NUM_STEPS}; "
        f"landscape: {landscape.shape[1]} seeds and their mean; errors over {repeats} estimates"
    )
    return Result(claims, rows, draw(fine, landscape, rows), data, caption)


def sgd_system(split: classifier.Split, sizes: tuple[int, ...]) -> UnrolledSystem:
    """SGD with momentum on a tanh network; theta is the logarithm of its learning rate."""
    unravel = ravel_pytree(classifier.init(jax.random.key(0), sizes))[1]

    def begin(theta, key, horizon):
        del theta
        weights = ravel_pytree(classifier.init(key, sizes))[0]
        return Start((), weights, jnp.zeros((1, weights.size)))

    def loss(theta, weights, x):
        del theta
        return classifier.cross_entropy(unravel(weights), classifier.batch(split, x[1], BATCH))

    dynamics = Dynamics(
        loss=loss,
        decay=lambda theta, hyper: jnp.full((1, 1), MOMENTUM),
        absorb=lambda theta, hyper, gradient, x: (MOMENTUM - 1) * gradient[None],
        move=lambda theta, hyper, velocity, x: jnp.exp(theta) * velocity[0],
    )
    return reversible_system(begin, lambda context: dynamics, np.array([MOMENTUM]))


def smooth_slope(grid: np.ndarray, values: np.ndarray, at: np.ndarray) -> np.ndarray:
    """The derivative of ``values`` after Gaussian smoothing of width ``SIGMA``."""
    weights = np.exp(-0.5 * ((grid - at[:, None]) / SIGMA) ** 2)
    offsets = grid - at[:, None]
    mean = np.sum(weights * offsets, 1) / np.sum(weights, 1)
    centred = offsets - mean[:, None]
    return np.sum(weights * centred * values, 1) / np.sum(weights * centred**2, 1)


def rms(x: np.ndarray) -> float:
    """Root mean square."""
    return float(np.sqrt(np.mean(np.square(x, dtype=np.float64))))


def draw(fine, landscape, rows) -> Figure:
    """The loss along the sweep, and the error of both estimators."""
    figure, (left, right) = plots.panels(2, (8.8, 3.4))
    seeds = left.plot(np.exp(fine), landscape, color="0.75", lw=0.6)
    seeds[0].set_label("one seed")
    left.plot(np.exp(fine), landscape.mean(axis=1), color="k", label="mean")
    left.set(ylabel=f"mean loss of {NUM_STEPS} steps (nats)", title="What is differentiated")
    rates, slopes, exact, pes = np.transpose([list(row.values()) for row in rows])
    right.plot(rates, exact, "*-", color=plots.COLORS["exact"], ms=8, label="exact")
    right.plot(rates, pes, "o-", color=plots.COLORS["PES"], label="PES")
    right.plot(
        rates, np.abs(slopes), "--", color=plots.GRAY, lw=1, label="size of the smoothed slope"
    )
    right.set(
        ylabel="root mean square error of the slope", title="Gradient estimates at equal compute"
    )
    for axes in (left, right):
        axes.set(xscale="log", yscale="log", xlabel="learning rate")
        axes.legend()
    return figure


STUDY = Study(
    "where exact hypergradients turn to noise and PES's do not (Maclaurin 2015, Fig. 11)", 2.0, run
)
