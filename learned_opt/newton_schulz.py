"""Matrices whose singular values are all near 1, by products alone."""

import math
from functools import partial

import jax
import jax.numpy as jnp

from learned_opt.norms import over_norm

# Of the quintic that lifts small singular values fastest, to between 0.7 and 1.2.
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_ITERATIONS = 5
_EPS = 1e-8
# From this ratio of the sides on, products of the shorter side alone are much fewer operations.
_LONG = 3


def orthogonalize(x: jax.Array, iterations: int = _ITERATIONS, factored: bool = False) -> jax.Array:
    """``U S' V^T`` of ``x = U S V^T``, with ``S'`` near 1 wherever ``S`` is not tiny.

    ``iterations`` times ``X <- a X + (b A + c A A) X`` with ``A = X X^T``, from
    ``x / (|x| + 1e-8)`` in the Frobenius norm; of the transposed matrix where that is the smaller
    product. Each multiplies small singular values by 3.4: what is above .02 of the norm ends near
    1 after three, what is above .002 after five.

    Squares do not overflow, and derivatives are finite: see ``over_norm``.

    Args:
      x: ``[..., rows, columns]`` floats, each matrix by itself.
      iterations: at least 1.
      factored: where one side is at least 3 times the other, and floats have 32 bits or more, find
        the product of all factors from ``X X^T`` alone, and multiply by it once: for long matrices
        a third of the work or less. The same but for rounding: in float32 3e-5 of the norm for
        matrices of low rank, 5e-4 where singular values span six orders.

    Source: Jordan et al. 2024, "Muon"; ``optax.contrib.orthogonalize_via_newton_schulz``, whose
    numbers these are.
    """
    if x.size == 0:
        return x
    tall = x.shape[-2] > x.shape[-1]
    x = over_norm(x.mT if tall else x, (-2, -1), _EPS)
    rows, columns = x.shape[-2:]
    if factored and columns >= _LONG * rows and jnp.finfo(x.dtype).bits >= 32:
        x = _factor(x @ x.mT, iterations) @ x
    else:
        a, b, c = _COEFFICIENTS
        for _ in range(iterations):
            square = x @ x.mT
            x = a * x + (b * square + c * square @ square) @ x
    return x.mT if tall else x


def _factor(square: jax.Array, iterations: int) -> jax.Array:
    """What the iterations multiply ``X`` by, from ``A = X X^T``.

    With ``P = a + b A + c A A`` the next ``X`` is ``P X``, and the next ``A`` is ``P A P``.
    """
    a, b, c = _COEFFICIENTS
    factor = a * jnp.eye(square.shape[-1], dtype=square.dtype)
    for i in range(iterations):
        rest = b * square + c * square @ square  # P - a
        factor = a * factor + rest @ factor if i else factor + rest
        if i + 1 < iterations:
            moved = a * square + rest @ square
            square = a * moved + moved @ rest
    return factor


def orthogonalize_in_blocks(x: jax.Array, block: int, iterations: int = _ITERATIONS) -> jax.Array:
    """``orthogonalize``, factored, of each block of at most ``block`` along the shorter side.

    The work is that of the matrix times ``block`` over its shorter side. A matrix whose shorter
    side is at most ``block`` is one block. Blocks are of equal size; where that does not divide the
    side, the last has zeros in addition.

    Args:
      x: ``[..., rows, columns]`` floats, each matrix by itself.
      block: at least 1.
    """
    rows, columns = x.shape[-2:]
    if x.size == 0 or min(rows, columns) <= block:
        return orthogonalize(x, iterations, factored=True)
    if rows > columns:
        return orthogonalize_in_blocks(x.mT, block, iterations).mT
    count = math.ceil(rows / block)
    size = math.ceil(rows / count)
    filled = jnp.pad(x, [*[(0, 0)] * (x.ndim - 2), (0, count * size - rows), (0, 0)])
    blocks = filled.reshape(*x.shape[:-2], count, size, columns)
    # One after another: what is allocated is that of one block.
    one = partial(orthogonalize, iterations=iterations, factored=True)
    done = jax.lax.map(one, jnp.moveaxis(blocks, -3, 0))
    return jnp.moveaxis(done, 0, -3).reshape(filled.shape)[..., :rows, :]
