"""The per-parameter network of thirty inputs that VeLO, Celo and Celo2 step by."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from learned_opt import adafactor
from learned_opt.small_network import Layer, apply_layers

NUM_INPUTS = 30
NUM_OUTPUTS = 3  # Direction, magnitude, and one that nothing reads.
GRADIENT_LIMIT = 1000.0


def network_outputs(
    layers: Sequence[Layer],
    grad: jax.Array,
    param: jax.Array,
    new: adafactor.Accumulators,
    *,
    axes: Sequence[int],
    eps: float,
    square_eps: float,
    vectors_have_factors: bool = True,
) -> list[jax.Array]:
    """The three outputs ``[*shape]`` for one tensor.

    Inputs are the gradient, itself within 0.1 of 0, the parameter, the momenta, the second moment,
    momenta and gradient over its root, its inverse root, gradient and momenta over Adafactor's
    root, rows and columns and their inverse roots: 18 that are formed for every parameter, and 12
    that are constant along an axis. Each is divided by its root mean square.

    Args:
      layers: of thirty inputs, in the order of published weights.
      grad, param, new: of one tensor; ``new`` has taken the gradient.
      axes: of the tensor, from its end, that the root mean square is over.
      eps: added to the mean square.
      square_eps: added to the second moment under the root.
      vectors_have_factors: whether tensors of fewer than two axes have the last fifteen inputs,
        made of their second moments in full; else these count as 0.
    """
    momenta = list(new.momenta)
    root = jax.lax.rsqrt(new.square + square_eps)
    if new.columns is None:
        factored = list(jax.lax.rsqrt(new.rows + 1e-9))
        for_momenta = list(_inverse_root(new.rows))
    else:
        factored = for_momenta = adafactor.factored_roots(new)
    own = [grad, jnp.clip(grad, -0.1, 0.1), param, *momenta, new.square]
    own += [*(m * root for m in momenta), root, *(grad * r for r in factored), grad * root]

    first, *others = layers
    before, rows, columns, row_roots, column_roots, last = jnp.split(
        first.kernel, (15, 18, 21, 24, 27)
    )
    offsets = []
    if new.columns is not None or vectors_have_factors:
        own += [m * r for m, r in zip(momenta, for_momenta, strict=True)]
        before = jnp.concatenate([before, last])
        rows, columns = (
            jnp.concatenate(both) for both in ((rows, row_roots), (columns, column_roots))
        )
        offsets = adafactor.offsets(new, axes, eps, rows, columns)
    own = [adafactor.normalized(x, axes, eps) for x in own]
    return apply_layers((Layer(before, first.bias), *others), own, offsets)


# Smaller squares have inverse roots whose derivative is beyond float32.
_SMALL = 1e-18


def _inverse_root(square):
    """``square ** -0.5`` of numbers above 0, constant below 1e-18 as far as derivatives see."""
    constant = jax.lax.rsqrt(jax.lax.stop_gradient(square))
    return jnp.where(square < _SMALL, constant, jax.lax.rsqrt(jnp.maximum(square, _SMALL)))
