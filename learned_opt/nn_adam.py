"""Adam whose hyperparameters an LSTM moves, tensor by tensor: NNAdam."""

import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from learned_opt.arguments import check_between, check_count, check_within
from learned_opt.base import LearnedOptimizer, learned_optimizer
from learned_opt.groups import Groups, group_by_shape, stack, unstack
from learned_opt.recurrent import LSTM, InitialState, LSTMState

NUM_FEATURES = 19
_GRADIENT_LIMIT = 1000.0

# Learning rate, 1 - b1, 1 - b2 and epsilon are kept as a tenth of their logs, within these.
_LOWEST = np.array([math.log(1e-8), -10.0, -10.0, math.log(1e-11)], np.float32) / 10
_HIGHEST = np.array([math.log(1e3), 0.0, 0.0, math.log(1e4)], np.float32) / 10


class HyperparameterLSTM(nn.Module):
    """The LSTM, its first state, and the hyperparameters that every tensor starts from.

    Attributes:
      hidden_size: of the LSTM.
      first: learning rate, b1, b2 and epsilon at first.
    """

    hidden_size: int
    first: tuple[float, float, float, float]

    def setup(self):
        rate, b1, b2, eps = self.first
        stored = np.log([rate, 1 - b1, 1 - b2, eps]) / 10
        self.hyperparameters = self.param(
            "hyperparameters", lambda key: jnp.asarray(stored, jnp.float32)
        )
        self.start = InitialState(self.hidden_size)
        self.lstm = LSTM(self.hidden_size)
        self.out = nn.Dense(4, kernel_init=nn.initializers.zeros)

    def begin(self, num_tensors: int) -> tuple[LSTMState, jax.Array]:
        """States of the tensors' LSTMs, and their hyperparameters as stored, ``[tensors, 4]``."""
        return self.start(num_tensors), jnp.tile(self.hyperparameters, (num_tensors, 1))

    def __call__(self, features: jax.Array, state: LSTMState) -> tuple[jax.Array, LSTMState]:
        """``[tensors, 19]`` to what the hyperparameters move by, ``[tensors, 4]``."""
        state = self.lstm(features, state)
        return self.out(state.hidden), state

    def all(self) -> None:
        """Touches every weight, so that ``init`` makes it."""
        state, _ = self.begin(1)
        self(jnp.zeros((1, NUM_FEATURES)), state)


class NNAdamState(NamedTuple):
    """State of NNAdam. Tensors are in the order of their groups, those of one shape together.

    Attributes:
      means, squares: the moments, an array ``[n, *shape]`` for every shape that n tensors have.
      hyperparameters: ``[tensors, 4]``, a tenth of the logs of the learning rate, 1 - b1, 1 - b2
        and epsilon.
      lstm: ``[tensors, hidden_size]`` each.
    """

    means: list[jax.Array]
    squares: list[jax.Array]
    hyperparameters: jax.Array
    lstm: LSTMState


def nn_adam(
    hidden_size: int = 64,
    output_scale: float = 0.01,
    learning_rate: float = 1e-4,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
) -> LearnedOptimizer:
    """Adam with hyperparameters of every tensor that an LSTM moves: 21,896 meta-parameters.

    ``m <- b1 m + (1 - b1) g;  v <- b2 v + (1 - b2) g^2;``
    ``w <- w - rate (1 + eps) m / (eps + sqrt(v + 1e-10))``

    without bias correction: a large epsilon makes it SGD with momentum at the same rate. Then the
    LSTM sees means and variances of the tensor's gradient, parameters and moments, their signs,
    and the four hyperparameters, and moves the tenths of the logs of rate, 1 - b1, 1 - b2 and eps
    by ``output_scale`` times its outputs, within 1e-8 to 1e3, exp(-10) to 1, and 1e-11 to 1e4.
    At first it does not move them. Gradients are clipped to +-1000. ``num_steps`` is not used.

    Args:
      hidden_size: of the LSTM (google/learned_optimization has had 32 and 64).
      output_scale: how fast the hyperparameters may move.
      learning_rate: initial learning rate, from 1e-8 to 1e3.
      b1: initial decay of the first moment, strictly between 0 and 1.
      b2: initial decay of the second moment, strictly between 0 and 1.
      eps: initial epsilon, from 1e-11 to 1e4.

    Raises:
      ValueError: on a value out of range; from ``update``, without parameters.

    Source: Metz et al. 2020 (arXiv 2009.11243); ``nn_adam.py`` in google/learned_optimization.
    """
    check_count(hidden_size=hidden_size)
    check_between(0, math.inf, output_scale=output_scale)
    check_within(1e-8, 1e3, learning_rate=learning_rate)
    check_between(0, 1, b1=b1, b2=b2)
    check_within(1e-11, 1e4, eps=eps)
    module = HyperparameterLSTM(hidden_size, (learning_rate, b1, b2, eps))

    def init(key):
        return module.init(key, method="all")

    def bind(theta, num_steps):
        del num_steps

        def init_fn(params):
            stacks = stack(params, group_by_shape(params))
            zeros = [jnp.zeros_like(x) for x in stacks]
            lstm, hyperparameters = module.apply(theta, sum(map(len, stacks)), method="begin")
            dtype = jnp.result_type(jnp.float32, *stacks)
            lstm, hyperparameters = jax.tree.map(lambda x: x.astype(dtype), (lstm, hyperparameters))
            return NNAdamState(zeros, zeros, hyperparameters, lstm)

        def update_fn(updates, state, params=None, **extra):
            del extra
            if params is None:
                raise ValueError(
                    "The NNAdam optimizer reads the parameters: call "
                    "`update(grads, state, params)`."
                )
            groups = group_by_shape(params)
            limit = _GRADIENT_LIMIT
            grads = [jnp.clip(g, -limit, limit) for g in stack(updates, groups)]
            weights = stack(params, groups)
            steps, means, squares, features = [], [], [], []
            parts = _split(state.hyperparameters, groups)
            leaves = zip(grads, weights, state.means, state.squares, parts, strict=True)
            for grad, weight, mean, square, stored in leaves:
                rate, b1, b2, eps = _for_each(_used(stored), grad)
                mean = b1 * mean + (1 - b1) * grad
                square = b2 * square + (1 - b2) * jnp.square(grad)
                steps.append(-rate * (1 + eps) * mean / (eps + jnp.sqrt(square + 1e-10)))
                means.append(mean)
                squares.append(square)
                features.append(_features(weight, grad, mean, square, stored))
            moves, lstm = module.apply(theta, jnp.concatenate(features), state.lstm)
            hyperparameters = jnp.clip(
                state.hyperparameters + output_scale * moves, *_limits(state.hyperparameters.dtype)
            )
            after = NNAdamState(means, squares, hyperparameters, lstm)
            return unstack(steps, groups, updates), after

        return optax.GradientTransformationExtraArgs(init_fn, update_fn)

    return learned_optimizer(init, bind)


def _split(rows: jax.Array, groups: Groups) -> list[jax.Array]:
    """``[tensors, ...]`` by group."""
    return jnp.split(rows, np.cumsum([len(places) for places in groups])[:-1])


def _limits(dtype: Any) -> tuple[jax.Array, jax.Array]:
    return jnp.asarray(_LOWEST, dtype), jnp.asarray(_HIGHEST, dtype)


def _used(stored: jax.Array) -> jax.Array:
    """Rate, b1, b2 and epsilon, ``[tensors, 4]``."""
    values = jnp.exp(10 * jnp.clip(stored, *_limits(stored.dtype)))
    return jnp.stack([values[:, 0], 1 - values[:, 1], 1 - values[:, 2], values[:, 3]], axis=1)


def _for_each(columns: jax.Array, like: jax.Array) -> list[jax.Array]:
    """The columns of ``[n, k]``, each ``[n, 1, ..., 1]`` for tensors ``[n, *shape]``."""
    return [jnp.expand_dims(column, range(1, like.ndim)) for column in columns.T]


def _features(weight, grad, mean, square, stored) -> jax.Array:
    """``[n, 19]`` of n tensors of one shape."""
    axes = tuple(range(1, grad.ndim))

    def moments(x):
        average = jnp.mean(x, axes, keepdims=True)
        variance = jnp.mean(jnp.square(x - average), axes)
        average = jnp.squeeze(average, axes)
        return _log_size(average), jnp.sign(average), _log_size(variance)

    grad_size, grad_sign, grad_variance = moments(grad)
    mean_size, mean_sign, mean_variance = moments(mean)
    weight_size, weight_sign, weight_variance = moments(weight)
    square_size, square_sign, square_variance = moments(square)
    rate, b1, b2, eps = (jnp.clip(stored, -5, 5) / 5).T
    is_vector, is_scalar = (jnp.full(len(grad), 1.0 if axes == a else -1.0) for a in ((1,), ()))
    features = [b1, b2, eps, is_vector, is_scalar, rate]
    features += [grad_size, grad_sign, _log_size(jnp.mean(jnp.abs(grad), axes))]
    features += [mean_size, mean_sign, weight_size, weight_sign, square_size, square_sign]
    features += [grad_variance, mean_variance, weight_variance, square_variance]
    return jnp.stack(features, axis=1)


def _log_size(x: jax.Array) -> jax.Array:
    return jnp.clip(jnp.log(1e-8 + jnp.abs(x)), -5, 5) / 2
