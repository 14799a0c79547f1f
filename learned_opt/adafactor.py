"""Momenta and second moments, in full and by row and column, as inputs of a per-parameter network.

For a tensor of two axes or more, ``d0`` is its largest axis and ``d1`` its second largest. A
second moment averaged over ``d0`` is called a *row*, one averaged over ``d1`` a *column*. Inputs
made of rows or columns alone are never formed for every parameter: they enter the network's first
layer as an offset that is constant along ``d0`` or ``d1``.

Source: the accumulators of Adafactor (Shazeer and Stern 2018), as google/learned_optimization
(`learned_optimizers/common.py`) feeds them to its optimizers.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

MOMENTUM_DECAYS = (0.9, 0.99, 0.999)
FACTORED_DECAYS = (0.9, 0.99, 0.999)


class Decays(NamedTuple):
    """Decays of the momenta ``[3]``, the second moment (scalar), and rows and columns ``[3]``."""

    momentum: jax.Array
    square: jax.Array
    factored: jax.Array


class Accumulators(NamedTuple):
    """What an optimizer remembers of the gradients of a tensor.

    Attributes:
      momenta: ``[3, *shape]``.
      square: ``[*shape]``, the second moment.
      rows: ``[3, *shape]`` with size 1 along ``d0``; in full for fewer than two axes.
      columns: ``[3, *shape]`` with size 1 along ``d1``; None for fewer than two axes.
    """

    momenta: jax.Array
    square: jax.Array
    rows: jax.Array
    columns: jax.Array | None


def factored_axes(shape: Sequence[int]) -> tuple[int, int] | None:
    """``(d1, d0)``; None for fewer than two axes. Of axes of equal size the later is larger."""
    if len(shape) < 2:
        return None
    d1, d0 = sorted(range(len(shape)), key=lambda axis: shape[axis])[-2:]
    return d1, d0


def fixed_decays(dtype, square: float) -> Decays:
    """The decays 0.9, 0.99 and 0.999 that all use, and one of the second moment."""
    momentum, factored = (jnp.asarray(d, dtype) for d in (MOMENTUM_DECAYS, FACTORED_DECAYS))
    return Decays(momentum, jnp.asarray(square, dtype), factored)


def init_accumulators(param: jax.Array) -> Accumulators:
    """Zeros, of the type of ``param``."""
    shape, axes = param.shape, factored_axes(param.shape)

    def zeros(*leading, without=None):
        kept = [1 if axis == without else size for axis, size in enumerate(shape)]
        return jnp.zeros((*leading, *kept), param.dtype)

    d1, d0 = axes or (None, None)
    count = len(FACTORED_DECAYS)
    columns = zeros(count, without=d1) if axes else None
    return Accumulators(zeros(len(MOMENTUM_DECAYS)), zeros(), zeros(count, without=d0), columns)


def update_accumulators(old: Accumulators, grad: jax.Array, decays: Decays) -> Accumulators:
    """``a <- d a + (1 - d) x``: ``x`` is g for momenta, g^2, and means of g^2 + 1e-30.

    Decays of second moments count as at least 0 and at most 1, those of momenta as they are.
    """

    def average(decay, before, new, limited=True):
        decay = (jnp.clip(decay, 0, 1) if limited else decay).astype(grad.dtype)
        decay = decay.reshape(decay.shape + (1,) * grad.ndim)
        return decay * before + (1 - decay) * new

    axes, square = factored_axes(grad.shape), jnp.square(grad)
    # As the authors': 1e-30 on every square, before their mean.
    above_zero = square + 1e-30
    d1, d0 = axes or ((), ())
    rows = average(decays.factored, old.rows, jnp.mean(above_zero, d0, keepdims=True))
    columns = None
    if axes:
        columns = average(decays.factored, old.columns, jnp.mean(above_zero, d1, keepdims=True))
    momenta = average(decays.momentum, old.momenta, grad, limited=False)
    return Accumulators(momenta, average(decays.square, old.square, square), rows, columns)


def root_factors(new: Accumulators) -> tuple[jax.Array, jax.Array] | None:
    """``R`` and ``K``, as ``rows`` and ``columns``: their products are Adafactor's inverse roots.

    None for fewer than two axes.
    """
    if new.columns is None:
        return None
    axes = factored_axes(new.square.shape)
    assert axes is not None
    means = jnp.mean(new.rows, axis=1 + axes[0], keepdims=True)
    return _safe_rsqrt(new.rows / (means + 1e-9)), _safe_rsqrt(new.columns)


def _safe_rsqrt(x):
    return jax.lax.rsqrt(jnp.maximum(x, 1e-9))


def normalized(x: jax.Array, axes: Sequence[int], eps: float) -> jax.Array:
    """``x`` over its root mean square along ``axes``."""
    return x * jax.lax.rsqrt(eps + jnp.mean(x * x, axis=axes, keepdims=True))


def offsets(
    new: Accumulators, axes: Sequence[int], eps: float, rows: jax.Array, columns: jax.Array
) -> list[jax.Array]:
    """What rows and columns, and their inverse roots, add to a network's first layer.

    For fewer than two axes both are the second moments in full.

    Args:
      axes, eps: how the inputs are ``normalized``; axes of the tensor, from the front or the back.
      rows, columns: the part of the kernel ``[6, outputs]`` that is theirs.

    Returns:
      Two arrays ``[outputs, ...]``, of size 1 along the axes they are constant along.
    """

    def offset(x, kernel):
        inputs = jnp.concatenate([x, jax.lax.rsqrt(x + 1e-8)])
        after = tuple(axis + 1 if axis >= 0 else axis for axis in axes)
        return jnp.tensordot(kernel.T, normalized(inputs, after, eps), 1)

    return [
        offset(new.rows, rows),
        offset(new.rows if new.columns is None else new.columns, columns),
    ]
