"""Gradient descent, recorded: what the figures of the studies are drawn from."""

import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from launch.studies import classifier
from meta_train import reversible
from meta_train.estimators import GradientEstimator, synchronized
from meta_train.progress import progress
from meta_train.unroll import UnrolledSystem, unroll

HELD_OUT_SEED = 1_000_003  # Far from the seeds of the descents.


def descend(
    name: str,
    estimator: GradientEstimator,
    theta: Any,
    optimizer: optax.GradientTransformation,
    *,
    num_steps: int,
    num_records: int,
    num_seeds: int,
    together: bool = False,
) -> tuple[np.ndarray, Any]:
    """Descends from ``theta`` once for each seed and records theta at evenly spaced steps.

    Args:
      name: what the progress bar says.
      theta: where to start, or ``key -> theta`` to start each seed elsewhere.
      num_steps: outer steps, a multiple of ``num_records``.
      together: all particles restart in the first truncation, instead of staggered phases.

    Returns:
      The steps, int ``[num_records + 1]`` from 0, and theta at them, leaves
      ``[num_seeds, num_records + 1, ...]``.
    """

    draw = theta if callable(theta) else lambda key: theta

    def begin(seed):
        key_init, key_steps = jax.random.split(jax.random.key(seed))
        # No weak types: one compile.
        theta = jax.tree.map(
            lambda x: jax.lax.convert_element_type(x, jnp.asarray(x).dtype),
            draw(jax.random.fold_in(key_init, 1)),
        )
        particles = estimator.init(theta, key_init)
        if together and hasattr(particles, "position"):
            particles = synchronized(particles)
        return theta, optimizer.init(theta), particles, key_steps

    def advance(carry, step):
        theta, optimizer_state, particles, key = carry
        grad, particles, _ = estimator.estimate(theta, particles, jax.random.fold_in(key, step))
        update, optimizer_state = optimizer.update(grad, optimizer_state, theta)
        return (optax.apply_updates(theta, update), optimizer_state, particles, key), None

    per_record = num_steps // num_records

    @jax.jit
    @jax.vmap
    def record(carry, start):
        carry, _ = jax.lax.scan(advance, carry, start + jnp.arange(per_record))
        return carry

    carry = jax.jit(jax.vmap(begin))(jnp.arange(num_seeds))
    thetas = [carry[0]]
    for index in progress(range(num_records), desc=name, leave=False):
        carry = record(carry, jnp.full(num_seeds, index * per_record))
        thetas.append(jax.block_until_ready(carry[0]))
    stacked = jax.tree.map(lambda *x: np.stack(x, axis=1), *thetas)
    return per_record * np.arange(num_records + 1), stacked


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


def meta_descend(
    training: Training, theta: Any, rate: float, num_steps: int
) -> tuple[list[Any], list[float], bool]:
    """Adam on the final training loss by exact hypergradients, another seed at every step.

    Returns:
      Theta after each of ``num_steps`` meta-steps, the final training losses, and whether
      every run was recovered to the bit.
    """
    optimizer = optax.adam(rate)

    def objective(params, theta):
        del theta
        return classifier.cross_entropy(params, training.train)

    @jax.jit
    def step(theta, opt_state, key):
        start, pull = jax.vjp(lambda theta: training.setup(theta, key), theta)
        value, grads, trained = reversible.hypergradients(
            _batch_loss(training, key),
            objective,
            start,
            num_steps=training.num_steps,
            momentum_floor=training.momentum_floor,
        )
        updates, opt_state = optimizer.update(pull(grads)[0], opt_state)
        return optax.apply_updates(theta, updates), opt_state, value, trained.report.ok

    opt_state = optimizer.init(theta)
    thetas, values, exact = [], [], True
    for i in progress(range(num_steps), desc="meta-steps"):
        key = jax.random.fold_in(jax.random.key(1), i)
        theta, opt_state, value, ok = step(theta, opt_state, key)
        thetas.append(theta)
        values.append(float(value))
        exact &= bool(ok)
    return thetas, values, exact


CURVE_POINTS = 20  # of a test curve, besides the start


class Outcome(NamedTuple):
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


def evaluation(training: Training, num_seeds: int, seed: int = 99) -> Callable[[Any], Outcome]:
    """``theta -> Outcome`` over seeds that ``meta_descend`` never sees; compiled once.

    Trains in segments, to test in between, where the exact state is rounded to floats.
    """
    segment, rest = divmod(training.num_steps, CURVE_POINTS)
    assert rest == 0, f"training steps must be a multiple of {CURVE_POINTS}"

    def one(theta, key):
        start, loss = training.setup(theta, key), _batch_loss(training, key)

        def at(schedule, index):
            """Constants as they are, and the part of ``[T, ...]`` in this segment."""
            return jax.tree.map(
                lambda s: (
                    jax.lax.dynamic_slice_in_dim(s, index * segment, segment)
                    if s.ndim and s.shape[0] == training.num_steps
                    else s
                ),
                schedule,
            )

        def advance(carry, index):
            params, velocity = carry
            part = start._replace(
                params=params,
                velocity=velocity,
                learning_rates=at(start.learning_rates, index),
                momenta=at(start.momenta, index),
            )
            trained = reversible.train(
                lambda params, theta, step: loss(params, theta, index * segment + step),
                part,
                num_steps=segment,
                momentum_floor=training.momentum_floor,
            )
            test = classifier.cross_entropy(trained.params, training.test)
            return (trained.params, trained.velocity), (trained.losses, test)

        (params, _), (losses, test) = jax.lax.scan(
            advance, (start.params, start.velocity), jnp.arange(CURVE_POINTS, dtype=jnp.int32)
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
        test_curve = np.mean(tests, 0)
        return Outcome(
            np.mean(curves, 0),
            test_curve,
            float(np.mean(train)),
            float(test_curve[-1]),
            float(np.max(train)),
        )

    return evaluate


def draw_meta_curve(axes, values: list[float], chosen: int | None = None) -> None:
    """The meta-objective along ``meta_descend``, with a line after the chosen meta-step."""
    axes.plot(values, "o-", ms=3, color="C3")
    if chosen is not None:
        axes.axvline(chosen, color="0.5", lw=1, ls="--", label="kept: best worst seed")
        axes.legend(fontsize=8, frameon=False)
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


def held_out_losses(
    system: UnrolledSystem,
    thetas: Mapping[str, Any],
    num_steps: int,
    num_runs: int,
    *,
    seed: int = HELD_OUT_SEED,
    chunk: int = 8,
) -> dict[str, np.ndarray]:
    """The mean per-step loss of each theta, over the same runs, which no descent has seen.

    Args:
      thetas: name -> thetas ``[..., P]`` with any leading axes.
      num_runs: inner runs averaged, with fixed keys drawn from ``seed``.
      chunk: thetas computed at a time.

    Returns:
      Name -> float array of the leading axes.
    """
    keys = jax.random.split(jax.random.key(seed), num_runs)

    def one(theta):
        def run(key):
            key_init, key_steps = jax.random.split(key)
            losses = unroll(system, theta, system.init(theta, key_init), key_steps, num_steps)[1]
            return jnp.mean(losses)

        return jnp.mean(jax.vmap(run)(keys))

    rows = [np.asarray(x, np.float32).reshape(-1, np.shape(x)[-1]) for x in thetas.values()]
    losses = jax.jit(lambda t: jax.lax.map(one, t, batch_size=chunk))(np.concatenate(rows))
    pieces = np.split(np.asarray(losses), np.cumsum([len(row) for row in rows])[:-1])
    return {
        name: piece.reshape(np.shape(x)[:-1])
        for (name, x), piece in zip(thetas.items(), pieces, strict=True)
    }


def in_parallel(jobs: Mapping[str, Callable[[], Any]]) -> dict[str, Any]:
    """The result of each job, one thread a core: small programs leave XLA's own threads idle."""
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        futures = {name: pool.submit(job) for name, job in jobs.items()}
        return {name: future.result() for name, future in futures.items()}


def band(axis, x, runs, **line) -> None:
    """Draws the median of ``runs [seeds, x]`` as a line and their range as a band."""
    axis.fill_between(
        x, runs.min(axis=0), runs.max(axis=0), color=line.get("color"), alpha=0.2, linewidth=0
    )
    axis.plot(x, np.median(runs, axis=0), **line)


def log_ticks(axis, places=(0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0)) -> None:
    """Labels a logarithmic y axis at ``places`` alone, in plain numbers."""
    low, high = axis.get_ylim()
    axis.minorticks_off()
    axis.set_yticks(places, [f"{place:g}" for place in places])
    axis.set_ylim(low, high)
