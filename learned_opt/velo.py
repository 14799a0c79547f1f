"""VeLO: a recurrent network that looks at tensors mixes, for each, its own small rule."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from learned_opt import adafactor
from learned_opt.arguments import check_between, check_count, check_given
from learned_opt.base import LearnedOptimizer, learned_optimizer
from learned_opt.controller import Controller, state_dtype
from learned_opt.groups import group_by_shape, stack, unstack
from learned_opt.limits import limited
from learned_opt.progress import NUM_PROGRESS, LossAverages, init_averages, progress
from learned_opt.recurrent import LSTMState
from learned_opt.small_network import Layers
from learned_opt.thirty_inputs import NUM_INPUTS, NUM_OUTPUTS, scaled_steps

_MOST_AXES = 4
NUM_FEATURES = NUM_PROGRESS + 7 + 1 + _MOST_AXES


class VeLOState(NamedTuple):
    """State of VeLO.

    Attributes:
      steps: int32 scalar, updates done.
      averages: of the loss.
      lstm: ``[tensors, hidden_size]`` each, tensors of equal shape side by side.
      accumulators: for every shape among the parameters an ``adafactor.Accumulators``, each
        array with an axis of the tensors of that shape before its own.
    """

    steps: jax.Array
    averages: LossAverages
    lstm: LSTMState
    accumulators: tuple[adafactor.Accumulators, ...]


def velo_optimizer(
    hidden_size: int = 512,
    num_networks: int = 256,
    network_mult: float = 100.0,
    step_mult: float = 1e-3,
    exp_mult: float = 1e-3,
) -> LearnedOptimizer:
    """VeLO: for every tensor an LSTM mixes the rule; 2,320,385 meta-parameters.

    The LSTM reads, for every tensor, thirty features: the step over ``num_steps``, the loss
    (``value``), how many axes the tensor has, and sizes and variances of its momenta and second
    moment. Out come a rate ``r`` and a mixture of ``num_networks`` networks: their weights times
    ``network_mult``, averaged with weights that may have any size and sign. That network takes
    thirty inputs of every parameter (see ``thirty_inputs``), over their root mean square in the
    tensor, through an MLP 4-4 with ReLU to a direction ``d`` and a magnitude ``m``. The update is
    ``-r step_mult d exp(exp_mult m) rms(p)``, with ``rms(p)`` as in ``celo_optimizer``. Gradients
    count as at most 1000, and parameters as at most 1.2e18 (float32). A layer that the authors'
    code overwrites does nothing.

    A parameter whose gradient is exactly zero moves all the same: the network has no reason to
    answer zero features with a zero direction. ``mask_zero_gradients`` holds it still.

    Args:
      hidden_size: of the LSTM.
      num_networks: how many are mixed.
      network_mult: scale of the mixed weights; 100 for Google's trained one.
      step_mult: scale of the update.
      exp_mult: scale of the log-magnitude.

    Raises:
      ValueError: on a size or multiplier out of range.

    Source: Metz et al. 2022 (arXiv 2211.09760); `hyper_v2.py` in google/learned_optimization, both
    flags named "bugged" False. That code measures the spread of the second moment around the mean
    of the momenta, as here, since trained weights know it so. Differs: the limit of
    parameters.
    """
    check_count(hidden_size=hidden_size, num_networks=num_networks)
    check_between(0, math.inf, network_mult=network_mult, step_mult=step_mult, exp_mult=exp_mult)
    networks = Layers((NUM_INPUTS, 4, 4, NUM_OUTPUTS), copies=(num_networks,))
    controller = Controller(hidden_size, num_controls=num_networks)

    def init(key):
        keys = jax.random.split(key)
        features = jnp.zeros((1, NUM_FEATURES))
        both = {
            "networks": networks.init(keys[0]),
            "controller": controller.init(keys[1], features),
        }
        return {"params": {name: variables["params"] for name, variables in both.items()}}

    def bind(theta, num_steps):
        weights = {name: {"params": part} for name, part in theta["params"].items()}
        bank = networks.apply(weights["networks"])

        def init_fn(params):
            groups, dtype = group_by_shape(params), state_dtype(params)
            lstm = controller.apply(weights["controller"], sum(map(len, groups)), method="start")
            return VeLOState(
                jnp.zeros([], jnp.int32),
                init_averages(dtype),
                jax.tree.map(lambda x: x.astype(dtype), lstm),
                tuple(jax.vmap(adafactor.init_accumulators)(x) for x in stack(params, groups)),
            )

        def update_fn(updates, state, params=None, *, value=None, **extra):
            del extra
            check_given("VeLO", params, value)
            groups = group_by_shape(params)
            stacks, grads = stack(params, groups), stack(updates, groups)
            run, averages = progress(state.averages, value, state.steps, num_steps)
            features = [
                _features(run, old, x) for old, x in zip(state.accumulators, stacks, strict=True)
            ]
            controls, rates, lstm = controller.apply(
                weights["controller"], jnp.concatenate(features), state.lstm
            )
            # Of every tensor its own network.
            mixed = jax.tree.map(
                lambda x: network_mult / num_networks * jnp.tensordot(controls, x, 1), bank
            )
            ends = np.cumsum([len(places) for places in groups])[:-1]
            structure = jax.tree.structure(bank)
            mixed = zip(*(jnp.split(x, ends) for x in jax.tree.leaves(mixed)), strict=True)
            found = [
                scaled_steps(exp_mult, True, jax.tree.unflatten(structure, layers), *group)
                for layers, *group in zip(mixed, state.accumulators, grads, stacks, strict=True)
            ]
            steps = [
                -step_mult * rate.reshape(-1, *[1] * (step.ndim - 1)) * step
                for rate, (step, _) in zip(jnp.split(rates, ends), found, strict=True)
            ]
            accumulators = tuple(new for _, new in found)
            after = VeLOState(state.steps + 1, averages, lstm, accumulators)
            return unstack(steps, groups, updates), after

        return optax.GradientTransformationExtraArgs(init_fn, update_fn)

    return learned_optimizer(init, bind, moves_without_gradient=True)


def velo_s_optimizer(
    hidden_size: int = 64, num_networks: int = 32, network_mult: float = 1.0
) -> LearnedOptimizer:
    """VeLO-s: a small VeLO of 46,337 meta-parameters.

    A parameter whose gradient is exactly zero moves all the same; ``mask_zero_gradients`` holds it
    still.

    Args:
      hidden_size: of the LSTM.
      num_networks: how many are mixed.
      network_mult: scale of the mixed weights; 1 for the published one. A fresh theta hardly
        moves parameters with it.

    Raises:
      ValueError: on a size or multiplier out of range.

    Source: Moudgil et al. 2025 (arXiv 2501.12670); `factory.py` in amoudgl/celo.
    """
    return velo_optimizer(hidden_size, num_networks, network_mult)


@jax.jit
def _features(run, old, params):
    """``[n, 30]`` for all ``n`` tensors of one shape, from the accumulators before the step."""
    axes = sum(size > 1 for size in params.shape[1:])
    rank = jax.nn.one_hot(axes, _MOST_AXES + 1, dtype=run.dtype)

    def features(old, param):
        param = limited(param, 2)
        scale = jax.lax.rsqrt(jnp.maximum(1e-9, jnp.mean(jnp.square(param))))
        momenta, square = (x.reshape(-1, param.size) * scale for x in (old.momenta, old.square))
        mean = jnp.mean(momenta, axis=1, keepdims=True)
        spreads = [jnp.mean(jnp.square(x - mean), axis=1) for x in (momenta, square)]
        sizes = [_log_size(x) for x in (jnp.mean(square, axis=1), *spreads)]
        return jnp.concatenate([run, sizes[0], rank, *sizes[1:]])

    return jax.vmap(features)(old, params)


def _log_size(x):
    return 0.5 * jnp.clip(jnp.log(1e-8 + jnp.abs(10 * x)), -5, 5)
