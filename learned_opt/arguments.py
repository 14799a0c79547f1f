"""Checks of what optimizers are given: numbers in a range, sizes, flags, and the loss."""

import math
import numbers
from collections.abc import Sequence
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np


def check_between(lower: float, upper: float, **values: Any) -> None:
    """Raises ``ValueError`` unless every value, in float32, lies between the two, ends excluded."""
    span = f"above {lower}" if upper == math.inf else f"above {lower} and below {upper}"
    for name, value in values.items():
        if not np.float32(lower) < _single(value) < np.float32(upper):
            _refuse(name, f"a finite number {span} in float32", value)


def check_within(lower: float, upper: float, **values: Any) -> None:
    """Raises ``ValueError`` unless every value, in float32, lies between the two, ends included."""
    span = f"of at least {lower}" if upper == math.inf else f"from {lower} to {upper}"
    for name, value in values.items():
        single = _single(value)
        if not (np.float32(lower) <= single <= np.float32(upper) and np.isfinite(single)):
            _refuse(name, f"a finite number {span} in float32", value)


def check_count(least: int = 1, /, **values: Any) -> None:
    """Raises ``ValueError`` unless every value is a whole number of at least that."""
    for name, value in values.items():
        if not _is_whole(value) or value < least:
            _refuse(name, f"a whole number of at least {least}", value)


def check_sizes(**values: Any) -> None:
    """Raises ``ValueError`` unless every value is a sequence of whole numbers of at least 1."""
    for name, sizes in values.items():
        is_list = isinstance(sizes, Sequence) and not isinstance(sizes, str | bytes)
        if not is_list or not sizes or not all(map(_is_count, sizes)):
            _refuse(name, "one or more whole numbers of at least 1 in parentheses", sizes)


def check_one_of(options: Sequence[int | str], **values: Any) -> None:
    """Raises ``ValueError`` unless every value is one of these whole numbers or strings."""
    for name, value in values.items():
        if not (_is_whole(value) or isinstance(value, str)) or value not in options:
            _refuse(name, f"one of {', '.join(map(str, options))}", value)


def check_flag(**values: Any) -> None:
    """Raises ``ValueError`` unless every value is a bool."""
    for name, value in values.items():
        if not isinstance(value, bool | np.bool_):
            _refuse(name, "True or False", value)


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


def check_loss(value: Any) -> None:
    """Raises ``ValueError`` unless it is one real number, traced or not."""
    dtype = getattr(value, "dtype", None)
    if dtype is None:
        is_loss, given = type(value) in (int, float), _shown(value)
    else:
        is_loss = _is_real(dtype) and np.shape(value) == ()
        given = f"{dtype} of shape {np.shape(value)}"
    if not is_loss:
        raise ValueError(
            f"`value` must be the loss, one real number of shape (), got {given}; reduce it with "
            "`jnp.mean` or `jnp.sum`, a complex one with `jnp.real`."
        )


def _refuse(name: str, wanted: str, value: Any) -> NoReturn:
    raise ValueError(f"`{name}` must be {wanted}, got {_shown(value)}.")


def _shown(value: Any) -> str:
    """On one line, and not all of what is long."""
    shown = " ".join(repr(value).split())
    return shown if len(shown) <= 80 else f"{shown[:77]}..."


def _single(value: Any) -> np.float32:
    """The float32 of a real number that is known now; NaN of anything else."""
    dtype = getattr(value, "dtype", type(value))
    is_real = dtype in (int, float) or (isinstance(dtype, np.dtype) and _is_real(dtype))
    if not is_real or isinstance(value, jax.core.Tracer) or np.shape(value) != ():
        return np.float32(math.nan)
    try:
        with np.errstate(over="ignore", under="ignore"):
            single = np.float32(float(value))
    except OverflowError:  # A whole number beyond all floats.
        return np.float32(math.inf)
    # XLA takes smaller ones for 0.
    return np.float32(0) if abs(single) < np.finfo(np.float32).tiny else single


def _is_real(dtype: Any) -> bool:
    return jnp.issubdtype(dtype, jnp.floating) or jnp.issubdtype(dtype, jnp.integer)


def _is_count(value: Any) -> bool:
    return _is_whole(value) and value >= 1


def _is_whole(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)
