"""A small network that controls an Adam-like direction, tensor by tensor."""

import math
from functools import partial
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from learned_opt.annealing import annealed
from learned_opt.arguments import (
    check_between,
    check_count,
    check_flag,
    check_given,
    check_within,
)
from learned_opt.base import LearnedOptimizer, learned_optimizer
from learned_opt.elementwise import map_and_sum
from learned_opt.groups import group_by_shape, stack, unstack
from learned_opt.initializers import fan_in_normal
from learned_opt.limits import limited
from learned_opt.newton_schulz import orthogonalize_in_blocks

MOMENTUM_DECAYS = (0.9, 0.98)
SQUARE_DECAY = 0.99
LOSS_DECAYS = (0.9, 0.98)
COSINE_DECAY, SCALE_DECAY = 0.95, 0.98
NUM_INPUTS = 16
_DECAYS = (0.1 * math.exp(-8), 0.1 * math.exp(3))  # The smallest and the largest.
_EPS = 1e-16  # Under roots of squares of gradients: a rule without a scale of its own.
_TINY = 1e-12
# Numbers are multiplied by it before they are squared: those of `limited` do not overflow in sums
# of 1e12, and `_TINY` does not vanish.
_UNIT = 2.0**-16
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
    hidden_size: int = 16,
    learning_rate: float = 1e-2,
    matrices: bool = True,
    iterations: int = 5,
    block: int = 64,
    decay: float = 0.1 * math.exp(-4),
) -> LearnedOptimizer:
    """An Adam-like direction with a learned rate for each tensor: 391 meta-parameters.

    For every tensor sixteen inputs (time, the trend of the loss, and ratios of root mean squares
    of gradient, momenta and parameter; none but the parameter's changes with the scale of the
    loss) pass through one hidden layer of ``tanh`` to seven controls ``o``:

    - the direction ``d`` mixes two bias-corrected momenta (decays 0.9, 0.98) and the gradient,
      each over the root of the second moment (decay 0.99), by ``o_1`` and ``o_2``;
    - for tensors with two axes above 1, ``d`` is mixed by ``o_6`` with the momenta made
      orthogonal (in blocks, where both sides are long), scaled to the root mean square of ``d``;
    - the rate is ``learning_rate`` times a warm-up over 3% of the run, a cosine to 1%, and
      ``exp(o_0 + s + trust)``: ``s`` adds up ``(10 / num_steps) tanh(o_4)`` and stays within 4 of
      0, and ``trust`` is a learned power of the parameter's root mean square;
    - the step is ``-rate (d + w p)`` with a decay ``w`` of ``decay exp(o_3)``, from 3.4e-5 to 2.

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
      iterations: of Newton and Schulz that make the momenta orthogonal.
      block: rows (of the shorter side) that are made orthogonal together; 0: all. The cost of a
        step grows with it: see ``orthogonalize_in_blocks``.
      decay: before the network; from 3.4e-5 to 2.

    Raises:
      ValueError: on a size or number out of range; from ``update``, without the parameters or
        ``value``, the loss.

    Source: this project. The direction for matrices is Muon's (Jordan et al. 2024), with Adam's
    root mean square.
    """
    check_count(hidden_size=hidden_size, iterations=iterations)
    check_count(0, block=block)
    check_flag(matrices=matrices)
    check_between(0, float("inf"), learning_rate=learning_rate)
    check_within(3.4e-5, 2, decay=decay)
    module = ControllerNetwork(hidden_size, 7 if matrices else 6)
    orthogonal = partial(_orthogonal, iterations=iterations, block=block) if matrices else None

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
            grads, weights = stack(updates, groups), stack(params, groups)
            seen = [
                _see(old, grad, param, time)
                for old, grad, param in zip(state.tensors, grads, weights, strict=True)
            ]
            shared = _shared_inputs(time, log_losses)
            inputs = [_inputs(shared, *each, time) for each in zip(seen, weights, strict=True)]
            ends = [x.shape[1] for x in inputs]
            controls = module.apply(theta, jnp.concatenate(inputs, axis=1))
            pieces = jnp.split(controls, np.cumsum(ends)[:-1], axis=1)
            found = [
                _step(learning_rate, decay, orthogonal, piece, one, param, grad, time)
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
        self.schedule = annealed(self.steps, self.num_steps)

    @property
    def weights(self) -> tuple[jax.Array, ...]:
        """Of the two momenta and the second moment: ``weight`` of each."""
        return tuple(map(self.weight, (*MOMENTUM_DECAYS, SQUARE_DECAY)))

    def weight(self, decay: float) -> jax.Array:
        """Of all gradients in a mean with that decay, now that one more has come."""
        return 1 - decay ** (self.steps + 1)


class _Seen(NamedTuple):
    """Of the tensors of one shape.

    Attributes:
      tensors: what is remembered after this gradient.
      log_rms: of the parameter, the two momenta over the root of the second moment, and the
        gradient, ``[tensors]`` each.
      cosines: of the gradient with the momentum before, and of the two momenta, ``[tensors]``.
    """

    tensors: Tensors
    log_rms: tuple[jax.Array, ...]
    cosines: tuple[jax.Array, jax.Array]


def _unbiased(shared, momenta) -> tuple[jax.Array, ...]:
    """The two momenta, bias-corrected."""
    return tuple(m / w for m, w in zip(momenta, shared["weights"][:2], strict=True))


def _corrected(shared, momenta, square) -> tuple[tuple[jax.Array, ...], jax.Array]:
    """The two momenta, bias-corrected, and one over the root of the second moment."""
    root = jax.lax.rsqrt(square / shared["weights"][2] + _EPS)
    return _unbiased(shared, momenta), root


def _remember(shared, arrays):
    """New momenta and second moment; and products to sum, in the order of ``_see``."""
    grad, param, *before, square = arrays
    grad, param = limited(grad, 2), limited(param, 2)
    momenta = [
        (d * m + (1 - d) * grad).astype(m.dtype)
        for d, m in zip(MOMENTUM_DECAYS, before, strict=True)
    ]
    square = (SQUARE_DECAY * square + (1 - SQUARE_DECAY) * grad * grad).astype(square.dtype)
    corrected, root = _corrected(shared, momenta, square)
    roots = [param, *(m * root for m in corrected), grad, before[0], *momenta]
    products = [(x, x) for x in roots] + [(grad, before[0]), tuple(momenta)]
    return [*momenta, square], [(_UNIT * x) * (_UNIT * y) for x, y in products]


def _see(old: Tensors, grad: jax.Array, param: jax.Array, time: _Time) -> _Seen:
    arrays = (grad, param, *old.momenta, old.square)
    (*momenta, square), sums = map_and_sum(_remember, {"weights": time.weights}, arrays)
    *squares, both, between = (x / grad[0].size for x in sums)
    *log_rms, before, fast, slow = map(_log_root, squares)

    def cosine(product, first, second):
        # One after the other: the derivative by either stays in range.
        return product * (jnp.exp(-first) / _UNIT) * (jnp.exp(-second) / _UNIT)

    cosines = cosine(both, log_rms[3], before), cosine(between, fast, slow)
    tensors = Tensors(
        tuple(momenta),
        square,
        old.log_rate,
        COSINE_DECAY * old.cosine + (1 - COSINE_DECAY) * cosines[0],
        jnp.where(
            time.steps == 0,
            log_rms[3],
            SCALE_DECAY * old.log_scale + (1 - SCALE_DECAY) * log_rms[3],
        ),
    )
    return _Seen(tensors, tuple(log_rms), cosines)


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
        seen.log_rms[0] / 2 + 1,
        seen.log_rms[1],
        seen.log_rms[2] + 0.5,
        2 * seen.cosines[0],
        2 * seen.cosines[1] - 1,
        4 * tensors.cosine / time.weight(COSINE_DECAY),
        jnp.full(count, 1.0 if _is_matrix(shape) else -1.0, param.dtype),
        jnp.full(count, jnp.log10(float(param[0].size)) - 2, param.dtype),
        tensors.log_rate,
        seen.log_rms[3] - tensors.log_scale,
    ]
    spread = [jnp.broadcast_to(x, (count,)).astype(param.dtype) for x in shared]
    return jnp.clip(jnp.stack([*spread, *own]), -_INPUT_LIMIT, _INPUT_LIMIT)


def _mixed(shared, first, second, gradient):
    slow, own = shared["slow"], shared["own"]
    return (1 - own) * ((1 - slow) * first + slow * second) + own * gradient


def _raw(shared, arrays):
    """The direction before it is made orthogonal: not over the root of the second moment."""
    grad, *momenta = arrays
    return [_mixed(shared, *_unbiased(shared, momenta), limited(grad, 2))], []


def _direction(shared, grad, *moments):
    """Of Adam's kind."""
    corrected, root = _corrected(shared, moments[:-1], moments[-1])
    return _mixed(shared, *(m * root for m in corrected), limited(grad, 2) * root)


def _squares(shared, arrays):
    """To sum: those of the direction and of the orthogonal one."""
    *moments, orthogonal = arrays
    return [], [jnp.square(_UNIT * x) for x in (_direction(shared, *moments), orthogonal)]


def _move(shared, arrays):
    """The step; the arrays end with the orthogonal direction where there is one."""
    param, grad, *moments = arrays
    direction = _direction(shared, grad, *moments[:3])
    if len(moments) > 3:
        direction += shared["share"] * (shared["scale"] * moments[3] - direction)
    step = -shared["rate"] * (direction + shared["decay"] * limited(param, 2))
    return [step.astype(param.dtype)], []


def _step(learning_rate, decay, orthogonal, controls, seen, param, grad, time):
    """The steps of the tensors of one shape, and what is remembered of them.

    ``orthogonal`` makes matrices so; None if they are as other tensors.
    """
    tensors = seen.tensors
    drift = 10 / time.num_steps * jnp.tanh(controls[4])
    log_rate = jnp.clip(tensors.log_rate + drift, -4, 4)
    trust = 0.5 * jnp.tanh(controls[5]) * (jnp.clip(seen.log_rms[0], -7, 7) + 2)
    rate = jnp.exp(jnp.clip(controls[0] + log_rate + trust, -7, 5))
    shared = {
        "weights": time.weights,
        "slow": jax.nn.sigmoid(controls[1] - 2),
        "own": 0.3 * jax.nn.sigmoid(controls[2] - 1),
        "rate": learning_rate * time.schedule * rate,
        "decay": jnp.exp(jnp.clip(math.log(decay) + controls[3], *map(math.log, _DECAYS))),
    }
    moments = (*tensors.momenta, tensors.square)
    arrays = (param, grad, *moments)
    if orthogonal is not None and _is_matrix(param.shape[1:]):
        (raw,), _ = map_and_sum(_raw, shared, (grad, *tensors.momenta))
        flat = orthogonal(raw)
        sums = map_and_sum(_squares, shared, (grad, *moments, flat))[1]
        own, others = (_log_root(x / grad[0].size) for x in sums)
        shared |= {"scale": jnp.exp(own - others), "share": jax.nn.sigmoid(controls[6] + 1)}
        arrays = (*arrays, flat)
    (step,), _ = map_and_sum(_move, shared, arrays)
    return step, tensors._replace(log_rate=log_rate.astype(param.dtype))


def _log_losses(state: ControllerState, value) -> jax.Array:
    fast, slow, first = state.log_losses
    loss = jnp.log(jnp.maximum(jnp.asarray(value, state.log_losses.dtype), _TINY))
    after = jnp.stack(
        [d * x + (1 - d) * loss for d, x in zip(LOSS_DECAYS, (fast, slow), strict=True)] + [first]
    )
    return jnp.where(state.steps == 0, loss, after)


def _orthogonal(x: jax.Array, iterations: int, block: int) -> jax.Array:
    """Of ``[tensors, *shape]``, with the last axis as columns and all others as rows."""
    matrices = x.reshape(len(x), -1, x.shape[-1])
    block = block or min(matrices.shape[1:])
    return orthogonalize_in_blocks(matrices, block, iterations).reshape(x.shape)


def _log_root(mean: jax.Array) -> jax.Array:
    """Half the logarithm of means of squares in ``_UNIT``; of zeros the logarithm of 1e-12."""
    return 0.5 * jnp.log(mean + (_UNIT * _TINY) ** 2) - math.log(_UNIT)


def _is_matrix(shape: tuple[int, ...]) -> bool:
    return sum(size > 1 for size in shape) > 1
