"""OptList: a fixed list of settings of NAdamW, each with its own schedule, to be tried in order.

Source: Metz et al. 2020, "Using a thousand optimization tasks to learn hyperparameter search
strategies"; values and what is computed from ``opt_list`` in github.com/google-research/
google-research (Apache-2.0), of which these are the first ten.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax


class Listed(NamedTuple):
    """One of the list. Fractions are of the run; its ``l2`` is 0 in all of these."""

    learning_rate: float
    beta1: float
    beta2: float
    epsilon: float
    use_nesterov: bool
    weight_decay: float
    warmup_fraction: float
    min_learning_rate_mult: float
    constant_fraction: float


# fmt: off
OPTLIST = (
    Listed(0.0011948335721160095, 0.9360043452616368, 0.9989497406214962, 5.875814422073298e-06, False, 0.010141964334059882, 0.0, 0.0, 0.747304046223346),  # noqa: E501
    Listed(0.4060109803507517, 0.9972408031165986, 0.9868027286692506, 107.85861559302559, True, 0.015620239959742821, 2.289161370180122e-05, 0.0, 0.3241485833861578),  # noqa: E501
    Listed(0.0002118527403995637, 0.6229650835415205, 0.9727800493920264, 1.5402357939162808e-07, False, 0.05360756231092083, 1.139506043021826e-05, 0.0013864545078620433, 0.2099310299628817),  # noqa: E501
    Listed(0.007531482507067026, 0.6919155876981923, 0.984342979679972, 3.592713026359696e-08, False, 0.0003059674479201108, 0.0, 0.0009554387155165385, 0.4224892293642567),  # noqa: E501
    Listed(0.05569700266024712, 0.9742164724896906, 0.999980948972404, 4.2139276965284695, False, 0.00022331033137191596, 0.0, 0.0, 0.5209910283942752),  # noqa: E501
    Listed(0.006954992428540949, 0.9941177962325759, 0.9930455329766189, 4.3517153884397565e-07, False, 3.142332648519505e-05, 0.0, 0.0, 0.013619134087588858),  # noqa: E501
    Listed(0.020526066283142113, 0.3573051949320971, 0.8604303237563932, 8.87354819497349e-05, True, 0.07217167553538734, 0.0, 1.566669185534864e-05, 0.8851679138723282),  # noqa: E501
    Listed(0.0005950867356750683, 0.8912956998774763, 0.9998316947284045, 1.4834761018841103e-07, True, 0.04087020908564961, 0.008212683099401206, 0.0, 0.37760078274486286),  # noqa: E501
    Listed(0.005328687277638261, 0.960474459618098, 0.9992247804716405, 8.665059017026017e-08, True, 0.005563237041504353, 0.0, 0.0, 0.17233141309625333),  # noqa: E501
    Listed(0.0012415879131444274, 0.9466569269853439, 0.9406663837522827, 8.113630827139477e-08, False, 7.25772958596056e-05, 0.0, 0.0010075665692423708, 0.47695142196433893),  # noqa: E501
)
# fmt: on


class State(NamedTuple):
    """The number of updates done, and the means of gradients and of their squares."""

    count: Any
    mean: Any
    square: Any


def nadamw(place: Any, progress: Callable[[Any], Any], settings: tuple[Listed, ...]) -> Any:
    """The setting at ``place`` of ``settings`` as a transformation of optax; needs ``params``.

    As published: epsilon is added to the square root before the correction for the first steps,
    the decay is multiplied by the rate that has the correction, and where there is a warm-up, it
    lasts as long as the constant phase if that is longer.

    Args:
      place: which of the list, from 0; may be traced.
      progress: ``updates done -> `` the share of the run.
      settings: the list.
    """
    # What is near 1 in double precision: 1 - beta2 is 2e-5 in one of them.
    betas = np.array([(s.beta1, s.beta2) for s in settings], np.float64)
    place = jnp.asarray(place, jnp.int32)
    of = Listed._make(jnp.asarray(column)[place] for column in zip(*settings, strict=True))
    fresh1, fresh2 = jnp.asarray(1 - betas, jnp.float32)[place]
    log1, log2 = jnp.asarray(np.log(betas), jnp.float32)[place]

    def rate(count):
        done = jnp.minimum(progress(count), 1.0)
        since = (jnp.maximum(done, of.constant_fraction) - of.constant_fraction) / (
            1 - of.constant_fraction
        )
        low = of.min_learning_rate_mult * of.learning_rate
        decayed = (of.learning_rate - low) * (jnp.cos(jnp.pi * since) / 2 + 0.5) + low
        warmup = jnp.maximum(of.warmup_fraction, of.constant_fraction)
        warming = (of.warmup_fraction != 0) & (done < warmup)
        return jnp.where(warming, done / warmup * of.learning_rate, decayed)

    def init(params):
        zeros = jax.tree.map(jnp.zeros_like, params)
        return State(jnp.int32(0), zeros, zeros)

    def update(grads, state, params):
        t = state.count + 1
        corrected = rate(state.count) * jnp.sqrt(-jnp.expm1(t * log2)) / -jnp.expm1(t * log1)
        mean = jax.tree.map(lambda m, g: (m + fresh1 * (g - m)).astype(m.dtype), state.mean, grads)
        square = jax.tree.map(
            lambda v, g: (v + fresh2 * (g * g - v)).astype(v.dtype), state.square, grads
        )

        def step(m, v, g, p):
            top = jnp.where(of.use_nesterov, m + fresh1 * (g - m), m)
            change = top / (jnp.sqrt(v) + of.epsilon) + of.weight_decay * p
            return (-corrected * change).astype(p.dtype)

        return jax.tree.map(step, mean, square, grads, params), State(t, mean, square)

    return optax.GradientTransformation(init, update)
