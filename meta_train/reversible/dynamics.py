"""Exactly reversible training: any optimizer that moves the weights by what its accumulators say.

    loss_t, g_t = value and gradient of loss at w_t
    a_{t+1} = decay * a_t + absorb(g_t)         exact product, see arithmetic.py
    w_{t+1} = w_t + move(a_{t+1})

Both sums are sums of integers. So ``w_t`` follows from ``(w_{t+1}, a_{t+1})``, then ``g_t``
from ``w_t``, then ``a_t``: the run can be walked back bit for bit, and the adjoint is
carried along, with the memory of one step plus the tape.

The gradient must come out the same, to the bit, in the forward and in the backward program.
XLA contracts and fuses by context, so each float computation whose bits matter is
``compiled_apart``: a branch of a conditional, compiled as a computation of its own.

Source: Maclaurin, Duvenaud, Adams 2015, Algorithms 2 and 3, generalized from SGD with
momentum. Differs: the printed Algorithm 2 mixes indices of before and after the update.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from meta_train.compiled_apart import always, branch_apart
from meta_train.reversible.arithmetic import (
    FixedPoint,
    SpillPlan,
    dequantize,
    divide,
    multiply,
    quantize,
    spill,
    unspill,
)
from meta_train.reversible.report import (
    NO_FAILURE,
    Failure,
    Report,
    code,
    decode,
    first,
    no_failure,
    poison,
)
from meta_train.reversible.resolution import Travel, add_stakes, no_stakes, of_stakes


def _its_loss(theta, loss: jax.Array, weights, x) -> jax.Array:
    del theta, weights, x
    return loss


class Dynamics(NamedTuple):
    """An optimizer and its loss, on flat weights ``[P]`` and ``K`` accumulators ``[K, P]``.

    ``theta`` and ``hyper`` are what one may differentiate with respect to: float pytrees,
    ``theta`` the same for all steps, ``hyper`` the step's slice of a sequence. ``x`` is the
    step's slice of the inputs (step number, key, ...), and is not differentiated.

    Attributes:
      loss: ``(theta, weights, x) -> scalar``, of which the gradient is taken.
      decay: ``(theta, hyper) -> [K or 1, P or 1]``, multiples of ``2^-decay_bits`` (``snap``).
      absorb: ``(theta, hyper, gradient, x) -> [K, P]``.
      move: ``(theta, hyper, accumulators, x) -> [P]``.
      observe: ``(theta, loss, weights, x) -> scalar``, what the step counts as in an
        objective: the loss before its update, or anything at the weights after it.
    """

    loss: Callable[[Any, jax.Array, Any], jax.Array]
    decay: Callable[[Any, Any], jax.Array]
    absorb: Callable[[Any, Any, jax.Array, Any], jax.Array]
    move: Callable[[Any, Any, jax.Array, Any], jax.Array]
    observe: Callable[[Any, jax.Array, jax.Array, Any], jax.Array] = _its_loss

    def of(self, to_theta: Callable[[Any], Any]) -> "Dynamics":
        """The same dynamics as functions of what ``to_theta`` maps to their theta."""

        def after(fn):
            return lambda theta, *args: fn(to_theta(theta), *args)

        return Dynamics(*map(after, self))


class Run(NamedTuple):
    """The end of a run, from which all of it can be recovered.

    Attributes:
      weights: int64 ``[P]``.
      accumulators: int64 ``[K, P]``.
      buffer: int64 ``[K, P]``.
      tape: uint32 ``[rows, P]``.
      losses: float ``[T]``.
      observed: float ``[T]``, what ``Dynamics.observe`` made of each step.
      travel: how much was added up; whether it stands out of the grid is for the caller.
      report: what failed first, if anything.
    """

    weights: jax.Array
    accumulators: jax.Array
    buffer: jax.Array
    tape: jax.Array
    losses: jax.Array
    observed: jax.Array
    travel: Travel
    report: Report


class Cotangents(NamedTuple):
    """Derivatives of an objective by the outcome of a run: ``[P]``, ``[K, P]`` and ``[T]``."""

    weights: jax.Array
    accumulators: jax.Array
    observed: jax.Array


class Gradients(NamedTuple):
    """Derivatives of an objective with respect to what went into a run."""

    theta: Any
    hypers: Any
    weights: jax.Array
    accumulators: jax.Array


class Recovered(NamedTuple):
    """The exact state that a reversal ended in, as in ``Run``; that of the start, buffer empty."""

    weights: jax.Array
    accumulators: jax.Array
    buffer: jax.Array


def push(dynamics: Dynamics, theta, hyper, weights, x):
    """Loss, gradient and what the accumulators absorb, at ``weights``."""
    loss, gradient = jax.value_and_grad(dynamics.loss, argnums=1)(theta, weights, x)
    return loss, gradient, dynamics.absorb(theta, hyper, gradient, x)


def run(
    dynamics: Dynamics,
    theta: Any,
    hypers: Any,
    inputs: Any,
    weights: jax.Array,
    accumulators: jax.Array,
    plan: SpillPlan,
    fixed: FixedPoint,
) -> Run:
    """Trains for as many steps as ``plan`` has, keeping what is needed to walk back.

    Compute: a training run, and an exact product per accumulator. Memory: 64 bits per
    weight, 128 per accumulator, the tape, and what one gradient needs.

    Args:
      hypers: leaves ``[T, ...]``.
      inputs: leaves ``[T, ...]``.
      weights: float ``[P]``; its dtype is that of all gradients. Rounded to the grid.
      accumulators: float ``[K, P]``, rounded to the grid.
    """
    precise = jax.config.jax_enable_x64  # type: ignore[attr-defined]
    dtype = weights.dtype
    num_steps, num_rows = plan.slots.shape[0], plan.num_rows

    def step(carry, xs):
        w, a, buffer, tape, travel, failures = carry
        t, hyper, x, slots, smallest = xs
        keep = always(w)
        buffer, tape = spill(buffer, tape, slots, num_rows)
        with jax.enable_x64(precise):
            numerator = _numerator(dynamics, theta, hyper, fixed)
        in_plan = jnp.all((numerator >= smallest[:, None]) & (numerator <= 1 << fixed.decay_bits))
        numerator = numerator.astype(jnp.int64)
        w_float = dequantize(w, fixed.weight_bits, dtype)
        loss, gradient, absorbed = branch_apart(
            keep, _in_precision(precise, push, dynamics), theta, hyper, w_float, x
        )
        a, buffer = multiply(a, buffer, numerator, fixed.decay_bits)
        a = a + quantize(absorbed, fixed.accumulator_bits)
        a_float = dequantize(a, fixed.accumulator_bits, dtype)
        moved = branch_apart(keep, _in_precision(precise, dynamics.move), theta, hyper, a_float, x)
        w = w + quantize(moved, fixed.weight_bits)
        w_after = dequantize(w, fixed.weight_bits, dtype)
        with jax.enable_x64(precise):
            observed = dynamics.observe(theta, loss, w_after, x)

        bad_a = _out_of_range(a, absorbed, fixed.accumulator_range)
        bad_w = _out_of_range(w[None], moved[None], fixed.weight_range)
        failures = jnp.minimum(failures, _failing(t, bad_a, bad_w, ~jnp.isfinite(gradient)))
        travel = Travel(
            travel.accumulators + jnp.abs(a_float),
            travel.moves + jnp.abs(moved),
            travel.absorbed | (absorbed != 0),
        )
        return (w, a, buffer, tape, travel, failures), (loss, observed, in_plan)

    with jax.enable_x64(True):
        w, a = _start(weights, accumulators, fixed)
        begin = (
            w,
            a,
            jnp.zeros(a.shape, jnp.int64),
            jnp.zeros((num_rows + 1, w.shape[0]), jnp.uint32),
            Travel(jnp.zeros(a.shape, dtype), jnp.zeros(w.shape, dtype), jnp.zeros(a.shape, bool)),
            # Out of range or NaN from the start: the grid would hold another number.
            _failing(
                jnp.int32(0),
                ~jnp.all(jnp.abs(accumulators) < fixed.accumulator_range, axis=0),
                ~(jnp.abs(weights) < fixed.weight_range),
            ),
        )
        steps = jnp.arange(num_steps, dtype=jnp.int32)
        smallest = jnp.asarray(plan.numerators, jnp.int32)
        end, (losses, observed, in_plan) = jax.lax.scan(
            step, begin, (steps, hypers, inputs, jnp.asarray(plan.slots), smallest)
        )
        by_step = jnp.where(
            in_plan,
            jnp.where(
                jnp.isfinite(losses) & jnp.isfinite(observed),
                NO_FAILURE,
                code(steps, Failure.LOSS),
            ),
            code(steps, Failure.DECAY),
        )
        return Run(*end[:4], losses, observed, end[4], decode(by_step, end[5]))


def reverse(
    dynamics: Dynamics,
    theta: Any,
    hypers: Any,
    inputs: Any,
    weights: jax.Array,
    accumulators: jax.Array,
    plan: SpillPlan,
    fixed: FixedPoint,
    outcome: Run,
    cotangents: Cotangents,
) -> tuple[Gradients, Report, Recovered]:
    """Walks a run back to its start, and derivatives with it.

    The exact gradient of the fixed-point run, as if rounding were the identity. Every
    recomputed loss is compared with the recorded one, and the state in the end with the
    initial state and an empty buffer, bit for bit; on a mismatch, or where too much of the
    objective hangs on rounding, every gradient is NaN and the report says why. Compute: a
    gradient, its reverse-over-reverse derivative and the pullbacks of ``absorb`` and ``move``
    per step. Memory: that of ``run``, and one gradient.

    Args:
      outcome: of ``run`` with the same arguments.
      cotangents: of its final weights, final accumulators and observed losses.

    Returns:
      Gradients, the report of the run and the reversal together, and where this ended.
    """
    precise = jax.config.jax_enable_x64  # type: ignore[attr-defined]
    dtype = weights.dtype
    num_steps, num_rows = plan.slots.shape[0], plan.num_rows

    def step(carry, xs):
        w, a, buffer, d_w, d_a, d_theta, stakes = carry
        t, hyper, x, slots, d_observed = xs
        keep = always(w)
        w_after = dequantize(w, fixed.weight_bits, dtype)
        a_float = dequantize(a, fixed.accumulator_bits, dtype)
        moved = branch_apart(keep, _in_precision(precise, dynamics.move), theta, hyper, a_float, x)
        w = w - quantize(moved, fixed.weight_bits)
        w_float = dequantize(w, fixed.weight_bits, dtype)
        loss, gradient, absorbed = branch_apart(
            keep, _in_precision(precise, push, dynamics), theta, hyper, w_float, x
        )
        a = a - quantize(absorbed, fixed.accumulator_bits)
        with jax.enable_x64(precise):
            numerator = _numerator(dynamics, theta, hyper, fixed)
        a, buffer = divide(a, buffer, numerator.astype(jnp.int64), fixed.decay_bits)
        buffer = unspill(buffer, outcome.tape, slots, num_rows)
        a_before = dequantize(a, fixed.accumulator_bits, dtype)
        with jax.enable_x64(precise):
            _, pull = jax.vjp(
                lambda theta, loss, w: dynamics.observe(theta, loss, w, x), theta, loss, w_after
            )
            theta_observed, d_loss, w_observed = pull(d_observed)
            d_moved = d_w + w_observed
            d_theta_t, d_hyper, d_w, d_a, a_move = _adjoint(
                dynamics,
                theta,
                hyper,
                x,
                w_float,
                gradient,
                a_before,
                a_float,
                d_moved,
                d_a,
                d_loss,
            )
            d_theta = _sum(d_theta, d_theta_t, theta_observed)
            decay = numerator * 2.0**-fixed.decay_bits
            stakes = add_stakes(stakes, t, fixed, decay, a_float, absorbed, moved, d_moved, a_move)
        return (w, a, buffer, d_w, d_a, d_theta, stakes), (d_hyper, loss)

    with jax.enable_x64(True):
        begin = (
            outcome.weights,
            outcome.accumulators,
            outcome.buffer,
            cotangents.weights,
            cotangents.accumulators,
            jax.tree.map(jnp.zeros_like, theta),
            no_stakes(dtype),
        )
        steps = jnp.arange(num_steps, dtype=jnp.int32)
        xs = (steps, hypers, inputs, jnp.asarray(plan.slots), cotangents.observed)
        (w, a, buffer, d_w, d_a, d_theta, stakes), (d_hypers, losses) = jax.lax.scan(
            step, begin, xs, reverse=True
        )
        replayed = losses == outcome.losses
        another = no_failure()._replace(
            failure=jnp.where(jnp.all(replayed), Failure.NONE, Failure.REPLAY).astype(jnp.int32),
            step=jnp.max(jnp.where(replayed, -1, steps)),
        )
        w_start, a_start = _start(weights, accumulators, fixed)
        exact = jnp.all(w == w_start) & jnp.all(a == a_start) & jnp.all(buffer == 0)
        started = no_failure()._replace(
            failure=jnp.where(exact, Failure.NONE, Failure.START).astype(jnp.int32)
        )
        report = first(first(first(outcome.report, another), started), of_stakes(stakes))
        gradients = poison(report.ok, Gradients(d_theta, d_hypers, d_w, d_a))
        return gradients, report, Recovered(w, a, buffer)


def float_step(
    dynamics: Dynamics, theta, hyper, x, weights: jax.Array, accumulators: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The same step in ordinary floating point: ``(weights, accumulators, observed loss)``."""
    loss, _, absorbed = push(dynamics, theta, hyper, weights, x)
    accumulators = dynamics.decay(theta, hyper) * accumulators + absorbed
    weights = weights + dynamics.move(theta, hyper, accumulators, x)
    return weights, accumulators, dynamics.observe(theta, loss, weights, x)


def _adjoint(dynamics, theta, hyper, x, weights, gradient, a_before, a_after, d_w, d_a, d_loss):
    """One step of the adjoint: from derivatives after the step to derivatives before it.

    Also returns ``a_move``, what of the accumulators' derivative comes from this move alone.
    """
    _, pull_move = jax.vjp(lambda *args: dynamics.move(*args, x), theta, hyper, a_after)
    theta_move, hyper_move, a_move = pull_move(d_w)
    d_a = d_a + a_move
    _, pull_absorb = jax.vjp(lambda *args: dynamics.absorb(*args, x), theta, hyper, gradient)
    theta_absorb, hyper_absorb, d_gradient = pull_absorb(d_a)
    theta_loss, w_loss = _pull_gradient(dynamics, theta, weights, x, d_loss, d_gradient)
    decay, pull_decay = jax.vjp(
        lambda *args: jnp.broadcast_to(dynamics.decay(*args), a_before.shape), theta, hyper
    )
    theta_decay, hyper_decay = pull_decay(d_a * a_before)
    d_theta = _sum(theta_move, theta_absorb, theta_decay, theta_loss)
    d_hyper = _sum(hyper_move, hyper_absorb, hyper_decay)
    return d_theta, d_hyper, d_w + w_loss, decay * d_a, a_move


def _pull_gradient(dynamics, theta, weights, x, d_loss, d_gradient):
    """The derivatives by theta and weights of the loss and of the gradient that training takes.

    Backwards through that gradient itself. (Its derivative along ``d_gradient`` would be the same
    by symmetry if it were the gradient of a smooth function: not if the loss clips it, stops
    it, passes it straight through a rounding, or otherwise makes its own.)
    """
    try:
        _, pull = jax.vjp(
            lambda theta, w: jax.value_and_grad(dynamics.loss, argnums=1)(theta, w, x),
            theta,
            weights,
        )
        return pull((d_loss, d_gradient))
    except (ValueError, NotImplementedError) as error:
        raise ValueError(
            "`loss` must have a gradient that can itself be differentiated backwards, got one that "
            "cannot; where it defines its own (`jax.custom_vjp`), write both of its rules in "
            f"differentiable operations, loops as `jax.lax.scan`: {error}"
        ) from error


def _sum(*trees):
    return jax.tree.map(lambda *parts: sum(parts), *trees)


def _numerator(dynamics, theta, hyper, fixed):
    """Decays are multiples of ``2^-decay_bits``, so this is exact; float ``[K or 1, P or 1]``."""
    return jnp.round(dynamics.decay(theta, hyper) * 2.0**fixed.decay_bits)


def _start(weights, accumulators, fixed):
    return (
        quantize(weights, fixed.weight_bits),
        quantize(accumulators, fixed.accumulator_bits),
    )


def _in_precision(precise: bool, fn: Callable, *leading) -> Callable:
    """``fn`` traced in the caller's precision, although the state around it is 64 bits wide."""

    def wrapped(*args):
        with jax.enable_x64(precise):
            return fn(*leading, *args)

    return wrapped


def _failing(t, bad_accumulators, bad_weights, bad_gradient=False) -> jax.Array:
    """The code of each parameter's failure at step ``t``, or ``NO_FAILURE``, int32 ``[P]``."""
    cause = jnp.where(bad_accumulators, Failure.ACCUMULATOR, Failure.WEIGHT)
    cause = jnp.where(bad_gradient, Failure.GRADIENT, cause).astype(jnp.int32)
    return jnp.where(bad_accumulators | bad_weights, code(t, cause), NO_FAILURE).astype(jnp.int32)


def _out_of_range(state, added, limit):
    """Which parameters' state or increment left the range, bool ``[P]``.

    Both terms of a sum are below 2^62 (or reported), so the sum has not wrapped unseen.
    """
    inside = (jnp.abs(added) < limit) & (state < 1 << 62) & (state > -(1 << 62))
    return ~jnp.all(inside, axis=0)
