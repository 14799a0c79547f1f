"""What a scheduler sees of an inner run as a whole: how far it is, and how its loss goes."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

NUM_PROGRESS = 18
_FRACTIONS = (0.03, 0.1, 0.2, 0.4, 0.6, 0.8, 0.9, 1.0, 1.1)
_NUM_AVERAGES = 10
_FIRST_MINIMUM = 999999999999.0
_STEPS_WITHOUT_LOSS = 2


class LossAverages(NamedTuple):
    """Averages of the loss over ten lengths of time, and the least each has been, ``[10]`` each."""

    means: jax.Array
    minima: jax.Array


def init_averages(dtype) -> LossAverages:
    """Before the first loss."""
    zeros = jnp.zeros(_NUM_AVERAGES, dtype)
    return LossAverages(zeros, zeros + _FIRST_MINIMUM)


def progress(
    averages: LossAverages, loss: jax.Array, steps: jax.Array, num_steps: Any
) -> tuple[jax.Array, LossAverages]:
    """``[18]`` features and the averages after this loss.

    Nine are ``tanh(10 (steps / num_steps - c))``. The others compare averages ``a_i`` of decays
    ``exp(-1 / h_i)``, ``h_i`` from 10 to ``num_steps`` at equal ratios, bias-corrected: ``f =
    (a_i - min a_i) / (a_{i+1} - min a_i) - 1`` within 1 of 0, 0 in the first two steps. A loss
    counts as at most twice the largest average. Where a loss stands still to its last digits,
    ``f`` is a quotient of rounding errors, here as in the authors' code, and what follows from it
    differs between programs that round differently.

    Args:
      averages: of the losses before.
      loss: scalar.
      steps: updates done.
      num_steps: updates in all.

    Source: Metz et al. 2022 (arXiv 2211.09760); `hyper_v2.py` in google/learned_optimization.
    """
    dtype = averages.means.dtype
    loss = jnp.asarray(loss, dtype)
    num_steps = jnp.asarray(num_steps, dtype)
    decays = jnp.exp(-1 / jnp.logspace(1, jnp.log10(num_steps), _NUM_AVERAGES, dtype=dtype))
    weight = 1 - decays ** (steps + 1)
    largest = jnp.where(steps == 0, loss, jnp.max(averages.means / weight))
    loss = jnp.minimum(2 * jnp.abs(largest), loss)
    means = decays * averages.means + (1 - decays) * loss
    corrected = means / weight
    minima = jnp.minimum(averages.minima, corrected)

    span = jnp.maximum(1e-8, corrected[1:] - minima[:-1])
    compared = jnp.clip((corrected[:-1] - minima[:-1]) / span - 1, -1, 1)
    compared = jnp.where(steps < _STEPS_WITHOUT_LOSS, 0, compared)
    elapsed = jnp.tanh(10 * (steps / num_steps - jnp.asarray(_FRACTIONS, dtype)))
    return jnp.concatenate([elapsed, compared]), LossAverages(means, minima)
