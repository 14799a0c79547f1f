"""Orthogonal matrices that are safe to draw under ``vmap`` and on several devices."""

from typing import Any

import jax
import jax.numpy as jnp


def orthogonal(key: jax.Array, shape: tuple[int, int], dtype: Any = float) -> jax.Array:
    """A uniformly distributed orthogonal matrix; of another shape, its columns or rows are.

    To rounding that of ``jax.nn.initializers.orthogonal``: see ``orthonormal_columns``.

    Args:
      shape: rows and columns.
      dtype: of the matrix; by default of floats, so double precision where JAX has that on.
    """
    rows, columns = shape
    found = orthonormal_columns(jax.random.normal(key, (max(shape), min(shape)), dtype))
    return found if rows >= columns else found.T


def orthonormal_columns(matrix: jax.Array) -> jax.Array:
    """An orthonormal basis of the columns, each in the direction of what the ones before lack.

    By the process of Gram and Schmidt, twice for each column. It is the first factor of a QR
    factorization whose second has a positive diagonal. JAX computes that one by LAPACK: in jaxlib
    0.10 each of a batch waits for threads of the pool that it waits in, so two batches at once, on
    several devices or in a population, may wait for each other for ever.

    Args:
      matrix: ``[rows, columns]``, of full rank, rows at least columns.
    """

    def add(i, found):
        column = matrix[:, i]
        for _ in range(2):  # The second takes off what rounding left of the first.
            along = jnp.matmul(found.T, column, precision="highest")
            column = column - jnp.matmul(found, along, precision="highest")
        return found.at[:, i].set(column / jnp.linalg.norm(column))

    return jax.lax.fori_loop(0, matrix.shape[1], add, jnp.zeros_like(matrix))
