"""Muon whose hyperparameters are the meta-parameters."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from learned_opt.adam import nesterov_mean, scale_by_adam
from learned_opt.base import LearnedOptimizer
from learned_opt.hyperparameters import inverse_time, tuned
from learned_opt.newton_schulz import orthogonalize

_EPS = 1e-8


class OrthogonalizedState(NamedTuple):
    """State of the orthogonalized momentum.

    Attributes:
      steps: int32 scalar, updates done.
      momentum: of the shapes of the matrices.
    """

    steps: jax.Array
    momentum: Any


def learnable_muon(
    learning_rate: float = 0.02,
    adam_learning_rate: float = 1e-3,
    decay: float = 1.0,
    beta: float = 0.95,
    b1: float = 0.9,
    b2: float = 0.999,
    weight_decay: float = 1e-4,
) -> LearnedOptimizer:
    """Muon under an inverse-time decay of its rates; theta is seven scalars.

    Matrices (two axes) move along their Nesterov momentum with all singular values made 1, times
    ``sqrt(max(1, columns / rows))``; scalars, vectors and tensors of more axes by NAdamW with a
    rate of its own. Both rates fall as ``1 / (1 + t / num_steps) ** decay``. So
    ``optax.contrib.muon``, with one weight decay for all.

    The weight decay moves parameters without a gradient too, and so does what the other elements
    of a matrix do to them; ``mask_zero_gradients`` holds them still.

    Args:
      learning_rate: initial rate of matrices in the first step, above 0.
      adam_learning_rate: initial rate of all others in the first step, above 0.
      decay: initial exponent of the schedule, above 0.
      beta: initial decay of the momentum of matrices, strictly between 0 and 1.
      b1: initial decay of the first moment of all others, strictly between 0 and 1.
      b2: initial decay of the second moment of all others, strictly between 0 and 1.
      weight_decay: initial weight decay, above 0; multiplied by the rate.

    Raises:
      ValueError: on a value out of range.

    Source: Jordan et al. 2024, "Muon"; ``optax.contrib.muon``; the schedule is that of
    ``learnable_schedule``. Differs: squares do not overflow and derivatives are finite, as in
    ``learnable_adam`` and ``orthogonalize``.
    """

    def muon(num_steps, learning_rate, adam_learning_rate, decay, beta, b1, b2, weight_decay):
        def moving(direction, rate):
            return optax.chain(
                direction,
                optax.add_decayed_weights(weight_decay),
                optax.scale_by_learning_rate(inverse_time(rate, decay, num_steps)),
            )

        return optax.partition(
            {
                "matrix": moving(_scale_by_muon(beta), learning_rate),
                "other": moving(scale_by_adam(b1, b2, _EPS, nesterov=True), adam_learning_rate),
            },
            lambda params: jax.tree.map(lambda p: "matrix" if p.ndim == 2 else "other", params),
        )

    positive = {"learning_rate": learning_rate, "adam_learning_rate": adam_learning_rate}
    positive |= {"decay": decay, "weight_decay": weight_decay}
    return tuned(
        muon,
        positive=positive,
        shares={"beta": beta, "b1": b1, "b2": b2},
        moves_without_gradient=True,
    )


def _scale_by_muon(beta) -> optax.GradientTransformation:
    """Momentum of matrices, made orthogonal."""

    def init(params):
        momentum = jax.tree.map(jnp.zeros_like, params)
        return OrthogonalizedState(jnp.zeros([], jnp.int32), momentum)

    def update(updates, state, params=None):
        del params
        steps = state.steps + 1
        momentum = optax.tree.update_moment(updates, state.momentum, beta, 1)
        ahead = nesterov_mean(momentum, updates, beta, steps)
        directions = jax.tree.map(_direction, ahead)
        return directions, OrthogonalizedState(steps, momentum)

    return optax.GradientTransformation(init, update)


def _direction(matrix):
    rows, columns = matrix.shape
    return math.sqrt(max(1, columns / max(1, rows))) * orthogonalize(matrix)
