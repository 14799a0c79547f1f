"""What one outer step of an estimator costs, read off the compiled program."""

import contextlib
from collections.abc import Iterator
from functools import partial
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
    """The cost of ``estimator.estimate``; compiles it, runs nothing.

    XLA counts the body of a loop once, so operations are counted in a program whose loops
    are unrolled; memory is that of the program with loops.
    """
    key = jax.random.key(0)
    state = jax.eval_shape(estimator.init, theta, key)

    def compile_estimate(**options):
        # A fresh function each time: the trace cache does not see how scans are unrolled.
        traced = jax.jit(lambda theta, state, key: estimator.estimate(theta, state, key))
        return traced.lower(theta, state, key).compile(options)

    memory = compile_estimate().memory_analysis()
    with unrolled_scans():
        unrolled = compile_estimate(xla_backend_optimization_level=0)
    return Cost(
        flops=float(unrolled.cost_analysis()["flops"]),
        bytes=float(memory.argument_size_in_bytes + memory.temp_size_in_bytes),
    )


@contextlib.contextmanager
def unrolled_scans() -> Iterator[None]:
    """Within it, ``jax.lax.scan`` traces to straight-line code."""
    scan = jax.lax.scan
    jax.lax.scan = partial(scan, unroll=True)
    try:
        yield
    finally:
        jax.lax.scan = scan


def dense_system(state_size: int) -> UnrolledSystem:
    """``s <- tanh(A s + mean(theta))``: a step costs ``2 S^2 + P`` and depends on all of theta."""
    matrix = np.random.default_rng(0).normal(size=(state_size, state_size)) / state_size**0.5
    matrix = matrix.astype(np.float32)

    def init(theta, key):
        del theta, key
        return jnp.zeros(state_size)

    def step(theta, state, key):
        del key
        state = jnp.tanh(matrix @ state + jnp.mean(theta))
        return state, jnp.mean(state**2)

    return UnrolledSystem(init, step)


def exponent(sizes: list[int], costs: list[float]) -> float:
    """The slope of ``log cost`` against ``log size``, by least squares."""
    return float(np.polyfit(np.log(sizes), np.log(costs), 1)[0])
