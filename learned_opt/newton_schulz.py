"""Matrices whose singular values are all near 1, by products alone."""

import jax
import jax.numpy as jnp

# Of the quintic that lifts small singular values fastest, to between 0.7 and 1.2.
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_ITERATIONS = 5
_EPS = 1e-8


def orthogonalize(x: jax.Array) -> jax.Array:
    """``U S' V^T`` of ``x = U S V^T``, with ``S'`` near 1 wherever ``S`` is not tiny.

    Five times ``X <- a X + (b A + c A A) X`` with ``A = X X^T``, from ``x / (|x| + 1e-8)`` in the
    Frobenius norm; of the transposed matrix where that is the smaller product.

    Neither overflows nor has a derivative that is not finite: its squares are taken of ``x`` over
    its largest element, and the derivative at 0 is that of ``x / 1e-8``.

    Args:
      x: ``[..., rows, columns]`` floats, each matrix by itself.

    Source: Jordan et al. 2024, "Muon"; ``optax.contrib.orthogonalize_via_newton_schulz``, whose
    numbers these are.
    """
    if x.size == 0:
        return x
    tall = x.shape[-2] > x.shape[-1]
    x = _normalized(x.mT if tall else x)
    a, b, c = _COEFFICIENTS
    for _ in range(_ITERATIONS):
        square = x @ x.mT
        x = a * x + (b * square + c * square @ square) @ x
    return x.mT if tall else x


def _normalized(x: jax.Array) -> jax.Array:
    # The quotient does not depend on this scale, so its derivative is no part of the answer.
    largest = jax.lax.stop_gradient(jnp.max(jnp.abs(x), axis=(-2, -1), keepdims=True))
    scale = jnp.where(largest > 0, largest, 1)
    x = x / scale
    squares = jnp.sum(jnp.square(x), axis=(-2, -1), keepdims=True)
    norm = jnp.where(squares > 0, jnp.sqrt(jnp.where(squares > 0, squares, 1)), 0)
    return x / (norm + _EPS / scale)
