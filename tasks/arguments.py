"""Checks of what tasks are given, each in one sentence, before anything is computed."""

import math
import numbers
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Span(NamedTuple):
    """Finite numbers from ``lower`` to ``upper``, in float32; the lower end may be excluded."""

    lower: float
    upper: float = math.inf
    excluded: bool = False

    def holds(self, value: Any) -> bool:
        single = _single(value)
        above = single > self.lower if self.excluded else single >= self.lower
        return bool(above and single <= np.float32(self.upper) and np.isfinite(single))

    def __str__(self) -> str:
        if self.upper < math.inf and self.excluded:
            return f"above {self.lower} and at most {self.upper:g}"
        if self.upper < math.inf:
            return f"from {self.lower} to {self.upper}"
        return f"above {self.lower}" if self.excluded else f"of at least {self.lower}"


ABOVE_ZERO, AT_LEAST_ZERO = Span(0, excluded=True), Span(0)
# Beyond these, losses of float32 parameters overflow at the start.
SCALES, NOISES = Span(0, 1e3, excluded=True), Span(0, 1e15)
SHARE = Span(0, 1)


def check_number(span: Span, **values: Any) -> None:
    """Raises ``ValueError`` unless every value is a number of ``span``."""
    _check(span.holds, f"a finite number {span}", values)


def check_numbers(span: Span, **values: Any) -> None:
    """Raises ``ValueError`` unless every value is a sequence, or an empty one, of such numbers."""
    _check(_all(span.holds), f"finite numbers {span} in parentheses, or (),", values)


def check_count(least: int = 1, **values: Any) -> None:
    """Raises ``ValueError`` unless every value is a whole number of at least ``least``."""
    _check(lambda x: _is_whole(x) and x >= least, f"a whole number of at least {least}", values)


def check_counts(**values: Any) -> None:
    """Raises ``ValueError`` unless every value is a sequence of whole numbers of at least 1."""
    holds = _all(lambda x: _is_whole(x) and x >= 1)
    _check(holds, "whole numbers of at least 1 in parentheses", values)


def check_flag(**values: Any) -> None:
    """Raises ``ValueError`` unless every value is a bool."""
    _check(lambda x: isinstance(x, bool | np.bool_), "True or False", values)


def check_name(options: Iterable[str], **values: Any) -> None:
    """Raises ``ValueError`` unless every value is one of these names."""
    names = list(options)
    _check(lambda x: isinstance(x, str) and x in names, f"one of {', '.join(names)}", values)


def check_names(options: Iterable[str] | None, **values: Any) -> None:
    """Raises ``ValueError`` unless every value is different names with commas between.

    Args:
      options: all names there are; None: any.
    """

    def holds(value):
        if not isinstance(value, str):
            return False
        found = value.split(",")
        known = all(found) if names is None else set(found) <= set(names)
        return known and len(set(found)) == len(found)

    names = options if options is None else list(options)
    known = "a name" if names is None else f"one of {', '.join(names)}"
    _check(holds, f"{known}, or several different ones with commas between", values)


def check_instance(kind: type, **values: Any) -> None:
    """Raises ``ValueError`` unless every value is a ``kind``."""
    _check(lambda x: isinstance(x, kind), f"a {kind.__name__}", values)


def check_instances(kind: type, **values: Any) -> None:
    """Raises ``ValueError`` unless every value is a sequence of ``kind``."""
    holds = _all(lambda x: isinstance(x, kind))
    _check(holds, f"values of type {kind.__name__} in parentheses", values)


def _all(holds: Callable[[Any], bool]) -> Callable[[Any], bool]:
    def all_hold(values):
        is_array = isinstance(values, np.ndarray) and values.ndim == 1
        is_sequence = isinstance(values, Sequence) and not isinstance(values, str | bytes)
        return (is_array or is_sequence) and all(map(holds, values))

    return all_hold


def _single(value: Any) -> np.float32:
    """The float32 of a real number that is known now; NaN of anything else."""
    dtype = getattr(value, "dtype", type(value))
    is_real = dtype in (int, float) or (isinstance(dtype, np.dtype) and _is_real(dtype))
    if not is_real or isinstance(value, jax.core.Tracer) or np.shape(value) != ():
        return np.float32(math.nan)
    try:
        with np.errstate(over="ignore", under="ignore"):
            return np.float32(float(value))
    except OverflowError:  # A whole number beyond all floats.
        return np.float32(math.inf)


def _is_real(dtype: Any) -> bool:
    return jnp.issubdtype(dtype, jnp.floating) or jnp.issubdtype(dtype, jnp.integer)


def _is_whole(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _check(holds: Callable[[Any], bool], wanted: str, values: dict[str, Any]) -> None:
    for name, value in values.items():
        if not holds(value):
            shown = " ".join(repr(value).split())  # On one line, and not all of what is long.
            shown = shown if len(shown) <= 80 else f"{shown[:77]}..."
            raise ValueError(f"`{name}` must be {wanted}, got {shown}.")
