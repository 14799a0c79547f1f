"""Celo2: a learned direction for matrices, whose learning rate is again a hyperparameter."""

import math
import re
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from learned_opt import adafactor
from learned_opt.annealing import annealing
from learned_opt.arguments import check_between, check_count, check_flag, check_one_of, check_within
from learned_opt.base import LearnedOptimizer, learned_optimizer
from learned_opt.groups import group_by_shape, stack, unstack
from learned_opt.limits import limited
from learned_opt.newton_schulz import orthogonalize
from learned_opt.small_network import Layers
from learned_opt.thirty_inputs import GRADIENT_LIMIT, NUM_INPUTS, NUM_OUTPUTS, network_outputs

SCHEDULES = ("constant", "cosine")
SQUARE_DECAY = 0.95
_ADAM_DECAYS = (0.9, 0.95)
_ADAM_EPS = 1e-8
_EPS = 1e-9


class Celo2State(NamedTuple):
    """State of Celo2.

    Attributes:
      accumulators: for every shape among the parameters with the learned rule an
        ``adafactor.Accumulators``, each array with an axis of the tensors of that shape before
        its own.
      adam: mean and second moment of the gradient, for every other parameter.
    """

    accumulators: tuple[adafactor.Accumulators, ...]
    adam: list[tuple[jax.Array, jax.Array]]


def celo2_optimizer(
    hidden_size: int = 8,
    learning_rate: float = 1e-3,
    weight_decay: float = 0.0,
    adam_names: str = "bias|embed",
    adam_rate: float = 20.0,
    orthogonal: bool = True,
    schedule: str = "constant",
) -> LearnedOptimizer:
    """Celo2: a learned direction, orthogonalized for matrices; 347 meta-parameters.

    For every parameter thirty inputs (see ``thirty_inputs``) are divided by their root mean square
    over the last two axes (a vector has fifteen of them) and pass through an MLP with ReLU to a
    direction. Directions of two axes and more are orthogonalized by five Newton-Schulz steps;
    then ``-learning_rate (d / rms(d) + weight_decay p)`` is the update, with ``rms`` over the last
    two axes. 18 of the meta-parameters belong to outputs that nothing reads. Gradients count as at
    most 1000.

    Parameters named as ``adam_names`` says follow Adam instead (decays 0.9 and 0.95, no bias
    correction, ``m / sqrt(v + 1e-8)``) at ``adam_rate`` times the rate.

    ``num_steps`` is read by the schedule cosine alone: the rate rises over the first 3% of the run
    and falls to 1% at its end, where it stays. A parameter whose gradient is exactly zero moves all
    the same under the learned rule; ``mask_zero_gradients`` holds it still.

    Args:
      hidden_size: width of both hidden layers.
      learning_rate: root mean square of the learned update.
      weight_decay: share of the parameter removed in a step, over the rate; 0 or more.
      adam_names: a regular expression searched for in the names of parameters, such as
        ``layers_0/bias``; empty: none follow Adam.
      adam_rate: rate of Adam over ``learning_rate``.
      orthogonal: whether directions are orthogonalized.
      schedule: of the rate: constant, as published, or cosine.

    Raises:
      ValueError: on a size or number out of range, no regular expression, or an unknown schedule.

    Source: Moudgil et al. 2026 (arXiv 2602.19142); `celo2.py` and `celo2_optax.py` in
    amoudgl/celo. Differs: gradients of Adam count as at most 1.2e18 (float32), so that no square
    overflows.
    """
    check_count(hidden_size=hidden_size)
    check_between(0, math.inf, learning_rate=learning_rate, adam_rate=adam_rate)
    check_within(0, math.inf, weight_decay=weight_decay)
    check_flag(orthogonal=orthogonal)
    check_one_of(SCHEDULES, schedule=schedule)
    try:
        if not isinstance(adam_names, str):
            raise TypeError(f"it is a {type(adam_names).__name__}, no string")
        named = re.compile(adam_names)
    except (re.error, TypeError) as error:
        raise ValueError(
            f"`adam_names` must be a regular expression, got {adam_names!r}: {error}."
        ) from None
    module = Layers((NUM_INPUTS, hidden_size, hidden_size, NUM_OUTPUTS))

    def follows_adam(params: Any) -> list[bool]:
        names = (
            jax.tree_util.keystr(path, simple=True, separator="/")
            for path, _ in jax.tree_util.tree_leaves_with_path(params)
        )
        return [bool(adam_names and named.search(name)) for name in names]

    def bind(theta, num_steps):
        layers = module.apply(theta)

        def init_fn(params):
            adam, learned = _split(params, follows_adam(params))
            stacks = stack(learned, group_by_shape(learned))
            return Celo2State(
                tuple(jax.vmap(adafactor.init_accumulators)(x) for x in stacks),
                [(jnp.zeros_like(p), jnp.zeros_like(p)) for p in adam],
            )

        def update_fn(updates, state, params=None, **extra):
            del extra
            if params is None:
                raise ValueError(
                    "The Celo2 optimizer reads the parameters: call `update(grads, state, params)`."
                )
            chosen = follows_adam(params)
            adam, learned = _split(params, chosen)
            adam_grads, grads = _split(updates, chosen)
            groups = group_by_shape(learned)
            found = [
                _learned_direction(orthogonal, layers, *group)
                for group in zip(
                    state.accumulators, stack(grads, groups), stack(learned, groups), strict=True
                )
            ]
            directions = unstack([direction for direction, _ in found], groups, learned)
            steps = iter(
                -learning_rate * (d + weight_decay * p)
                for d, p in zip(directions, learned, strict=True)
            )
            moved = [_adam(*leaf) for leaf in zip(state.adam, adam_grads, strict=True)]
            adam_steps = iter(
                -adam_rate * learning_rate * (d + weight_decay * p)
                for (d, _), p in zip(moved, adam, strict=True)
            )
            steps = [next(adam_steps) if is_adam else next(steps) for is_adam in chosen]
            state = Celo2State(tuple(new for _, new in found), [new for _, new in moved])
            return jax.tree.unflatten(jax.tree.structure(params), steps), state

        rule = optax.GradientTransformationExtraArgs(init_fn, update_fn)
        if schedule == "constant":
            return rule
        return optax.chain(rule, optax.scale_by_schedule(annealing(num_steps)))

    return learned_optimizer(module.init, bind, moves_without_gradient=True)


def celo2_base_optimizer(
    hidden_size: int = 8,
    learning_rate: float = 1e-3,
    weight_decay: float = 0.0,
    schedule: str = "constant",
) -> LearnedOptimizer:
    """Celo2-base: the learned rule of ``celo2_optimizer`` for all parameters, nothing else.

    No orthogonalization and no Adam. A parameter whose gradient is exactly zero moves all the
    same; ``mask_zero_gradients`` holds it still.

    Args:
      hidden_size: width of both hidden layers.
      learning_rate: root mean square of the update.
      weight_decay: share of the parameter removed in a step, over the rate; 0 or more.
      schedule: of the rate: constant, as published, or cosine.

    Raises:
      ValueError: on a size or number out of range, or an unknown schedule.

    Source: as ``celo2_optimizer``.
    """
    return celo2_optimizer(
        hidden_size, learning_rate, weight_decay, adam_names="", orthogonal=False, schedule=schedule
    )


def _split(tree: Any, chosen: list[bool]) -> tuple[list, list]:
    """The leaves that are chosen, and the others."""
    leaves = list(zip(jax.tree.leaves(tree), chosen, strict=True))
    return [x for x, yes in leaves if yes], [x for x, yes in leaves if not yes]


@partial(jax.jit, static_argnums=0)  # So that tracing it again costs nothing.
def _learned_direction(orthogonal, layers, old, grads, params):
    """Of all tensors of one shape: directions of root mean square 1, and their accumulators."""
    decays = adafactor.fixed_decays(grads.dtype, SQUARE_DECAY)

    def direction_of(old, grad, param):
        grad = jnp.clip(grad, -GRADIENT_LIMIT, GRADIENT_LIMIT)
        new = adafactor.update_accumulators(old, grad, decays)
        axes = tuple(range(-min(2, grad.ndim), 0))
        direction = network_outputs(
            _first,
            layers,
            grad,
            param,
            new,
            axes=axes,
            eps=_EPS,
            square_eps=1e-8,
            vectors_have_factors=False,
        )
        if orthogonal and direction.ndim >= 2:
            direction = orthogonalize(direction)
        return adafactor.normalized(direction, axes, _EPS), new

    return jax.vmap(direction_of)(old, grads, params)


def _first(direction, *_):
    return direction


def _adam(moments, grad):
    """``m / sqrt(v + 1e-8)``, and the moments after the gradient."""
    b1, b2 = _ADAM_DECAYS
    grad = limited(grad, 2)
    mean = b1 * moments[0] + (1 - b1) * grad
    square = b2 * moments[1] + (1 - b2) * jnp.square(grad)
    return mean * jax.lax.rsqrt(square + _ADAM_EPS), (mean, square)
