"""A small network that controls an Adam-like direction, tensor by tensor."""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from learned_opt.arguments import check_between, check_count, check_flag, check_given
from learned_opt.base import LearnedOptimizer, learned_optimizer
from learned_opt.groups import group_by_shape, stack, unstack
from learned_opt.initializers import fan_in_normal
from learned_opt.limits import limited
from learned_opt.newton_schulz import orthogonalize
from learned_opt.norms import norm, over_norm

MOMENTUM_DECAYS = (0.9, 0.98)
SQUARE_DECAY = 0.99
LOSS_DECAYS = (0.9, 0.98)
COSINE_DECAY, SCALE_DECAY = 0.95, 0.98
NUM_INPUTS = 16
WARM_UP = 0.03  # Of the run.
LAST_RATE = 0.01  # Of the first one, at the end of the run and beyond it.
_EPS = 1e-16  # Under roots of squares of gradients: a rule without a scale of its own.
_TINY = 1e-12
_INPUT_LIMIT = 6.0


class ControllerNetwork(nn.Module):
    """``[16, tensors]`` inputs to ``[7, tensors]`` controls; zeros at the start."""

    hidden_size: int
    num_outputs: int

    @nn.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        hidden = nn.Dense(self.hidden_size, kernel_init=fan_in_normal, name="hidden")(inputs.T)
        last = nn.Dense(self.num_outputs, kernel_init=nn.initializers.zeros, name="last")
        return last(jnp.tanh(hidden)).T


class Tensors(NamedTuple):
    """What is remembered of the tensors of one shape, an axis of tensors first.

    Attributes:
      momenta: two means of the gradient, ``[tensors, *shape]`` each.
      square: mean of its square.
      log_rate: what the network has added up, ``[tensors]``.
      cosine: mean of the cosine between gradient and momentum.
      log_scale: mean of the logarithm of the gradient's root mean square.
    """

    momenta: tuple[jax.Array, ...]
    square: jax.Array
    log_rate: jax.Array
    cosine: jax.Array
    log_scale: jax.Array


class ControllerState(NamedTuple):
    """State of the optimizer.

    Attributes:
      steps: int32 scalar, updates done.
      log_losses: two means of the loss's logarithm, and the first one, ``[3]``.
      tensors: for every shape among the parameters.
    """

    steps: jax.Array
    log_losses: jax.Array
    tensors: tuple[Tensors, ...]


def adam_controller(
    hidden_size: int = 16, learning_rate: float = 1e-2, matrices: bool = True
) -> LearnedOptimizer:
    """An Adam-like direction with a learned rate for each tensor: 391 meta-parameters.

    For every tensor sixteen inputs (time, the trend of the loss, and ratios of root mean squares
    of gradient, momenta and parameter; none but the parameter's changes with the scale of the
    loss) pass through one hidden layer of ``tanh`` to seven controls ``o``:

    - the direction ``d`` mixes two bias-corrected momenta (decays 0.9, 0.98) and the gradient,
      each over the root of the second moment (decay 0.99), by ``o_1`` and ``o_2``;
    - for tensors with two axes above 1, ``d`` is mixed by ``o_6`` with the momenta made
      orthogonal, scaled to the root mean square of ``d``;
    - the rate is ``learning_rate`` times a warm-up over 3% of the run, a cosine to 1%, and
      ``exp(o_0 + s + trust)``: ``s`` adds up ``(10 / num_steps) tanh(o_4)`` and stays within 4 of
      0, and ``trust`` is a learned power of the parameter's root mean square;
    - the step is ``-rate (d + w p)`` with a decay ``w`` of ``0.1 exp(o_3 - 4)``.

    Untrained (all controls 0) it is NAdamW with three quarters of Muon under that schedule. At
    ``num_steps`` the rate has fallen to 1% and stays there: later steps are small but none is
    refused. Gradients and parameters count as at most 1.2e18 (float32). A loss at or below 0
    counts as 1e-12 in the two inputs that see it, one that is not finite as 1.2e18.

    A parameter whose gradient is exactly zero shrinks by the decay, and moves in a matrix with
    others that have one; ``mask_zero_gradients`` holds it still.

    Args:
      hidden_size: of the network.
      learning_rate: before the network and the schedule.
      matrices: whether matrices have the orthogonal direction; without it there are six controls,
        374 meta-parameters.

    Raises:
      ValueError: on a size or number out of range; from ``update``, without the parameters or
        ``value``, the loss.

    Source: this project. The direction for matrices is Muon's (Jordan et al. 2024), with Adam's
    root mean square.
    """
    check_count(hidden_size=hidden_size)
    check_flag(matrices=matrices)
    check_between(0, float("inf"), learning_rate=learning_rate)
    module = ControllerNetwork(hidden_size, 7 if matrices else 6)

    def init(key):
        return module.init(key, jnp.zeros((NUM_INPUTS, 1)))

    def bind(theta, num_steps):
        def init_fn(params):
            def start(x):
                zeros = jnp.zeros(len(x), x.dtype)
                return Tensors((0 * x, 0 * x), 0 * x, zeros, zeros, zeros)

            stacks = stack(jax.tree.map(jnp.zeros_like, params), group_by_shape(params))
            dtype = jnp.result_type(jnp.float32, *jax.tree.leaves(params))
            log_losses = jnp.zeros(3, dtype)
            return ControllerState(jnp.zeros([], jnp.int32), log_losses, tuple(map(start, stacks)))

        def update_fn(updates, state, params=None, value=None, **extra):
            del extra
            check_given("Adam controller", params, value)
            groups = group_by_shape(params)
            log_losses = _log_losses(state, value)
            time = _Time(state.steps, num_steps, log_losses.dtype)
            grads = [limited(x, 2) for x in stack(updates, groups)]
            weights = [limited(x, 2) for x in stack(params, groups)]
            seen = [_see(old, grad, time) for old, grad in zip(state.tensors, grads, strict=True)]
            shared = _shared_inputs(time, log_losses)
            inputs = [_inputs(shared, *each, time) for each in zip(seen, weights, strict=True)]
            ends = [x.shape[1] for x in inputs]
            controls = module.apply(theta, jnp.concatenate(inputs, axis=1))
            pieces = jnp.split(controls, np.cumsum(ends)[:-1], axis=1)
            found = [
                _step(learning_rate, matrices, piece, one, param, grad, time)
                for piece, one, param, grad in zip(pieces, seen, weights, grads, strict=True)
            ]
            steps = unstack([step for step, _ in found], groups, updates)
            tensors = tuple(tensors for _, tensors in found)
            return steps, ControllerState(state.steps + 1, log_losses, tensors)

        return optax.GradientTransformationExtraArgs(init_fn, update_fn)

    return learned_optimizer(init, bind, moves_without_gradient=True)


class _Time:
    """Where a run is."""

    def __init__(self, steps, num_steps, dtype):
        self.steps = steps.astype(dtype)
        self.num_steps = jnp.asarray(num_steps, dtype)
        self.done = jnp.minimum(self.steps / self.num_steps, 1)
        cosine = (1 + jnp.cos(jnp.pi * self.done)) / 2
        warm_up = jnp.minimum(1, (self.steps + 1) / (WARM_UP * self.num_steps + 1))
        self.schedule = warm_up * (LAST_RATE + (1 - LAST_RATE) * cosine)

    def weight(self, decay: float) -> jax.Array:
        """Of all gradients in a mean with that decay, now that one more has come."""
        return 1 - decay ** (self.steps + 1)


class _Seen(NamedTuple):
    """Of the tensors of one shape: what is remembered now, and directions, ``[tensors, *shape]``.

    Attributes:
      tensors: after this gradient.
      adam: the two momenta over the root of the second moment.
      own: the gradient over it.
      log_scale: of the gradient, ``[tensors]``.
      cosines: of the gradient with the momentum before, and of the two momenta, ``[tensors]``.
    """

    tensors: Tensors
    adam: tuple[jax.Array, ...]
    own: jax.Array
    log_scale: jax.Array
    cosines: tuple[jax.Array, jax.Array]


def _see(old: Tensors, grad: jax.Array, time: _Time) -> _Seen:
    momenta = tuple(
        (d * m + (1 - d) * grad).astype(m.dtype)
        for d, m in zip(MOMENTUM_DECAYS, old.momenta, strict=True)
    )
    square = SQUARE_DECAY * old.square + (1 - SQUARE_DECAY) * grad * grad
    root = jax.lax.rsqrt(square / time.weight(SQUARE_DECAY) + _EPS)
    adam = tuple(m / time.weight(d) * root for d, m in zip(MOMENTUM_DECAYS, momenta, strict=True))
    log_scale = _log_rms(grad)
    before, after = _cosine(grad, old.momenta[0]), _cosine(*momenta)
    first = time.steps == 0
    tensors = Tensors(
        momenta,
        square,
        old.log_rate,
        COSINE_DECAY * old.cosine + (1 - COSINE_DECAY) * before,
        jnp.where(first, log_scale, SCALE_DECAY * old.log_scale + (1 - SCALE_DECAY) * log_scale),
    )
    return _Seen(tensors, adam, grad * root, log_scale, (before, after))


def _shared_inputs(time: _Time, log_losses: jax.Array) -> list[jax.Array]:
    fast, slow, first = log_losses
    return [
        2 * time.done - 1,
        4 * (time.done - 0.5) ** 2,
        (jnp.log(time.num_steps) - 5.5) / 1.5,
        2 * jnp.tanh((time.steps + 1) / 20) - 1,
        jnp.clip(5 * (fast - slow), -3, 3),
        (slow - first) / 2 + 0.5,
    ]


def _inputs(shared: list[jax.Array], seen: _Seen, param: jax.Array, time: _Time) -> jax.Array:
    """``[16, tensors]``."""
    count, shape = len(param), param.shape[1:]
    tensors = seen.tensors
    own = [
        _log_rms(param) / 2 + 1,
        _log_rms(seen.adam[0]),
        _log_rms(seen.adam[1]) + 0.5,
        2 * seen.cosines[0],
        2 * seen.cosines[1] - 1,
        4 * tensors.cosine / time.weight(COSINE_DECAY),
        jnp.full(count, 1.0 if _is_matrix(shape) else -1.0, param.dtype),
        jnp.full(count, jnp.log10(float(param[0].size)) - 2, param.dtype),
        tensors.log_rate,
        seen.log_scale - tensors.log_scale,
    ]
    spread = [jnp.broadcast_to(x, (count,)).astype(param.dtype) for x in shared]
    return jnp.clip(jnp.stack([*spread, *own]), -_INPUT_LIMIT, _INPUT_LIMIT)


def _step(learning_rate, matrices, controls, seen, param, grad, time):
    """The steps of the tensors of one shape, and what is remembered of them."""
    tensors, shape = seen.tensors, param.shape[1:]

    def spread(x):
        return x.reshape(-1, *[1] * len(shape))

    slow = spread(jax.nn.sigmoid(controls[1] - 2))
    own = spread(0.3 * jax.nn.sigmoid(controls[2] - 1))

    def mixed(first, second, gradient):
        return (1 - own) * ((1 - slow) * first + slow * second) + own * gradient

    direction = mixed(*seen.adam, seen.own)
    if matrices and _is_matrix(shape):
        corrected = [
            m / time.weight(d) for d, m in zip(MOMENTUM_DECAYS, tensors.momenta, strict=True)
        ]
        raw = mixed(*corrected, grad)
        flat = orthogonalize(raw.reshape(len(raw), -1, shape[-1])).reshape(raw.shape)
        flat = flat * spread(jnp.exp(_log_rms(direction) - _log_rms(flat)))
        direction = direction + spread(jax.nn.sigmoid(controls[6] + 1)) * (flat - direction)

    drift = 10 / time.num_steps * jnp.tanh(controls[4])
    log_rate = jnp.clip(tensors.log_rate + drift, -4, 4)
    log_scale = jnp.clip(_log_rms(param), -7, 7)
    trust = 0.5 * jnp.tanh(controls[5]) * (log_scale + 2)
    rate = learning_rate * time.schedule * jnp.exp(jnp.clip(controls[0] + log_rate + trust, -7, 5))
    decay = 0.1 * jnp.exp(jnp.clip(controls[3] - 4, -8, 3))
    step = -spread(rate) * (direction + spread(decay) * param)
    return step.astype(param.dtype), tensors._replace(log_rate=log_rate.astype(param.dtype))


def _log_losses(state: ControllerState, value) -> jax.Array:
    fast, slow, first = state.log_losses
    loss = jnp.log(jnp.maximum(jnp.asarray(value, state.log_losses.dtype), _TINY))
    after = jnp.stack(
        [d * x + (1 - d) * loss for d, x in zip(LOSS_DECAYS, (fast, slow), strict=True)] + [first]
    )
    return jnp.where(state.steps == 0, loss, after)


def _log_rms(x: jax.Array) -> jax.Array:
    """``[tensors]``; of zeros the logarithm of 1e-12."""
    return jnp.log(_rms(x) + _TINY)


def _rms(x: jax.Array) -> jax.Array:
    return norm(x, tuple(range(1, x.ndim))) / x[0].size ** 0.5


def _cosine(x: jax.Array, y: jax.Array) -> jax.Array:
    axes = tuple(range(1, x.ndim))
    x, y = (over_norm(each, axes, _TINY) for each in (x, y))
    return jnp.sum(x * y, axes)


def _is_matrix(shape: tuple[int, ...]) -> bool:
    return sum(size > 1 for size in shape) > 1
