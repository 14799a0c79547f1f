"""The per-parameter MLP optimizer: one small network, applied to every parameter alike."""

import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from learned_opt import features as feat
from learned_opt.arguments import check_between, check_sizes
from learned_opt.base import LearnedOptimizer, learned_optimizer

NUM_FEATURES = 2 + len(feat.MOMENTUM_DECAYS)  # Gradient, parameter, momenta.
NUM_TIME_FEATURES = len(feat.TIMESCALES)

# Parameters the network sees at a time: one block's hidden layers stay in a core's cache.
_BLOCK = 2560


class PerParameterMLP(nn.Module):
    """``[8, n]`` normalized features and ``[11]`` time features to ``[2, n]`` outputs.

    The eleven time features are the same for every parameter, so their product with the
    first kernel is a bias, computed once instead of once per parameter.
    """

    hidden_sizes: Sequence[int] = (32, 32)

    @nn.compact
    def __call__(self, features: jax.Array, time_features: jax.Array) -> jax.Array:
        sizes = (NUM_FEATURES + NUM_TIME_FEATURES, *self.hidden_sizes, 2)
        layers = []
        for i, (fan_in, fan_out) in enumerate(itertools.pairwise(sizes)):
            stddev = fan_in**-0.5
            kernel = self.param(
                f"kernel_{i}", nn.initializers.truncated_normal(stddev), (fan_in, fan_out)
            )
            layers.append((kernel, self.param(f"bias_{i}", nn.initializers.zeros, (fan_out,))))
        kernel, bias = layers[0]
        layers[0] = kernel[:NUM_FEATURES], bias + time_features @ kernel[NUM_FEATURES:]
        # Transposed on their own: XLA takes a slower routine for products that transpose.
        layers = [(jax.lax.optimization_barrier(kernel.T), bias) for kernel, bias in layers]

        def network(block):
            for kernel, bias in layers[:-1]:
                block = jax.nn.relu(kernel @ block + bias[:, None])
            kernel, bias = layers[-1]
            return kernel @ block + bias[:, None]

        return feat.map_blocks(network, features, _BLOCK)


class MLPOptimizerState(NamedTuple):
    """State of the MLP optimizer.

    Attributes:
      steps: int32 scalar, updates done.
      momenta: per leaf of the parameters ``[6, size]``, a row per decay.
    """

    steps: jax.Array
    momenta: Any


def mlp_optimizer(
    hidden_sizes: Sequence[int] = (32, 32), step_mult: float = 1e-3, exp_mult: float = 1e-3
) -> LearnedOptimizer:
    """The per-parameter MLP optimizer ("LOLv2"): 19 features, 1,762 meta-parameters.

    For every parameter, the gradient, the parameter and six momenta are divided by their
    root mean square over the tensor; with eleven ``tanh`` time features they pass through
    an MLP with ReLU to a direction ``d`` and a magnitude ``m``, and the update is
    ``-step_mult * d * exp(exp_mult * m)``. ``num_steps`` is not used.

    A parameter whose gradient is exactly zero moves all the same: the network has no reason to
    answer zero features with a zero direction. ``mask_zero_gradients`` holds it still.

    Args:
      hidden_sizes: width of each hidden layer.
      step_mult: scale of the update.
      exp_mult: scale of the log-magnitude.

    Raises:
      ValueError: if a size is no whole number above 0, or a multiplier not positive and finite.

    Source: Metz et al. 2019 (arXiv 1810.10180); the recipe of ``mlp_lopt`` in
    google/learned_optimization.
    """
    check_sizes(hidden_sizes=hidden_sizes)
    check_between(0, math.inf, step_mult=step_mult, exp_mult=exp_mult)
    module = PerParameterMLP(tuple(hidden_sizes))

    def init(key):
        return module.init(key, jnp.zeros((NUM_FEATURES, 1)), jnp.zeros(NUM_TIME_FEATURES))

    def bind(theta, num_steps):
        del num_steps

        def init_fn(params):
            return MLPOptimizerState(jnp.zeros([], jnp.int32), feat.init_momenta(params))

        def update_fn(updates, state, params=None, **extra):
            del extra
            if params is None:
                raise ValueError(
                    "The MLP optimizer reads the parameters: call `update(grads, state, params)`."
                )
            momenta = feat.update_momenta(state.momenta, updates)
            features = feat.normalized_features(updates, params, momenta)
            outputs = module.apply(theta, features, feat.time_embedding(state.steps))
            # Split, not indexed: the derivative is a concatenation, not a sum of padded rows.
            direction, magnitude = jnp.split(outputs, 2)
            step = -step_mult * direction * jnp.exp(exp_mult * magnitude)
            steps = feat.unflatten(step.reshape(-1), updates)
            return steps, MLPOptimizerState(state.steps + 1, momenta)

        return optax.GradientTransformationExtraArgs(init_fn, update_fn)

    return learned_optimizer(init, bind, moves_without_gradient=True)
