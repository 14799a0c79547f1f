"""The per-parameter MLP optimizer in a form whose training runs can be walked back exactly.

An optimizer is reversible if its step depends on nothing but its accumulators *after*
their update, and on time: from the state after the step one finds the step, so the weights
before it, so the gradient, so the accumulators before it. The raw gradient and the
parameter are no inputs; an accumulator with decay 1/2 stands in for the gradient.
"""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from learned_opt.arguments import check_between, check_sizes
from learned_opt.base import LearnedOptimizer, ReversibleUpdate, learned_optimizer
from learned_opt.features import TIMESCALES, time_embedding, unflatten

# Multiples of 1/1024, so that the exact form multiplies by just these.
MOMENTUM_DECAYS = (512 / 1024, 922 / 1024, 1014 / 1024, 1023 / 1024)
SECOND_MOMENT_DECAY = 1014 / 1024
NUM_FEATURES = 2 * len(MOMENTUM_DECAYS)


class ReversibleState(NamedTuple):
    """State of a bound reversible optimizer: updates done, and accumulators ``[K, P]``."""

    steps: jax.Array
    accumulators: jax.Array


class PostUpdateMLP(nn.Module):
    """``[8, P]`` features and ``[11]`` time features to ``[2, P]`` outputs.

    Time is the same for every parameter, so it enters as a bias of the first layer.
    """

    hidden_sizes: Sequence[int]

    @nn.compact
    def __call__(self, features: jax.Array, time_features: jax.Array) -> jax.Array:
        sizes = (NUM_FEATURES + len(TIMESCALES), *self.hidden_sizes, 2)
        hidden = features
        for i, (fan_in, fan_out) in enumerate(pairwise(sizes)):
            stddev = fan_in**-0.5
            kernel = self.param(
                f"kernel_{i}", nn.initializers.truncated_normal(stddev), (fan_in, fan_out)
            )
            bias = self.param(f"bias_{i}", nn.initializers.zeros, (fan_out,))
            if i == 0:
                bias = bias + time_features @ kernel[NUM_FEATURES:]
                kernel = kernel[:NUM_FEATURES]
            else:
                hidden = jax.nn.relu(hidden)
            hidden = kernel.T @ hidden + bias[:, None]
        return hidden


def reversible_mlp_optimizer(
    hidden_sizes: Sequence[int] = (32, 32), step_mult: float = 1e-3, exp_mult: float = 1e-3
) -> LearnedOptimizer:
    """The per-parameter MLP optimizer that reads only post-update accumulators and time.

    For every parameter, four momenta (decays 1/2, 0.9, 0.99, 0.999 in multiples of 1/1024),
    once divided by their root mean square over the tensor and once by the root of a second
    moment (decay 0.99, clamped at 0), and eleven ``tanh`` time features pass through an MLP
    with ReLU to a direction ``d`` and a magnitude ``m``; the update is
    ``-step_mult * d * exp(exp_mult * m)``. A run destroys 1.18 bits per parameter and step.

    A parameter whose gradient is exactly zero moves all the same: the network has no reason to
    answer zero features with a zero direction. ``mask_zero_gradients`` holds it still.

    Args:
      hidden_sizes: width of each hidden layer.
      step_mult: scale of the update.
      exp_mult: scale of the log-magnitude.

    Raises:
      ValueError: if a size is no whole number above 0, or a multiplier not positive and finite.

    Source: Metz et al. 2019 (arXiv 1810.10180). Differs: no gradient and parameter among
    the features, and the second moment, as Maclaurin et al. 2015 section 3 needs it.
    """
    check_sizes(hidden_sizes=hidden_sizes)
    check_between(0, math.inf, step_mult=step_mult, exp_mult=exp_mult)
    module = PostUpdateMLP(tuple(hidden_sizes))
    decays = (*MOMENTUM_DECAYS, SECOND_MOMENT_DECAY)

    def init(key):
        return module.init(key, jnp.zeros((NUM_FEATURES, 1)), jnp.zeros(len(TIMESCALES)))

    def absorb(gradient):
        gains = 1 - np.asarray(decays)[:, None]
        momenta = gains[:-1].astype(gradient.dtype) * gradient
        return jnp.concatenate([momenta, gains[-1:].astype(gradient.dtype) * gradient**2])

    def move(theta, accumulators, count, sizes):
        features = _features(accumulators, sizes)
        time_features = time_embedding(count, features.dtype)
        direction, magnitude = module.apply(theta, features, time_features)
        return -step_mult * direction * jnp.exp(exp_mult * magnitude)

    def bind(theta, num_steps):
        del num_steps

        def init_fn(params):
            leaves = jax.tree.leaves(params)
            size = sum(leaf.size for leaf in leaves)
            dtype = jnp.result_type(jnp.float32, *leaves)  # Float64 if one of them is.
            return ReversibleState(jnp.zeros([], jnp.int32), jnp.zeros((len(decays), size), dtype))

        def update_fn(updates, state, params=None, **extra):
            del params, extra
            leaves = jax.tree.leaves(updates)
            dtype = state.accumulators.dtype
            gradient = jnp.concatenate([jnp.ravel(leaf).astype(dtype) for leaf in leaves])
            kept = np.asarray(decays)[:, None].astype(dtype) * state.accumulators
            accumulators = kept + absorb(gradient)
            sizes = tuple(leaf.size for leaf in leaves)
            moved = move(theta, accumulators, state.steps, sizes)
            return unflatten(moved, updates), ReversibleState(state.steps + 1, accumulators)

        return optax.GradientTransformationExtraArgs(init_fn, update_fn)

    return learned_optimizer(
        init, bind, reversible=ReversibleUpdate(decays, absorb, move), moves_without_gradient=True
    )


def _features(accumulators: jax.Array, sizes: tuple[int, ...]) -> jax.Array:
    """``[8, P]``: momenta over their root mean square in the tensor, and over their own scale."""
    momenta, second_moment = accumulators[:-1], accumulators[-1]
    by_tensor = jnp.concatenate(
        [
            piece * jax.lax.rsqrt(1e-5 + jnp.mean(piece * piece, axis=1, keepdims=True))
            for piece in jnp.split(momenta, np.cumsum(sizes)[:-1], axis=1)
            if piece.size  # The mean of none is NaN.
        ],
        axis=1,
    )
    # Rounding can take the second moment below 0 by a few units of the grid.
    by_parameter = momenta * jax.lax.rsqrt(1e-5 + jnp.maximum(second_moment, 0.0))
    return jnp.concatenate([by_tensor, by_parameter])
