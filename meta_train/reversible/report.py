"""What a run or a reversal reports: that it is exact, or what failed, where, what to change."""

import enum
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Failure(enum.IntEnum):
    """What went wrong first."""

    NONE = 0
    DECAY = 1
    LOSS = 2
    GRADIENT = 3
    ACCUMULATOR = 4
    WEIGHT = 5
    REPLAY = 6
    START = 7
    UNDERFLOW = 8


CAUSES = {
    Failure.DECAY: "a decay (momentum) was outside [`momentum_floor`, 1], for which no tape was "
    "planned; lower `momentum_floor` or clip the momenta.",
    Failure.LOSS: "the loss was not finite; lower the learning rate before this step, or mend the "
    "loss.",
    Failure.GRADIENT: "the gradient was not finite although the loss was; look for a derivative "
    "that is infinite (a square root or norm at zero).",
    Failure.ACCUMULATOR: "the velocity (or another accumulator) left the fixed-point range or "
    "is not finite; lower the learning rate, clip the gradient, or lower `accumulator_bits`.",
    Failure.WEIGHT: "the weights left the fixed-point range or are not finite; mend or lower the "
    "learning rate of this step, or lower `weight_bits`.",
    Failure.REPLAY: "the reversal recomputed another loss than the run had recorded; the two "
    "programs rounded differently (on a GPU, set XLA_FLAGS=--xla_gpu_deterministic_ops=true), or "
    "the loss is not a deterministic function of its arguments.",
    Failure.START: "the reversal did not end in the initial state bit for bit; the two programs "
    "rounded differently (on a GPU, set XLA_FLAGS=--xla_gpu_deterministic_ops=true), or the loss "
    "is not a deterministic function of its arguments.",
    Failure.UNDERFLOW: "what training adds up is lost in the rounding to the fixed-point grid, so "
    "this is not the run that floats would make. Where gradients are small, scale the loss up and "
    "the learning rates down, or raise `accumulator_bits`; where learning rates are small, raise "
    "`weight_bits`; both lower the range. (What is exactly 0, rates or gradients, is no failure.)",
}


class Report(NamedTuple):
    """The first failure of a run; int32 scalars, so that reports live inside ``jit`` and ``vmap``.

    Attributes:
      failure: a ``Failure``.
      step: where, from 0; -1 if no step is to blame.
      parameter: index into the flattened parameters; -1 if no single one is to blame.
    """

    failure: jax.Array
    step: jax.Array
    parameter: jax.Array

    @property
    def ok(self) -> jax.Array:
        return self.failure == Failure.NONE


NO_FAILURE = 2**31 - 1


def code(step: jax.Array, failure) -> jax.Array:
    """A failure at a step as an int32: earlier steps first, then causes before consequences."""
    return step * len(Failure) + failure


def decode(by_step: jax.Array, by_parameter: jax.Array) -> Report:
    """The first of all failures.

    Args:
      by_step: codes, or ``NO_FAILURE``, for which no single parameter is to blame.
      by_parameter: codes, or ``NO_FAILURE``, ``[P]``.
    """
    parameter = jax.lax.argmin(by_parameter, 0, jnp.int32)
    of_step, of_parameter = jnp.min(by_step), by_parameter[parameter]
    earliest = jnp.minimum(of_step, of_parameter)
    none = earliest == NO_FAILURE
    return Report(
        jnp.where(none, Failure.NONE, earliest % len(Failure)).astype(jnp.int32),
        jnp.where(none, -1, earliest // len(Failure)),
        jnp.where(of_parameter < of_step, parameter, -1),
    )


def no_failure() -> Report:
    """Nothing has gone wrong yet."""
    return Report(jnp.int32(Failure.NONE), jnp.int32(-1), jnp.int32(-1))


def first(earlier: Report, later: Report) -> Report:
    """``earlier`` if that failed, else ``later``."""
    return jax.tree.map(lambda a, b: jnp.where(earlier.ok, b, a), earlier, later)


def poison(ok: jax.Array, tree: Any) -> Any:
    """``tree``, or NaN in every place unless ``ok``."""
    return jax.tree.map(lambda x: jnp.where(ok, x, jnp.full_like(x, jnp.nan)), tree)


def explain(report: Report, params: Any = None) -> str:
    """A sentence for a (concrete) report: what failed, at which step and parameter, what to change.

    Args:
      report: scalars, not a batch; index a batch of reports first.
      params: the parameters, to name the offending one by its path.
    """
    failure = Failure(int(report.failure))
    if failure == Failure.NONE:
        return "exact: no failure."
    if failure == Failure.UNDERFLOW:
        where = f"from step {int(report.step)}" if report.step >= 0 else "over the whole run"
        if report.parameter >= 0:
            where += f", tensor of parameter {_name(int(report.parameter), params)}"
        return f"underflow failure {where}: {CAUSES[failure]}"
    where = f"at step {int(report.step)}" if report.step >= 0 else "after the last step back"
    if report.parameter >= 0:
        where += f", parameter {_name(int(report.parameter), params)}"
    return f"{failure.name.lower()} failure {where}: {CAUSES[failure]}"


def raise_if_failed(report: Report, params: Any = None) -> None:
    """Raises ``FloatingPointError`` with ``explain``'s sentence unless all went well."""
    if not report.ok:
        raise FloatingPointError(explain(report, params))


def _name(index: int, params: Any) -> str:
    if params is None:
        return str(index)
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if index < leaf.size:
            return f"{jax.tree_util.keystr(path) or 'params'} at flat index {index}"
        index -= leaf.size
    return str(index)
