"""Random directions of unit variance, for every estimator that perturbs theta.

Components have mean 0, variance 1, no correlation and a symmetric distribution; the rows of a
block ``[num, dim]`` are the directions of one population at one step.
"""

import math
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from meta_train.checks import check_whole

# The address of what the rows of a block share; no row has this index.
BLOCK = 2**32 - 1
CAUCHY_CLIP = 10.0
SOBOL_MAX_DIM = 21_201  # Of scipy.stats.qmc.Sobol.


class Sampler(NamedTuple):
    """A distribution of directions. Row ``i`` of a block can be had without the others.

    Attributes:
      block: ``(key, num, dim, dtype) -> shared``, what the ``num`` rows of a block have in
        common; ``()`` for independent rows.
      row: ``(shared, key, index, dim, dtype) -> [dim]``. ``key`` is the row's own: an
        independent row depends on nothing else, a row of a block also on its ``index``.
    """

    block: Callable[[jax.Array, int, int, Any], Any]
    row: Callable[[Any, jax.Array, jax.Array, int, Any], jax.Array]


def rows(
    name: str, key: jax.Array, indices: jax.Array, num: int, dim: int, dtype: Any = jnp.float32
) -> jax.Array:
    """Rows ``indices`` (int ``[n]``) of ``draw(name, key, num, dim, dtype)``: ``[n, dim]``.

    So the rows of a population may be drawn on the devices that use them.
    """
    check_whole(num=num, dim=dim)
    block, row = sampler_named(name)
    shared = block(jax.random.fold_in(key, BLOCK), num, dim, dtype)
    return jax.vmap(lambda i: row(shared, jax.random.fold_in(key, i), i, dim, dtype))(indices)


def draw(name: str, key: jax.Array, num: int, dim: int, dtype: Any = jnp.float32) -> jax.Array:
    """``num`` directions, ``[num, dim]``; row ``i`` of an independent sampler is the same for all
    ``num``, and keyed by ``fold_in(key, i)``.

    Raises:
      ValueError: on an unknown name, or sizes that are not whole numbers of at least 1.
    """
    check_whole(num=num, dim=dim)
    return rows(name, key, jnp.arange(num, dtype=jnp.int32), num, dim, dtype)


def sampler_named(name: str) -> Sampler:
    """The sampler of that name.

    Raises:
      ValueError: if there is none.
    """
    if name not in SAMPLERS:
        raise ValueError(f"`sampler` must be one of {sorted(SAMPLERS)}, got {name!r}.")
    return SAMPLERS[name]


def _independent(values: Callable[[jax.Array, tuple[int, ...], Any], jax.Array]) -> Sampler:
    """Independent components, from ``(key, shape, dtype) -> values``."""
    return Sampler(
        lambda key, num, dim, dtype: (),
        lambda shared, key, index, dim, dtype: values(key, (dim,), dtype),
    )


def _uniform(key, shape, dtype):
    edge = math.sqrt(3)
    return jax.random.uniform(key, shape, dtype, -edge, edge)


def _laplace(key, shape, dtype):
    return jax.random.laplace(key, shape, dtype) / math.sqrt(2)


def _cauchy(key, shape, dtype):
    """A Cauchy variable clipped to +-c, c = 10, over its standard deviation.

    Its variance is ``2/pi (c - atan c) + c^2 (1 - 2/pi atan c)``, 11.78: the integral of
    ``x^2`` under the density ``1 / (pi (1 + x^2))``, and the mass beyond ``c`` placed there. 6%
    of the values are the largest, +-2.91, and half are within +-0.29.
    """
    c, angle = CAUCHY_CLIP, 2 / math.pi * math.atan(CAUCHY_CLIP)
    variance = 2 / math.pi * c - angle + c**2 * (1 - angle)
    return jnp.clip(jax.random.cauchy(key, shape, dtype), -c, c) / math.sqrt(variance)


def _orthogonal_block(key, num, dim, dtype):
    """Rows of random rotations, each of length sqrt(dim): orthogonal within groups of ``dim``.

    A row is uniform on a sphere (so components are not exactly normal, and the smoothing is over
    a ball: Stokes' theorem). Rows of one length and not of chi-distributed lengths, since the
    mean of ``e e^T`` over ``num = dim`` rows then is exactly the identity. Signs make the
    rotation uniform (Mezzadri 2007). Costs ``num^2 dim``, and ``num dim`` memory per device.
    """
    size, exact = min(num, dim), jnp.promote_types(dtype, jnp.float32)
    normal = jax.random.normal(key, (math.ceil(num / size), dim, size), exact)
    # One block after another: in jaxlib 0.10 the factorizations of a batch wait for threads of the
    # pool that they are in, and batches on several devices were seen to wait for ever.
    q, r = jax.lax.map(jnp.linalg.qr, normal)
    q = q * jnp.sign(jnp.diagonal(r, axis1=1, axis2=2))[:, None, :]
    return (math.sqrt(dim) * q.swapaxes(1, 2).reshape(-1, dim)).astype(dtype)


@cache
def _direction_numbers(dim: int, bits: int) -> np.ndarray:
    """Sobol direction numbers, uint32 ``[bits, dim]``, from the points of scipy's generator.

    Its point ``n`` is the exclusive or of the numbers ``j`` that are set in ``n ^ (n >> 1)``.
    """
    from scipy.stats import qmc  # Slow to import, and large; only this sampler needs it.

    engine = qmc.Sobol(dim, scramble=False, bits=32)
    numbers = np.zeros((bits, dim), np.uint32)
    for j in range(bits):
        skip = 2**j - engine.num_generated
        if skip:
            engine.fast_forward(skip)
        point = (engine.random(1)[0] * 2.0**32).astype(np.uint32)
        numbers[j] = point ^ numbers[j - 1] if j else point
    return numbers


def _sobol_block(key, num, dim, dtype):
    """Direction numbers and a random digital shift of each dimension."""
    del dtype
    low = min(dim, SOBOL_MAX_DIM)
    numbers = _direction_numbers(low, max(1, (num - 1).bit_length()))
    return jnp.asarray(numbers), jax.random.bits(key, (low,), jnp.uint32)


def _sobol_row(shared, key, index, dim, dtype):
    """A shifted Sobol point through the inverse normal distribution function: a normal row.

    The numbers are known for 21,201 dimensions; components beyond are drawn independently.
    """
    numbers, shift = shared
    used = (index >> jnp.arange(len(numbers))) & 1
    words = jnp.where(used[:, None] == 1, numbers, jnp.uint32(0))
    word = shift ^ jax.lax.reduce(words, jnp.uint32(0), jax.lax.bitwise_xor, (0,))
    exact = jnp.promote_types(dtype, jnp.float32)
    # The middle of one of 2^bits cells of (-1, 1): never an end, and exact in this precision.
    bits = 32 if exact == jnp.float64 else 23
    uniform = ((word >> (32 - bits)).astype(exact) + 0.5) / 2.0 ** (bits - 1) - 1
    # As `jax.random.normal` does. `ndtri` rounds by the number of rows that are drawn together.
    low = (math.sqrt(2) * jax.lax.erf_inv(uniform)).astype(dtype)
    rest = jax.random.normal(key, (dim - low.size,), dtype)
    return jnp.concatenate([low, rest])


SAMPLERS: dict[str, Sampler] = {
    "normal": _independent(jax.random.normal),
    "rademacher": _independent(jax.random.rademacher),
    "uniform": _independent(_uniform),
    "laplace": _independent(_laplace),
    "cauchy": _independent(_cauchy),
    "orthogonal": Sampler(_orthogonal_block, lambda block, key, index, dim, dtype: block[index]),
    "sobol": Sampler(_sobol_block, _sobol_row),
}
