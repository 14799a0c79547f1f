"""Checks of what the constructors are given: numbers in a range, and sizes."""

import math
import numbers
from collections.abc import Sequence
from typing import Any

import jax


def check_between(lower: float, upper: float, **values: Any) -> None:
    """Raises ``ValueError`` unless every value is a number strictly between the two."""
    for name, value in values.items():
        if not _is_number(value) or not (lower < value < upper and math.isfinite(value)):
            span = f"between {lower} and {upper}" if upper < math.inf else f"above {lower}"
            raise ValueError(f"`{name}` must be a finite number {span}, got {value!r}.")


def check_count(**values: Any) -> None:
    """Raises ``ValueError`` unless every value is a whole number of at least 1."""
    for name, value in values.items():
        if not _is_count(value):
            raise ValueError(f"`{name}` must be a whole number of at least 1, got {value!r}.")


def check_sizes(**values: Any) -> None:
    """Raises ``ValueError`` unless every value is a sequence of whole numbers of at least 1."""
    for name, sizes in values.items():
        is_list = isinstance(sizes, Sequence) and not isinstance(sizes, str)
        if not is_list or not sizes or not all(map(_is_count, sizes)):
            raise ValueError(
                f"`{name}` must be one or more whole numbers of at least 1, got {sizes!r}."
            )


def check_num_tensors(num_tensors: int, params: Any) -> None:
    """Raises ``ValueError`` unless the parameters have so many leaves (or none: nothing to do)."""
    given = len(jax.tree.leaves(params))
    if given not in (0, num_tensors):
        raise ValueError(
            f"`num_tensors` must be the number of leaves of the parameters, got "
            f"num_tensors={num_tensors} for parameters of {given}; make the optimizer "
            f"with num_tensors={given}."
        )


def check_given(optimizer: str, params: Any, value: Any) -> None:
    """Raises ``ValueError`` unless an update was given the parameters and the loss."""
    if params is None or value is None:
        raise ValueError(
            f"The {optimizer} optimizer reads the parameters and the loss: call "
            "`update(grads, state, params, value=loss)`."
        )


def _is_number(value: Any) -> bool:
    is_scalar = isinstance(value, numbers.Real) or getattr(value, "shape", None) == ()
    return is_scalar and not isinstance(value, bool)


def _is_count(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool) and int(value) >= 1
