"""A learned correction of Adam: the small network beside a nominal step."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from learned_opt.arguments import check_between, check_flag, check_sizes, check_within
from learned_opt.base import LearnedOptimizer
from learned_opt.small_fc import SmallNetwork, small_network_optimizer

_EPS = 1e-6  # Beside the second moment, under the root.


def star_optimizer(
    hidden_sizes: Sequence[int] = (4, 4),
    step_mult: float = 1e-3,
    exp_mult: float = 1e-3,
    nominal_step: float = 1e-3,
    weight_decay: float = 0.0,
    precondition: bool = False,
    nominal_controller: bool = False,
    decay_controller: bool = False,
) -> LearnedOptimizer:
    """STAR: an Adam-like step plus a learned one, 207 meta-parameters.

    With the network and inputs of ``small_fc_optimizer`` but four outputs ``d, a, b, c``, momenta
    ``m_i`` and second moment ``v``, the update is

    ``-nominal_step e^(exp_mult b) mean_i(m_i) r - step_mult d e^(exp_mult a)
    - weight_decay e^(exp_mult c) p``,  ``r = 1 / sqrt(v + 1e-6)``,

    with ``b = 1`` and ``c = 0`` where the network does not control them. So it begins near Adam at
    the rate ``nominal_step``, not at random. ``num_steps`` is not used. Of finite gradients at
    most 2.7e8 (float32) counts, so that no square overflows.

    A parameter whose gradient is exactly zero moves all the same: the network has no reason to
    answer zero features with a zero direction. ``mask_zero_gradients`` holds it still.

    Args:
      hidden_sizes: width of each hidden layer.
      step_mult: scale of the learned step.
      exp_mult: scale of the three log-magnitudes.
      nominal_step: rate of the Adam-like step, 0 or more.
      weight_decay: share of the parameter that a step removes (no rate comes on top), 0 or more.
      precondition: whether the learned step too is multiplied by ``r``, as in Google's trained
        ones. Where gradients are small that is up to 1000: a fresh theta then takes large steps
        at random.
      nominal_controller: whether the network controls the rate of the Adam-like step.
      decay_controller: whether it controls the weight decay.

    Raises:
      ValueError: if a size is no whole number above 0, or another number not finite or too small.

    Source: Harrison, Metz, Sohl-Dickstein 2022 (arXiv 2209.11208); `adafac_nominal.py` in
    google/learned_optimization, its default nominal step ("AdamAggMo"). Differs: the limit of
    gradients, and ``nominal_step``, by default 0 there.
    """
    check_sizes(hidden_sizes=hidden_sizes)
    check_between(0, math.inf, step_mult=step_mult, exp_mult=exp_mult)
    check_within(0, math.inf, nominal_step=nominal_step, weight_decay=weight_decay)
    check_flag(
        precondition=precondition,
        nominal_controller=nominal_controller,
        decay_controller=decay_controller,
    )

    def step(outputs, param, new):
        direction, magnitude, nominal, decay = outputs
        root = jax.lax.rsqrt(new.square + _EPS)
        learned = step_mult * direction * jnp.exp(exp_mult * magnitude)
        nominal = jnp.exp(exp_mult * (nominal if nominal_controller else 1.0))
        decay = jnp.exp(exp_mult * decay) if decay_controller else 1.0
        adam = nominal_step * nominal * jnp.mean(new.momenta, axis=0) * root
        return -weight_decay * decay * param - (learned * root if precondition else learned) - adam

    return small_network_optimizer("STAR", SmallNetwork(tuple(hidden_sizes), 4), step)
