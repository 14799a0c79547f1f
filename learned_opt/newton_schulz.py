"""Matrices whose singular values are all near 1, by products alone."""

import math

import jax
import jax.numpy as jnp

from learned_opt.norms import over_norm

# Of the quintic that lifts small singular values fastest, to between 0.7 and 1.2.
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_ITERATIONS = 5
_EPS = 1e-8


def orthogonalize(x: jax.Array, iterations: int = _ITERATIONS) -> jax.Array:
    """``U S' V^T`` of ``x = U S V^T``, with ``S'`` near 1 wherever ``S`` is not tiny.

    ``iterations`` times ``X <- a X + (b A + c A A) X`` with ``A = X X^T``, from
    ``x / (|x| + 1e-8)`` in the Frobenius norm; of the transposed matrix where that is the smaller
    product. Each multiplies small singular values by 3.4: what is above .02 of the norm ends near
    1 after three, what is above .002 after five.

    Squares do not overflow, and derivatives are finite: see ``over_norm``.

    Args:
      x: ``[..., rows, columns]`` floats, each matrix by itself.
      iterations: at least 1.

    Source: Jordan et al. 2024, "Muon"; ``optax.contrib.orthogonalize_via_newton_schulz``, whose
    numbers these are.
    """
    if x.size == 0:
        return x
    tall = x.shape[-2] > x.shape[-1]
    x = over_norm(x.mT if tall else x, (-2, -1), _EPS)
    a, b, c = _COEFFICIENTS
    for _ in range(iterations):
        square = x @ x.mT
        x = a * x + (b * square + c * square @ square) @ x
    return x.mT if tall else x


def orthogonalize_in_blocks(x: jax.Array, block: int, iterations: int = _ITERATIONS) -> jax.Array:
    """``orthogonalize`` of each block of at most ``block`` along a matrix's shorter side.

    The work is that of the matrix times ``block`` over its shorter side. A matrix whose shorter
    side is at most ``block`` is one block. Blocks are of equal size; where that does not divide the
    side, the last has zeros in addition.

    Args:
      x: ``[..., rows, columns]`` floats, each matrix by itself.
      block: at least 1.
    """
    rows, columns = x.shape[-2:]
    if x.size == 0 or min(rows, columns) <= block:
        return orthogonalize(x, iterations)
    if rows > columns:
        return orthogonalize_in_blocks(x.mT, block, iterations).mT
    count = math.ceil(rows / block)
    size = math.ceil(rows / count)
    filled = jnp.pad(x, [*[(0, 0)] * (x.ndim - 2), (0, count * size - rows), (0, 0)])
    blocks = filled.reshape(*x.shape[:-2], count, size, columns)
    # One after another: what is allocated is that of one block.
    done = jax.lax.map(lambda b: orthogonalize(b, iterations), jnp.moveaxis(blocks, -3, 0))
    return jnp.moveaxis(done, 0, -3).reshape(filled.shape)[..., :rows, :]
