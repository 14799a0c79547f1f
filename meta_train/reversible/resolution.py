"""Whether what a run adds up stands out of the grid it is rounded to.

The adjoint is computed in floats; the state is what rounding can spoil. A multiplication by a
decay ``n / 2^decay_bits`` exchanges the low digits of an accumulator with its buffer, so it errs
by up to ``n`` units, and every addition by half a unit. Where these errors are above ``TOLERANCE``
of what they are added to, summed over the run and over all parameters that share a learning rate,
the run is another one than the same in floats, and the derivatives by that rate are noise.

Sums, so that small entries among large ones, and a run that has converged after it moved, count
as the little they contribute; what is exactly zero has no error and counts nothing.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from meta_train.reversible.arithmetic import FixedPoint, dequantize, quantize
from meta_train.reversible.report import Failure, Report

TOLERANCE = 2.0**-10


class Travel(NamedTuple):
    """What a run adds up, parameter by parameter, as sums of magnitudes over its steps.

    Attributes:
      accumulators: float ``[K, P]``, of the accumulators after each step.
      moves: float ``[P]``, of the moves of the weights.
      absorbed: bool ``[K, P]``, whether the accumulators were given anything: if they are zero all
        the same, the grid has rounded away all of it.
    """

    accumulators: jax.Array
    moves: jax.Array
    absorbed: jax.Array


def accumulator_noise(decay: jax.Array, fixed: FixedPoint) -> jax.Array:
    """How far a step leaves accumulators from where they would be without a grid."""
    digits = jnp.where(decay < 1.0, decay * 2.0**fixed.decay_bits, 0.0)
    return (digits + 0.5) * 2.0**-fixed.accumulator_bits


def move_noise(fixed: FixedPoint) -> float:
    """The mean error of a rounded move."""
    return 0.25 * 2.0**-fixed.weight_bits


class Stakes(NamedTuple):
    """How much more of an objective hangs on rounding than may.

    To first order, in magnitudes, by what the adjoint says of each parameter at each step.

    Attributes:
      excess: float, what the errors of accumulators and moves may change, less ``TOLERANCE`` of
        what all moves together change. In one number, as every sum costs the walk back time.
      step: int32, the first step at which it is above 0, -1 if none.
    """

    excess: jax.Array
    step: jax.Array


def no_stakes(dtype) -> Stakes:
    """Before the walk back."""
    return Stakes(jnp.zeros((), dtype), jnp.int32(-1))


def add_stakes(
    stakes: Stakes, t, fixed, decay, accumulators, absorbed, moved, d_moved, d_accumulators
):
    """With those of step ``t``, walking back; derivatives are of the objective by this move."""
    # Zero with nothing absorbed has no error; zero after a gradient was rounded away.
    nothing = (accumulators == 0) & (absorbed == 0)
    noise = jnp.where(nothing, 0.0, accumulator_noise(decay, fixed))
    slip = jnp.where(moved == 0, 0.0, move_noise(fixed))
    errors = jnp.sum(jnp.abs(d_accumulators) * noise, axis=0)
    excess = jnp.sum(errors + jnp.abs(d_moved) * (slip - TOLERANCE * jnp.abs(moved)))
    return Stakes(stakes.excess + excess, jnp.where(excess > 0, t, stakes.step))


def of_stakes(stakes: Stakes) -> Report:
    """The report of an episode of which the objective hangs on rounding."""
    return underflow(stakes.excess > 0, jnp.int32(-1), stakes.step)


def underflow(failed: jax.Array, parameter: jax.Array, step: jax.Array) -> Report:
    """The report of a run that is rounded away, if it is."""
    return Report(
        jnp.where(failed, Failure.UNDERFLOW, Failure.NONE).astype(jnp.int32),
        jnp.where(failed, step, -1).astype(jnp.int32),
        jnp.where(failed, parameter, -1).astype(jnp.int32),
    )


def of_descent(
    params: Any,
    velocity: Any,
    learning_rates: Any,
    momenta: Any,
    travel: Travel,
    num_steps: int,
    fixed: FixedPoint,
) -> Report:
    """Of SGD with momentum: the tensor that rounding spoils most, by its first parameter.

    Both the velocities and the moves must stand out, and the start must be on the grid up to
    what the run adds to it. A learning rate of 0 moves nothing, so loses no moves; the derivative
    by it is as good as the velocities.

    Args:
      learning_rates, momenta: prefixes of ``params``, with leaves ``[T or 1, ...]``.
    """
    rates, treedef = jax.tree.flatten(learning_rates)
    group_of = jax.tree.leaves(_like(jax.tree.unflatten(treedef, range(len(rates))), params))
    tensors, speeds = jax.tree.leaves(params), jax.tree.leaves(velocity)
    decays = jax.tree.leaves(_like(momenta, params))
    offsets = np.cumsum([0, *(tensor.size for tensor in tensors)])
    # Error and size of: velocities, moves, initial velocities, initial weights.
    rows = []
    for i, (w, v, m) in enumerate(zip(tensors, speeds, decays, strict=True)):
        part = slice(offsets[i], offsets[i + 1])
        speed = travel.accumulators[0, part].reshape(w.shape)
        given = travel.absorbed[0, part].reshape(w.shape)
        moved = travel.moves[part].reshape(w.shape)
        rate = jnp.abs(_over(rates[group_of[i]], w))
        noise = accumulator_noise(_over(m, w), fixed)
        slip = jnp.where(rate == 0, 0.0, rate * noise + move_noise(fixed))
        rows.append(
            [
                jnp.sum(jnp.where(given | (speed > 0), _total(noise, num_steps), 0.0)),
                jnp.sum(speed),
                jnp.sum(jnp.where(moved > 0, _total(slip, num_steps), 0.0)),
                jnp.sum(moved),
                _rounding(v, fixed.accumulator_bits),
                jnp.sum(jnp.abs(v)) + jnp.sum(speed),
                _rounding(w, fixed.weight_bits),
                jnp.sum(jnp.abs(w)) + jnp.sum(moved),
            ]
        )
    table = jnp.stack([jnp.stack(row) for row in rows])
    errors, sizes = table[:, ::2], table[:, 1::2]
    # A group is what shares one learning rate.
    groups = np.asarray(group_of)[:, None] == np.asarray(group_of)
    lost = groups.astype(table.dtype) @ errors > TOLERANCE * (groups.astype(table.dtype) @ sizes)
    worst = jnp.argmax(jnp.max(jnp.where(lost & (errors > 0), errors / sizes, 0.0), axis=1))
    return underflow(jnp.any(lost), jnp.asarray(offsets[:-1])[worst], jnp.int32(-1))


def _like(prefix, tree):
    return jax.tree.map(lambda x, part: jax.tree.map(lambda _: x, part), prefix, tree)


def _over(schedule, tensor):
    """``[T or 1, ...]``, that broadcasts against the tensor."""
    return schedule.reshape(schedule.shape + (1,) * (tensor.ndim + 1 - schedule.ndim))


def _total(by_step, num_steps):
    return jnp.mean(by_step, axis=0) * num_steps


def _rounding(x, bits):
    """How much the grid takes from ``x``."""
    with jax.enable_x64(True):
        nearest = dequantize(quantize(x, bits), bits, x.dtype)
    return jnp.sum(jnp.abs(x - nearest))
