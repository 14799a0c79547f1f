"""Exact multiplication of fixed-point numbers by fractions: nothing is lost, so it can be undone.

A number is an int64 in units of ``2^-bits``. Multiplying it by ``n / d`` loses the digits
that the division shifts out; here they enter an *information buffer*, one int64 per
number, and the multiplication by ``n`` takes its low digits back out of the buffer. The
buffer grows by ``log2(d / n)`` bits a step, as information theory demands. Before it can
overflow, every number pushes 32 bits to a tape, at steps known before the run: the buffer
is below an integer bound that depends on the ``n`` alone (``plan_spills``).

``d = 2^decay_bits``, so only ``n`` needs an integer division. ``n = d`` changes nothing.

Source: Maclaurin, Duvenaud, Adams 2015, Algorithm 3. Differs: the paper keeps the buffer in
one arbitrarily long Python integer per number.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from meta_train.compiled_apart import branch_apart

SPILL_BITS = 32
BUFFER_BITS = 62


class FixedPoint(NamedTuple):
    """Resolution and range of the exact state.

    Attributes:
      weight_bits: weights are multiples of ``2^-weight_bits``, below ``2^(62 - weight_bits)``.
      accumulator_bits: same for velocities and other accumulators. Every multiplication
        exchanges their low ``decay_bits`` with the buffer, so they are as good as
        ``2^(decay_bits - accumulator_bits)``.
      decay_bits: decays (momenta) are multiples of ``2^-decay_bits``: 0 acts as
        ``2^-decay_bits``, and what is below 1 as at most ``1 - 2^-decay_bits`` (at 1 the
        gradient would count nothing); only 1 is 1. Few bits keep accumulators precise, many
        let decays come near 1.
    """

    weight_bits: int = 44
    accumulator_bits: int = 48
    decay_bits: int = 10

    @property
    def weight_range(self) -> float:
        """Weights must stay below this in magnitude."""
        return 2.0 ** (62 - self.weight_bits)

    @property
    def accumulator_range(self) -> float:
        """Accumulators must stay below this in magnitude."""
        return 2.0 ** (62 - self.accumulator_bits)


SINGLE = FixedPoint()
"""For float32 gradients: weights below 2^18, velocities below 2^14."""

DOUBLE = FixedPoint(weight_bits=52, accumulator_bits=56, decay_bits=10)
"""A finer grid, worth it with float64 gradients: weights below 1024, velocities below 64."""


def check_fixed_point(fixed: FixedPoint) -> None:
    """Raises ``ValueError`` on a format that int64 cannot hold."""
    for name, value, low, high in (
        ("weight_bits", fixed.weight_bits, 1, 61),
        ("accumulator_bits", fixed.accumulator_bits, 1, 61),
        ("decay_bits", fixed.decay_bits, 1, 20),
    ):
        if not low <= value <= high:
            raise ValueError(f"`{name}` must be from {low} to {high}, got {name}={value}.")


def snap(decay: jax.Array, decay_bits: int) -> jax.Array:
    """The nearest ``n / 2^decay_bits`` strictly between 0 and 1, or 1; derivatives pass through.

    What is outside [0, 1] is rounded away from it, so that no spill plan holds it, and NaN stays.
    """
    step = 2.0**-decay_bits
    n = decay / step
    nearest = jnp.where(decay == 1, n, jnp.clip(jnp.round(n), 1.0, 1 / step - 1))
    nearest = jnp.where(decay < 0, jnp.floor(n), jnp.where(decay > 1, jnp.ceil(n), nearest))
    return jax.lax.stop_gradient(nearest * step) + (decay - jax.lax.stop_gradient(decay))


@jax.custom_jvp
def _undifferentiated(x: jax.Array) -> jax.Array:
    """``x``; a ``TypeError`` if it depends on what someone differentiates with respect to."""
    return x


@_undifferentiated.defjvp
def _refuse(primals, tangents):
    raise TypeError(
        "a reversible run cannot be differentiated by `jax.grad` or another transformation: its "
        "state is integers, where derivatives would silently become zero. Use "
        "`reversible.hypergradients`, or for systems the estimator `reversible`."
    )


def quantize(x: jax.Array, bits: int) -> jax.Array:
    """The nearest multiple of ``2^-bits``, as int64; ``TypeError`` when differentiated."""
    x = _undifferentiated(x)
    return jnp.round(x * np.asarray(2.0**bits, x.dtype)).astype(jnp.int64)


def dequantize(fixed: jax.Array, bits: int, dtype) -> jax.Array:
    """The float nearest to ``fixed * 2^-bits``."""
    return fixed.astype(dtype) * np.asarray(2.0**-bits, dtype)


def divmod_exact(x: jax.Array, n: jax.Array) -> tuple[jax.Array, jax.Array]:
    """``floor(x / n)`` and the remainder from 0 to ``n - 1``.

    Processors divide long integers ten times slower than floats. The first quotient is off
    by at most 2^11 for its 53 bits. What it leaves over is so small that ``(rest + 1/2) / n``
    is never near an integer, so its floor is exact, however the product is rounded.

    Args:
      x: int64, magnitude below 2^62.
      n: int64 from 1 to 2^20, broadcastable.
    """
    quotient = branch_apart(n.ravel()[0] > 0, _floor_quotient, x, n)
    return quotient, x - quotient * n


def _floor_quotient(x: jax.Array, n: jax.Array) -> jax.Array:
    reciprocal = 1.0 / n.astype(jnp.float64)
    estimate = (x.astype(jnp.float64) * reciprocal).astype(jnp.int64)
    rest = x - estimate * n
    return estimate + jnp.floor((rest.astype(jnp.float64) + 0.5) * reciprocal).astype(jnp.int64)


def multiply(
    value: jax.Array, buffer: jax.Array, numerator: jax.Array, decay_bits: int
) -> tuple[jax.Array, jax.Array]:
    """``value * numerator / 2^decay_bits``, with the lost digits in the buffer.

    Args:
      value: int64, any sign, magnitude below 2^62.
      buffer: int64, same shape, from 0 to below ``2^(62 - decay_bits)`` (see ``plan_spills``).
      numerator: int64 from 1 to ``2^decay_bits``, broadcastable.
      decay_bits: log2 of the denominator.
    """
    low_digits = value & ((1 << decay_bits) - 1)
    buffer, remainder = divmod_exact((buffer << decay_bits) | low_digits, numerator)
    return (value >> decay_bits) * numerator + remainder, buffer


def divide(
    value: jax.Array, buffer: jax.Array, numerator: jax.Array, decay_bits: int
) -> tuple[jax.Array, jax.Array]:
    """Undoes ``multiply``, bit for bit."""
    quotient, remainder = divmod_exact(value, numerator)
    buffer = buffer * numerator + remainder
    low_digits = buffer & ((1 << decay_bits) - 1)
    return (quotient << decay_bits) | low_digits, buffer >> decay_bits


class SpillPlan(NamedTuple):
    """When the buffers spill to the tape, decided before the run.

    Attributes:
      slots: int32 ``[T, K]``, the tape row that accumulator ``k`` fills before step ``t``;
        ``num_rows``, a row that is never read, where it does not spill.
      num_rows: rows of the tape that carry information.
      numerators: int64 ``[T, K]``, the smallest numerator the plan allows for.
      decay_bits: log2 of the denominators.
    """

    slots: np.ndarray
    num_rows: int
    numerators: np.ndarray
    decay_bits: int

    @property
    def bound_bits(self) -> float:
        """Information that the multiplications destroy: bits per parameter, over the run."""
        return float(np.sum(self.decay_bits - np.log2(self.numerators)))

    @property
    def tape_bits(self) -> int:
        """Bits per parameter allocated for the tape (its unread row included) and the buffers."""
        return SPILL_BITS * (self.num_rows + 1) + 64 * self.slots.shape[1]


def plan_spills(numerators: np.ndarray, decay_bits: int) -> SpillPlan:
    """Spills as late as possible, given the smallest numerators ``[T, K]`` of each step.

    A buffer below ``bound`` is below ``(bound * d - 1) // n + 1`` after a multiplication,
    and the multiplication itself needs ``bound * d <= 2^BUFFER_BITS``.
    """
    numerators = np.asarray(numerators, np.int64)
    num_steps, num_accumulators = numerators.shape
    spills = np.zeros((num_steps, num_accumulators), bool)
    denominator = 1 << decay_bits
    for k in range(num_accumulators):
        bound = 1
        for t, numerator in enumerate(numerators[:, k].tolist()):
            if bound << decay_bits > 1 << BUFFER_BITS:
                spills[t, k] = True
                bound = (bound - 1 >> SPILL_BITS) + 1
            bound = (bound * denominator - 1) // numerator + 1
    num_rows = int(spills.sum())
    order = np.cumsum(spills).reshape(spills.shape) - 1
    slots = np.where(spills, order, num_rows).astype(np.int32)
    return SpillPlan(slots, num_rows, numerators, decay_bits)


def spill(
    buffer: jax.Array, tape: jax.Array, slots: jax.Array, num_rows: int
) -> tuple[jax.Array, jax.Array]:
    """Moves the low 32 bits of some accumulators' buffers to the tape.

    Args:
      buffer: int64 ``[K, P]``.
      tape: uint32 ``[num_rows + 1, P]``.
      slots: int32 ``[K]``, see ``SpillPlan``.
      num_rows: see ``SpillPlan``.
    """
    words = buffer.astype(jnp.uint32)  # the low bits
    for k in range(buffer.shape[0]):
        tape = jax.lax.dynamic_update_index_in_dim(tape, words[k], slots[k], 0)
    return jnp.where((slots < num_rows)[:, None], buffer >> SPILL_BITS, buffer), tape


def unspill(buffer: jax.Array, tape: jax.Array, slots: jax.Array, num_rows: int) -> jax.Array:
    """Undoes ``spill``, bit for bit."""
    words = jnp.stack(
        [
            jax.lax.dynamic_index_in_dim(tape, slots[k], 0, keepdims=False)
            for k in range(buffer.shape[0])
        ]
    )
    longer = (buffer << SPILL_BITS) | words.astype(jnp.int64)
    return jnp.where((slots < num_rows)[:, None], longer, buffer)
