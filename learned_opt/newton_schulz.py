"""Matrices whose singular values are all near 1, by products alone."""

import jax

from learned_opt.norms import over_norm

# Of the quintic that lifts small singular values fastest, to between 0.7 and 1.2.
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_ITERATIONS = 5
_EPS = 1e-8


def orthogonalize(x: jax.Array) -> jax.Array:
    """``U S' V^T`` of ``x = U S V^T``, with ``S'`` near 1 wherever ``S`` is not tiny.

    Five times ``X <- a X + (b A + c A A) X`` with ``A = X X^T``, from ``x / (|x| + 1e-8)`` in the
    Frobenius norm; of the transposed matrix where that is the smaller product.

    Squares do not overflow, and derivatives are finite: see ``over_norm``.

    Args:
      x: ``[..., rows, columns]`` floats, each matrix by itself.

    Source: Jordan et al. 2024, "Muon"; ``optax.contrib.orthogonalize_via_newton_schulz``, whose
    numbers these are.
    """
    if x.size == 0:
        return x
    tall = x.shape[-2] > x.shape[-1]
    x = over_norm(x.mT if tall else x, (-2, -1), _EPS)
    a, b, c = _COEFFICIENTS
    for _ in range(_ITERATIONS):
        square = x @ x.mT
        x = a * x + (b * square + c * square @ square) @ x
    return x.mT if tall else x
