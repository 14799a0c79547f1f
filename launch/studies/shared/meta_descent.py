"""Gradient descent on meta-parameters by exact hypergradients, and what the result is worth."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from launch.studies.base import Claim
from launch.studies.shared import classifier, plots
from meta_train import reversible
from meta_train.progress import progress

CURVE_POINTS = 20  # of a test curve, besides the start

# (theta, key) -> (final loss, its gradient by theta, whether the run was recovered to the bit)
Gradient = Callable[[Any, jax.Array], tuple[jax.Array, Any, jax.Array]]


class MetaDescent(NamedTuple):
    """Theta and the final training loss (before the step) of every meta-step; all exact?"""

    thetas: list[Any]
    losses: list[float]
    exact: bool

    def claim(self, num_steps: int) -> Claim:
        """That every hypergradient, of ``num_steps`` training steps, was exact."""
        return Claim(
            "Every hypergradient was exact: each run was recovered to the bit.",
            self.exact,
            f"{len(self.losses)} reversals of {num_steps} steps",
        )


def meta_descend(gradient: Gradient, theta: Any, rate: float, num_steps: int) -> MetaDescent:
    """Adam with ``gradient``, another key at every step."""
    optimizer = optax.adam(rate)

    @jax.jit
    def step(theta, opt_state, key):
        value, grad, ok = gradient(theta, key)
        updates, opt_state = optimizer.update(grad, opt_state)
        return optax.apply_updates(theta, updates), opt_state, value, ok

    opt_state = optimizer.init(theta)
    thetas, losses, exact = [], [], True
    for i in progress(range(num_steps), desc="meta-steps"):
        key = jax.random.fold_in(jax.random.key(1), i)
        theta, opt_state, value, ok = step(theta, opt_state, key)
        thetas.append(theta)
        losses.append(float(value))
        exact &= bool(ok)
    return MetaDescent(thetas, losses, exact)


def whole_run(inner_loss, objective, setup, *, num_steps: int, momentum_floor: float) -> Gradient:
    """Of ``objective(params, theta)`` after training from ``setup(theta)``, which draws nothing."""

    def gradient(theta, key):
        del key
        value, grads, trained = reversible.hypergradients(
            inner_loss, objective, setup(theta), num_steps=num_steps, momentum_floor=momentum_floor
        )
        return value, grads.theta, trained.report.ok

    return gradient


class Training(NamedTuple):
    """Training a classifier on random batches, as a function of meta-parameters theta.

    Attributes:
      setup: ``(theta, key) -> reversible.Setup``: the network, its learning rates and momenta.
      train: what it trains on, and the split of the meta-objective, the final loss.
      test: another split.
      batch_size: examples a step.
      num_steps: training steps.
      momentum_floor: no momentum is below this.
    """

    setup: Callable[[Any, jax.Array], reversible.Setup]
    train: classifier.Split
    test: classifier.Split
    batch_size: int
    num_steps: int
    momentum_floor: float

    def gradient(self, theta: Any, key: jax.Array) -> tuple[jax.Array, Any, jax.Array]:
        """Of the final training loss of one run; see ``Gradient``."""
        start, pull = jax.vjp(lambda theta: self.setup(theta, key), theta)
        value, grads, trained = reversible.hypergradients(
            _batch_loss(self, key),
            lambda params, theta: classifier.cross_entropy(params, self.train),
            start,
            num_steps=self.num_steps,
            momentum_floor=self.momentum_floor,
        )
        return value, pull(grads)[0], trained.report.ok


class EvaluatedTraining(NamedTuple):
    """Over seeds: mean losses along and after training, and the largest final training loss.

    Attributes:
      curve: of the batch at each step, ``[T]``.
      test_curve: of the test split at the start and after each ``1 / CURVE_POINTS`` of the run.
    """

    curve: np.ndarray
    test_curve: np.ndarray
    train: float
    test: float
    worst: float


def evaluation(
    training: Training, num_seeds: int, seed: int = 99
) -> Callable[[Any], EvaluatedTraining]:
    """``theta -> EvaluatedTraining`` over seeds that ``meta_descend`` never sees; compiled once.

    Trains in segments, to test in between, where the exact state is rounded to floats.
    """
    segment, rest = divmod(training.num_steps, CURVE_POINTS)
    assert rest == 0, f"training steps must be a multiple of {CURVE_POINTS}"

    def one(theta, key):
        start, loss = training.setup(theta, key), _batch_loss(training, key)

        def segments(schedule):
            """``[T, ...]``, or a constant, for each segment."""
            if schedule.ndim and schedule.shape[0] == training.num_steps:
                return schedule.reshape(CURVE_POINTS, segment, *schedule.shape[1:])
            return jnp.broadcast_to(schedule, (CURVE_POINTS, *schedule.shape))

        def advance(carry, xs):
            index, hyper = xs
            trained = reversible.train(
                lambda params, theta, step: loss(params, theta, index * segment + step),
                start._replace(params=carry[0], velocity=carry[1], **hyper),
                num_steps=segment,
                momentum_floor=training.momentum_floor,
            )
            test = classifier.cross_entropy(trained.params, training.test)
            return (trained.params, trained.velocity), (trained.losses, test)

        hyper = {"learning_rates": start.learning_rates, "momenta": start.momenta}
        (params, _), (losses, test) = jax.lax.scan(
            advance,
            (start.params, start.velocity),
            (jnp.arange(CURVE_POINTS, dtype=jnp.int32), jax.tree.map(segments, hyper)),
        )
        before = classifier.cross_entropy(start.params, training.test)
        train = classifier.cross_entropy(params, training.train)
        return losses.ravel(), jnp.append(before, test), train

    @jax.jit
    def seeds(theta):
        keys = jax.random.split(jax.random.key(seed), num_seeds)
        return jax.lax.map(lambda key: one(theta, key), keys)

    def evaluate(theta):
        curves, tests, train = (np.asarray(x) for x in seeds(theta))
        test, worst = np.mean(tests, 0), float(np.max(train))
        return EvaluatedTraining(
            np.mean(curves, 0), test, float(np.mean(train)), float(test[-1]), worst
        )

    return evaluate


def best_of(swept: dict[float, EvaluatedTraining]) -> tuple[float, EvaluatedTraining]:
    """That of the lowest training loss, among those that did not diverge."""
    finite = {value: out for value, out in swept.items() if np.isfinite(out.train + out.test)}
    return min(finite.items(), key=lambda pair: pair[1].train)


def draw_meta_curve(axes: Any, losses: list[float], chosen: int | None = None) -> None:
    """The meta-objective along ``meta_descend``, with a line after the chosen meta-step."""
    axes.plot(losses, "o-", ms=3, color=plots.VERMILION)
    if chosen is not None:
        axes.axvline(chosen, color="0.5", lw=1, ls="--", label="kept: best worst seed")
        axes.legend()
    axes.set(
        yscale="log",
        xlabel="meta-step",
        ylabel="final training loss (nats)",
        title="Meta-descent, a new seed each step",
    )


def _batch_loss(training: Training, key: jax.Array):
    def loss(params, theta, step):
        del theta
        examples = classifier.batch(
            training.train, jax.random.fold_in(key, step), training.batch_size
        )
        return classifier.cross_entropy(params, examples)

    return loss
