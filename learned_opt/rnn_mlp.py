"""An LSTM for every tensor and an MLP for every parameter, which tell each other: RNN-MLP."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from learned_opt.arguments import check_between, check_count, check_given, check_sizes
from learned_opt.base import LearnedOptimizer, learned_optimizer
from learned_opt.features import TIMESCALES
from learned_opt.groups import group_by_shape, stack, unstack
from learned_opt.initializers import fan_in_normal
from learned_opt.limits import limited
from learned_opt.norms import norm
from learned_opt.recurrent import LSTM, InitialState, LSTMState
from learned_opt.small_network import Layers

DECAYS = (0.5, 0.9, 0.99, 0.999, 0.9999)
LOSS_DECAY = 0.9
CLIP_DECAY, CLIP_MULTIPLE = 0.99, 10.0

NUM_TENSOR_FEATURES = 18
NUM_PARAMETER_FEATURES = 3 + 4 * len(DECAYS)
NUM_CONSTANT_FEATURES = len(TIMESCALES) + 3  # The same for all parameters of a tensor.

# Numbers passed on: by all LSTMs to each, by a tensor's MLP to its LSTM, by the LSTM to the MLP.
LSTM_TO_LSTM, MLP_TO_LSTM, LSTM_TO_MLP = 18, 16, 17


class RNNMLP(nn.Module):
    """Both networks, and what each is first told.

    Attributes:
      hidden_size: of the LSTM.
      mlp_sizes: hidden layers of the MLP.
    """

    hidden_size: int
    mlp_sizes: Sequence[int]

    def setup(self):
        def first(name, size):
            return self.param(name, nn.initializers.truncated_normal(size**-0.5), (size,))

        self.from_lstm, self.from_mlp = (
            first("from_lstm", LSTM_TO_LSTM),
            first("from_mlp", MLP_TO_LSTM),
        )
        self.start = InitialState(self.hidden_size)
        self.lstm = LSTM(self.hidden_size)
        self.to_lstm = nn.Dense(LSTM_TO_LSTM, kernel_init=fan_in_normal)
        self.to_mlp = nn.Dense(LSTM_TO_MLP, kernel_init=fan_in_normal)
        inputs = NUM_PARAMETER_FEATURES + NUM_CONSTANT_FEATURES + LSTM_TO_MLP
        self.network = Layers((inputs, *self.mlp_sizes, 2 + MLP_TO_LSTM))

    def begin(self, num_tensors: int) -> tuple[LSTMState, jax.Array, jax.Array]:
        """The state of the tensors' LSTMs, what they are told by all, and ``[tensors, 16]``."""
        return self.start(num_tensors), self.from_lstm, jnp.tile(self.from_mlp, (num_tensors, 1))

    def tensors(
        self, features: jax.Array, state: LSTMState
    ) -> tuple[jax.Array, jax.Array, LSTMState]:
        """``[tensors, 18 + 16 + 18]`` to what the MLPs are told, ``[tensors, 17]``, and all LSTMs.

        The latter is a mean over tensors, ``[18]``.
        """
        state = self.lstm(features, state)
        return self.to_mlp(state.hidden), jnp.mean(self.to_lstm(state.hidden), axis=0), state

    def parameters(self, features: jax.Array, constant: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Direction and magnitude ``[2, n, size]`` of n tensors, and what is told their LSTMs.

        The latter is a mean over parameters, ``[n, 16]``; the last layer has no ReLU, so it is
        that layer's output for the mean of what enters it.

        Args:
          features: ``[23, n, size]``.
          constant: ``[n, 31]``, which enter the first layer as a bias of each tensor.
        """
        (kernel, bias), *others = self.network()
        own = kernel[:NUM_PARAMETER_FEATURES]
        x = jnp.tensordot(own.T, features, 1)
        x += (constant @ kernel[NUM_PARAMETER_FEATURES:] + bias).T[..., None]
        for kernel, bias in others[:-1]:
            x = jnp.tensordot(kernel.T, jax.nn.relu(x), 1) + bias[:, None, None]
        x, (kernel, bias) = jax.nn.relu(x), others[-1]
        outputs = jnp.tensordot(kernel[:, :2].T, x, 1) + bias[:2, None, None]
        return outputs, jnp.mean(x, axis=2).T @ kernel[:, 2:] + bias[2:]

    def __call__(self) -> None:
        """Touches every weight, so that ``init`` makes it."""
        state, from_lstm, from_mlp = self.begin(1)
        features = jnp.zeros((1, NUM_TENSOR_FEATURES))
        self.network()
        self.tensors(jnp.concatenate([from_lstm[None], from_mlp, features], axis=1), state)


class RNNMLPState(NamedTuple):
    """State of RNN-MLP. Tensors are in the order of their groups, those of one shape together.

    Attributes:
      steps: int32 scalar, updates done.
      momenta, squares: an array ``[5, n, size]`` for every shape that n tensors have.
      lstm: ``[tensors, hidden_size]`` each.
      from_lstm: ``[18]``, what all LSTMs told.
      from_mlp: ``[tensors, 16]``, what a tensor's MLP told.
      loss_mean, loss_variance: running ones, not corrected for their start at 0.
      gradient_size: the running size that limits gradients, not corrected either.
    """

    steps: jax.Array
    momenta: list[jax.Array]
    squares: list[jax.Array]
    lstm: LSTMState
    from_lstm: jax.Array
    from_mlp: jax.Array
    loss_mean: jax.Array
    loss_variance: jax.Array
    gradient_size: jax.Array


def rnn_mlp_optimizer(
    hidden_size: int = 64,
    mlp_sizes: Sequence[int] = (32, 32),
    step_mult: float = 1e-3,
    exp_mult: float = 1e-3,
) -> LearnedOptimizer:
    """An LSTM a tensor and an MLP a parameter: 54 inputs, 35,799 meta-parameters.

    The LSTM sees means and variances of the tensor's momenta, second moments and parameters, its
    shape, the loss relative to its running mean, what all LSTMs said in the step before, and what
    this tensor's MLP said. It tells the MLP 17 numbers; that sees them beside gradient, parameter,
    five momenta and five second moments, time, and the size of tensor and network, and gives a
    direction ``d``, a magnitude ``m`` and 16 numbers for the LSTM. The update is
    ``-step_mult * d * exp(exp_mult * m)``. Gradients are clipped to ten times the running mean of
    their root mean square. ``num_steps`` is not used.

    A parameter whose gradient is exactly zero moves all the same: the network has no reason to
    answer zero features with a zero direction. ``mask_zero_gradients`` holds it still.

    Args:
      hidden_size: of the LSTM.
      mlp_sizes: width of each hidden layer of the MLP.
      step_mult: scale of the update.
      exp_mult: scale of the log-magnitude.

    Raises:
      ValueError: if a size is no whole number above 0, or a multiplier not positive and finite;
        from ``update``, without parameters or without ``value=loss``.

    Source: Metz et al. 2020 (arXiv 2009.11243); ``rnn_mlp_lopt.py`` in
    google/learned_optimization. Differs: no validation losses are given, so that input is what
    theirs is until the first; finite losses count as at most 1.2e18, gradients as 2.7e8 (float32).
    """
    check_count(hidden_size=hidden_size)
    check_sizes(mlp_sizes=mlp_sizes)
    check_between(0, math.inf, step_mult=step_mult, exp_mult=exp_mult)
    module = RNNMLP(hidden_size, tuple(mlp_sizes))

    def bind(theta, num_steps):
        del num_steps

        def init_fn(params):
            stacks = stack(params, group_by_shape(params))
            dtype = jnp.result_type(jnp.float32, *stacks)
            zeros = [
                jnp.zeros((len(DECAYS), len(x), math.prod(x.shape[1:])), x.dtype) for x in stacks
            ]
            begin = module.apply(theta, sum(map(len, stacks)), method="begin")
            begin = jax.tree.map(lambda x: x.astype(dtype), begin)
            nothing, size = jnp.zeros([], dtype), jnp.asarray(1 - CLIP_DECAY, dtype)
            return RNNMLPState(
                jnp.zeros([], jnp.int32), zeros, zeros, *begin, nothing, nothing, size
            )

        def update_fn(updates, state, params=None, *, value=None, **extra):
            del extra
            check_given("RNN-MLP", params, value)
            groups = group_by_shape(params)
            shapes = [jax.tree.leaves(params)[places[0]].shape for places in groups]
            count = sum(map(len, groups))
            grads, weights = (
                [x.reshape(len(x), -1) for x in stack(tree, groups)] for tree in (updates, params)
            )
            losses, loss_mean, loss_variance = _loss_features(state, value)
            grads, gradient_size = _clipped(grads, state, count)
            momenta = _averages(state.momenta, grads)
            squares = _averages(state.squares, [jnp.square(g) for g in grads])

            leaves = [*zip(grads, weights, momenta, squares, strict=True)]
            told = jnp.broadcast_to(state.from_lstm, (count, LSTM_TO_LSTM))
            features = [
                _tensor_features(*leaf, shape, losses)
                for leaf, shape in zip(leaves, shapes, strict=True)
            ]
            inputs = jnp.concatenate([told, state.from_mlp, jnp.concatenate(features)], axis=1)
            to_mlp, from_lstm, lstm = module.apply(theta, inputs, state.lstm, method="tensors")

            ends = np.cumsum([len(places) for places in groups])[:-1]
            steps, from_mlp = [], []
            for leaf, shape, told in zip(leaves, shapes, jnp.split(to_mlp, ends), strict=True):
                constant = _constant_features(leaf[1], state.steps, count)
                (direction, magnitude), pooled = module.apply(
                    theta,
                    _parameter_features(*leaf),
                    jnp.concatenate([constant, told], axis=1),
                    method="parameters",
                )
                step = -step_mult * direction * jnp.exp(exp_mult * magnitude)
                steps.append(step.reshape(-1, *shape))
                from_mlp.append(pooled)
            after = RNNMLPState(
                state.steps + 1,
                momenta,
                squares,
                lstm,
                from_lstm,
                jnp.concatenate(from_mlp),
                loss_mean,
                loss_variance,
                gradient_size,
            )
            return unstack(steps, groups, updates), after

        return optax.GradientTransformationExtraArgs(init_fn, update_fn)

    return learned_optimizer(module.init, bind, moves_without_gradient=True)


def _averages(old, new):
    """``a <- d a + (1 - d) x`` for each of the five decays, ``x [n, size]``."""

    def average(a, x):
        decays = jnp.asarray(DECAYS, a.dtype)[:, None, None]
        return decays * a + (1 - decays) * x

    return [average(a, x) for a, x in zip(old, new, strict=True)]


def _clipped(grads, state, count):
    """Gradients within ten times their running size, and that size after this step."""
    corrected = state.gradient_size / (1 - CLIP_DECAY ** (state.steps + 1))
    limit = CLIP_MULTIPLE * corrected
    grads = [jnp.clip(limited(g, 4), -limit, limit) for g in grads]
    squares = sum(jnp.sum(jnp.mean(jnp.square(g), axis=1)) for g in grads) / count
    size = jnp.sqrt(1e-8 + squares)
    return grads, CLIP_DECAY * state.gradient_size + (1 - CLIP_DECAY) * size


def _loss_features(state, loss):
    """The training loss and a validation loss of 0, over the running mean and deviation."""
    loss = limited(jnp.asarray(loss, state.loss_mean.dtype), 2)
    mean = LOSS_DECAY * state.loss_mean + (1 - LOSS_DECAY) * loss
    variance = LOSS_DECAY * state.loss_variance + (1 - LOSS_DECAY) * jnp.square(mean - loss)
    correction = 1 / (1 - LOSS_DECAY ** (state.steps + 1) + 1e-8)
    scale = jax.lax.rsqrt(correction * variance + 1e-8)
    relative = [jnp.clip((x - correction * mean) * scale, -5, 5) for x in (loss, 0)]
    return relative, mean, variance


def _tensor_features(grad, weight, momenta, squares, shape, losses) -> jax.Array:
    """``[n, 18]`` of n tensors of one shape."""

    def moments(x, axes):
        average = jnp.mean(x, axes, keepdims=True)
        variance = jnp.mean(jnp.square(x - average), axes)
        average = jnp.squeeze(average, axes)
        return _log_size(average), jnp.sign(average), _log_size(variance)

    def constant(x):
        return jnp.broadcast_to(x, len(grad))

    momentum_size, momentum_sign, momentum_variance = moments(momenta, (0, 2))
    square_size, square_sign, square_variance = moments(squares, (0, 2))
    weight_size, weight_sign, weight_variance = moments(weight, (1,))
    features = [_log_size(norm(grad, (1,))), constant(-1.0 if shape else 1.0)]
    features += [momentum_size, momentum_sign, square_size, square_sign, weight_size, weight_sign]
    features += [_log_size(norm(weight, (1,)))]
    features += [constant(math.log(size) - 1) for size in (*shape, 1, 1, 1, 1)[:4]]
    features += [constant(loss) for loss in losses]
    features += [momentum_variance, square_variance, weight_variance]
    return jnp.stack(features, axis=1)


def _parameter_features(grad, weight, momenta, squares) -> jax.Array:
    """``[23, n, size]`` of n tensors of one shape, each of mean square 1 over its tensor."""
    root = jax.lax.rsqrt(squares + 1e-6)
    log_weight = jnp.log(jnp.abs(weight) + 1e-8)
    own = jnp.stack([grad, weight, log_weight])
    x = jnp.concatenate([own, momenta, squares, momenta * root, root])
    return x * jax.lax.rsqrt(1e-5 + jnp.mean(x * x, axis=2, keepdims=True))


def _constant_features(weight, steps, count) -> jax.Array:
    """``[n, 14]``: time, tensors of the network, norm and parameters of the tensor."""
    time = jnp.sin(steps / (jnp.asarray(TIMESCALES, weight.dtype) * math.pi))
    shared = [*time, math.log(count) - 1]
    own = [jnp.log(norm(weight, (1,)) + 1e-8), math.log(weight.shape[1])]
    return jnp.stack([jnp.broadcast_to(x, len(weight)) for x in (*shared, *own)], axis=1)


def _log_size(x: jax.Array) -> jax.Array:
    return jnp.clip(jnp.log(1e-8 + jnp.abs(x)), -5, 5)
