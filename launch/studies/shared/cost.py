"""What one outer step of an estimator costs, read off the compiled program."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from meta_train.estimators import GradientEstimator
from meta_train.unroll import UnrolledSystem


class Cost(NamedTuple):
    """Of one outer step: floating-point operations, and bytes held (states and temporaries)."""

    flops: float
    bytes: float


def measure(estimator: GradientEstimator, theta: Any) -> Cost:
    """The cost of ``estimator.estimate``; compiles it, runs nothing."""
    return Cost(flops(estimator, theta), memory(estimator, theta))


def memory(estimator: GradientEstimator, theta: Any) -> float:
    """Bytes of the arguments and temporaries of the compiled program."""
    analysis: Any = _lower(estimator, theta).compile().memory_analysis()
    return float(analysis.argument_size_in_bytes + analysis.temp_size_in_bytes)


def flops(estimator: GradientEstimator, theta: Any) -> float:
    """Operations of the program with its loops unrolled: XLA counts a loop's body once."""
    with unrolled_scans():
        analysis: Any = _lower(estimator, theta).cost_analysis()
        return float(analysis["flops"])


def _lower(estimator: GradientEstimator, theta: Any) -> jax.stages.Lowered:
    key = jax.random.key(0)
    state = jax.eval_shape(estimator.init, theta, key)
    # A fresh function each time: the trace cache does not see how scans are unrolled.
    return jax.jit(lambda *args: estimator.estimate(*args)).lower(theta, state, key)


@contextlib.contextmanager
def unrolled_scans() -> Iterator[None]:
    """Within it, ``jax.lax.scan`` traces to straight-line code."""
    scan = jax.lax.scan

    def unrolled(*given, **options):
        return scan(*given, **options | {"unroll": True})  # Flax's layers give one of their own.

    jax.lax.scan = unrolled
    try:
        yield
    finally:
        jax.lax.scan = scan


def dense_system(state_size: int) -> UnrolledSystem:
    """``s <- tanh(A s + mean(theta))`` from a random start: ``2 S^2 + P`` a step."""
    matrix = np.random.default_rng(0).normal(size=(state_size, state_size)) / state_size**0.5
    matrix = matrix.astype(np.float32)

    def init(theta, key, horizon):
        del theta, horizon
        return jnp.cos(jax.random.key_data(key)[-1] * jnp.arange(1.0, state_size + 1))

    def step(theta, state, key):
        del key
        state = jnp.tanh(matrix @ state + jnp.mean(theta))
        return state, jnp.mean(state**2)

    return UnrolledSystem(init, step)


def exponent(sizes: Sequence[int], costs: list[float]) -> float:
    """The slope of ``log cost`` against ``log size``, by least squares."""
    return float(np.polyfit(np.log(sizes), np.log(costs), 1)[0])
