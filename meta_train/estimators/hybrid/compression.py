"""Gradients in fewer bytes, and the error feedback that makes up for it."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Compressor(NamedTuple):
    """A lossy code for a vector ``[P]``.

    Attributes:
      encode: ``vector -> payload``, a pytree of arrays.
      decode: ``(payload, P, dtype) -> vector``.
      num_bytes: ``P -> bytes`` of one payload.
    """

    encode: Callable[[jax.Array], Any]
    decode: Callable[[Any, int, Any], jax.Array]
    num_bytes: Callable[[int], int]


class Quantized(NamedTuple):
    """``values`` int8 ``[P]``, in units of ``scale``, float32."""

    values: jax.Array
    scale: jax.Array


class Largest(NamedTuple):
    """The ``k`` entries of largest magnitude: ``values`` float32 and ``indices`` int32, ``[k]``."""

    values: jax.Array
    indices: jax.Array


def int8() -> Compressor:
    """Every entry rounded to one of 255 evenly spaced values up to the largest magnitude."""

    def encode(vector):
        scale = jnp.max(jnp.abs(vector)) / 127
        steps = jnp.where(scale > 0, vector * (1 / scale), 0.0)
        return Quantized(jnp.round(steps).astype(jnp.int8), scale.astype(jnp.float32))

    def decode(payload, size, dtype):
        del size
        return payload.values.astype(dtype) * payload.scale.astype(dtype)

    return Compressor(encode, decode, lambda size: size + 4)


def top_k(fraction: float) -> Compressor:
    """Only the share ``fraction`` of the entries with the largest magnitude, in float32.

    Raises:
      ValueError: if the fraction is not in ``(0, 1]``.
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"`fraction` must be above 0 and at most 1, got fraction={fraction}.")

    def count(size):
        return max(1, math.ceil(fraction * size))

    def encode(vector):
        indices = jax.lax.top_k(jnp.abs(vector), count(vector.size))[1]
        return Largest(vector[indices].astype(jnp.float32), indices.astype(jnp.int32))

    def decode(payload, size, dtype):
        return jnp.zeros(size, dtype).at[payload.indices].set(payload.values.astype(dtype))

    return Compressor(encode, decode, lambda size: 8 * count(size))


COMPRESSORS: dict[str, Callable[[float], Compressor | None]] = {
    "none": lambda fraction: None,
    "int8": lambda fraction: int8(),
    "top_k": top_k,
}


def with_feedback(
    compressor: Compressor, vector: jax.Array, residual: jax.Array
) -> tuple[Any, jax.Array]:
    """The payload for ``vector`` plus what earlier payloads left out, and what is now left out.

    What is sent over time then adds up to what should have been sent, but for the last
    residual: nothing is lost, only late. A vector that is not finite leaves the residual.

    Source: Seide et al. 2014 (1-bit SGD); Stich, Cordonnier, Jaggi 2018 (top-k with memory).
    """
    wanted = vector + residual
    payload = compressor.encode(wanted)
    left = wanted - compressor.decode(payload, vector.size, vector.dtype)
    return payload, jnp.where(jnp.all(jnp.isfinite(left)), left, residual)
