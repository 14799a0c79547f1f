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
    whole = orthogonalize_in_blocks(x, 99)
    np.testing.assert_array_equal(whole, orthogonalize(x, factored=True))
    np.testing.assert_allclose(whole, orthogonalize(x), atol=1e-5)


@pytest.mark.parametrize("kind", ["any", "low rank", "six orders", "zeros"])
@pytest.mark.parametrize("iterations", [1, 2, 5])
def test_all_factors_at_once_are_the_same(kind, iterations, x64):
    """But for rounding, its derivative too, tall and wide; and it is another program."""
    rng = np.random.default_rng(3)
    x = rng.normal(size=(2, 5, 31))
    if kind == "low rank":
        x = rng.normal(size=(2, 5, 2)) @ rng.normal(size=(2, 2, 31))
    if kind == "six orders":
        x = np.diag(10.0 ** -np.arange(1, 7)[:5]) @ np.linalg.qr(x.mT)[0].mT
    if kind == "zeros":
        x = 0 * x

    for wide in (x, x.mT):
        each = [partial(orthogonalize, iterations=iterations, factored=f) for f in (False, True)]
        plain, factored = (f(wide) for f in each)
        np.testing.assert_allclose(factored, plain, atol=1e-10)
        slopes = [jax.grad(lambda z, f=f: jnp.sum(jnp.sin(3 * f(z))))(wide) for f in each]
        np.testing.assert_allclose(slopes[1], slopes[0], atol=1e-5 * np.abs(slopes[0]).max() + 1e-9)
    assert len({str(jax.make_jaxpr(f)(x)) for f in each}) == 2


def test_single_precision_keeps_what_low_rank_allows():
    """What `orthogonalize` says of its rounding."""
    rng = np.random.default_rng(4)
    low = rng.normal(size=(32, 4)) @ rng.normal(size=(4, 100))
    orders = np.diag(10.0 ** -np.linspace(0, 6, 32)) @ np.linalg.qr(rng.normal(size=(100, 32)))[0].T
    for x, limit in ((low, 6e-5), (orders, 1e-3)):
        x = x.astype(np.float32)
        plain, factored = (orthogonalize(x, factored=f) for f in (False, True))
        assert np.linalg.norm(factored - plain) < limit * np.linalg.norm(plain)
