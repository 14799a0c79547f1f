"""The small per-parameter network on momenta and factored second moments: ``small_fc_lopt``."""

import math
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from learned_opt import adafactor
from learned_opt.arguments import check_between, check_sizes
from learned_opt.base import LearnedOptimizer, learned_optimizer
from learned_opt.features import TIMESCALES, time_embedding
from learned_opt.groups import group_by_shape, stack, unstack
from learned_opt.limits import limited
from learned_opt.slabs import on_normalized
from learned_opt.small_network import Layer, Layers, apply_layers

NUM_FEATURES = 28  # Normalized ones.
NUM_INPUTS = NUM_FEATURES + len(TIMESCALES)
SQUARE_DECAY = 0.999


class SmallNetwork(nn.Module):
    """Weights of the network, and what is learned of the decays.

    A decay ``d`` that begins at ``d0`` is stored as ``x`` with ``1 - d = (1 - d0) exp(10 x)``.
    """

    hidden_sizes: Sequence[int]
    num_outputs: int

    @nn.compact
    def __call__(self) -> tuple[tuple[Layer, ...], adafactor.Decays]:
        def decay(name, first):
            learned = self.param(name, nn.initializers.zeros, (len(first),))
            first = jnp.asarray(first, learned.dtype)
            return 1 - jnp.exp(10 * (jnp.log(1 - first) / 10 + learned))

        decays = adafactor.Decays(
            decay("momentum_decays", adafactor.MOMENTUM_DECAYS),
            decay("square_decays", (SQUARE_DECAY,))[0],
            decay("factored_decays", adafactor.FACTORED_DECAYS),
        )
        sizes = (NUM_INPUTS, *self.hidden_sizes, self.num_outputs)
        return Layers(sizes, name="network")(), decays


class SmallFCState(NamedTuple):
    """State of the optimizers with this network.

    Attributes:
      steps: int32 scalar, updates done.
      accumulators: for every shape among the parameters an ``adafactor.Accumulators``, each
        array with an axis of the tensors of that shape before its own.
    """

    steps: jax.Array
    accumulators: tuple[adafactor.Accumulators, ...]


def small_fc_optimizer(
    hidden_sizes: Sequence[int] = (4, 4), step_mult: float = 1e-3, exp_mult: float = 1e-3
) -> LearnedOptimizer:
    """A small network on momenta and Adafactor's second moments: 39 inputs, 197 meta-parameters.

    For every parameter 28 features (gradient, parameter, three momenta, second moment, the same
    divided by its root or by Adafactor's, rows and columns and their inverse roots) are divided
    by their root mean square over the tensor; with eleven ``tanh`` time features they pass
    through an MLP with ReLU to a direction ``d`` and a magnitude ``m``, and the update is
    ``-step_mult * d * exp(exp_mult * m)``. The seven decays are learned too. ``num_steps`` is not
    used. Of finite gradients at most 2.7e8 (float32) counts, so that no square overflows.

    A parameter whose gradient is exactly zero moves all the same: the network has no reason to
    answer zero features with a zero direction. ``mask_zero_gradients`` holds it still.

    Args:
      hidden_sizes: width of each hidden layer; ``(32, 32)`` has 2,409 meta-parameters.
      step_mult: scale of the update.
      exp_mult: scale of the log-magnitude.

    Raises:
      ValueError: if a size is no whole number above 0, or a multiplier not positive and finite.

    Source: Metz et al. 2022 (arXiv 2203.11860), ``small_fc_lopt``; `adafac_mlp_lopt.py` in
    google/learned_optimization. Differs: the limit of gradients.
    """
    check_sizes(hidden_sizes=hidden_sizes)
    check_between(0, math.inf, step_mult=step_mult, exp_mult=exp_mult)
    module = SmallNetwork(tuple(hidden_sizes), 2)

    def step(outputs, param, new):
        del param, new
        direction, magnitude = outputs
        return -step_mult * direction * jnp.exp(exp_mult * magnitude)

    return small_network_optimizer("small FC", module, step)


def small_network_optimizer(name: str, module: SmallNetwork, step) -> LearnedOptimizer:
    """The optimizer that steps by ``step(outputs, param, accumulators)``, tensor by tensor."""

    def bind(theta, num_steps):
        del num_steps
        layers, decays = module.apply(theta)

        def init_fn(params):
            stacks = stack(params, group_by_shape(params))
            accumulators = tuple(jax.vmap(adafactor.init_accumulators)(x) for x in stacks)
            return SmallFCState(jnp.zeros([], jnp.int32), accumulators)

        def update_fn(updates, state, params=None, **extra):
            del extra
            if params is None:
                raise ValueError(
                    f"The {name} optimizer reads the parameters: call "
                    "`update(grads, state, params)`."
                )
            groups = group_by_shape(params)
            stacks = zip(
                state.accumulators, stack(updates, groups), stack(params, groups), strict=True
            )
            found = [
                _update(step, layers, decays, time_embedding(state.steps, group[1].dtype), *group)
                for group in stacks
            ]
            steps = unstack([step for step, _ in found], groups, updates)
            return steps, SmallFCState(state.steps + 1, tuple(new for _, new in found))

        return optax.GradientTransformationExtraArgs(init_fn, update_fn)

    return learned_optimizer(module.init, bind, moves_without_gradient=True)


@partial(jax.jit, static_argnums=0)  # So that tracing it again costs nothing.
def _update(step, layers, decays, time, old, grads, params):
    """Of all tensors of one shape."""

    def update(old, grad, param):
        grad = limited(grad, 4)
        new = adafactor.update_accumulators(old, grad, decays)
        return _steps(step, layers, time, grad, param, new), new

    return jax.vmap(update)(old, grads, params)


def _steps(step, layers, time, grad, param, new):
    """Of one tensor."""
    axes = tuple(range(-grad.ndim, 0))
    first, *others = layers
    # In the order of the inputs, which is that of published weights.
    before, rows, columns, row_roots, column_roots, last, of_time = jnp.split(
        first.kernel, (13, 16, 19, 22, 25, NUM_FEATURES)
    )
    constant = Layer(jnp.concatenate([before, last]), first.bias + time @ of_time)
    offsets = adafactor.offsets(
        new,
        axes,
        1e-5,
        jnp.concatenate([rows, row_roots]),
        jnp.concatenate([columns, column_roots]),
    )
    arrays = grad, param, new, adafactor.root_factors(new), offsets
    return on_normalized(_inputs, partial(_outputs, step), axes, 1e-5, (constant, *others), arrays)


def _inputs(arrays):
    grad, param, new, factors, _ = arrays
    momenta = list(new.momenta)
    root = jax.lax.rsqrt(new.square + 1e-6)
    if factors is None:
        factored = list(jax.lax.rsqrt(new.rows + 1e-9))
        for_momenta = list(jax.lax.rsqrt(new.rows + 1e-6))
    else:
        factored = for_momenta = [row * column for row, column in zip(*factors, strict=True)]
    own = [grad, param, *momenta, new.square, *(m * root for m in momenta), root]
    own += [grad * r for r in factored]
    return own + [m * r for m, r in zip(momenta, for_momenta, strict=True)]


def _outputs(step, layers, inputs, arrays):
    _, param, new, _, offsets = arrays
    return step(apply_layers(layers, inputs, offsets), param, new)
