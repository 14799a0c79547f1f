"""Elementwise functions with sums in slabs, and matrices made orthogonal in blocks, by NumPy."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from learned_opt import elementwise
from learned_opt.newton_schulz import orthogonalize, orthogonalize_in_blocks


def function(shared, arrays):
    x, y = arrays
    return [x + shared["by"] * y, jnp.sin(x)], [x * y, shared["each"] * y * y]


@pytest.mark.parametrize("shape", [(1, 23), (2, 7, 5), (3, 1), (2, 3, 4, 2), (5, 20)])
def test_slabs_equal_the_whole(monkeypatch, shape):
    """Values, derivatives, and under ``vmap``."""
    monkeypatch.setattr(elementwise, "_LARGEST_WHOLE", 1)
    monkeypatch.setattr(elementwise, "_SLAB", 10)
    rng = np.random.default_rng(0)
    x, y, each = rng.normal(size=shape), rng.normal(size=shape), rng.normal(size=shape[0])

    def ours(x, y, each):
        return elementwise.map_and_sum(function, {"by": 0.5, "each": each}, [x, y])

    def plain(x, y, each):
        axes = tuple(range(1, len(shape)))
        squares = (each.reshape(-1, *[1] * len(axes)) * y * y).sum(axes)
        return [x + 0.5 * y, jnp.sin(x)], [(x * y).sum(axes), squares]

    check = partial(np.testing.assert_allclose, rtol=2e-5, atol=1e-5)
    jax.tree.map(check, jax.jit(ours)(x, y, each), plain(x, y, each))
    pairs = [np.stack([z, z + 1]) for z in (x, y, each)]
    jax.tree.map(check, jax.jit(jax.vmap(ours))(*pairs), jax.vmap(plain)(*pairs))

    def loss(f, *args):
        return sum(jnp.sum(jnp.cos(z)) for z in jax.tree.leaves(f(*args)))

    slopes = [jax.jit(jax.grad(partial(loss, f), (0, 1, 2)))(x, y, each) for f in (ours, plain)]
    jax.tree.map(check, *slopes)


@pytest.mark.parametrize("shape", [(7, 9), (9, 7), (2, 6, 8), (3, 20), (4, 4)])
def test_blocks_are_orthogonal_by_themselves(shape):
    """At most 3 of the shorter side's rows together; 7 are three blocks of 3, 3 and 1."""
    x = np.random.default_rng(1).normal(size=shape).astype(np.float32)
    found = jax.jit(partial(orthogonalize_in_blocks, block=3, iterations=4))(x)
    flat = np.moveaxis(x, -2, -1) if shape[-2] > shape[-1] else x
    size = -(-flat.shape[-2] // -(-flat.shape[-2] // 3))
    cuts = range(size, flat.shape[-2], size)
    expected = np.concatenate(
        [orthogonalize(b, 4) for b in np.split(flat, list(cuts), axis=-2)], axis=-2
    )
    expected = np.moveaxis(expected, -2, -1) if shape[-2] > shape[-1] else expected
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    assert found.shape == x.shape
    # One block is the matrix itself.
    np.testing.assert_array_equal(orthogonalize_in_blocks(x, 99), orthogonalize(x))
