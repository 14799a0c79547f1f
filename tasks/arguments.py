"""Checks of what tasks are given."""

import numbers
from collections.abc import Sequence


def check_at_least_one(**values: int | Sequence[int]) -> None:
    """Raises ``ValueError`` naming the value that is below 1, or no whole number."""
    for name, value in values.items():
        found = value if isinstance(value, Sequence) and not isinstance(value, str) else (value,)
        if not all(isinstance(x, numbers.Integral) and not isinstance(x, bool) for x in found):
            raise ValueError(f"`{name}` must be in whole numbers, got {value!r}.")
        if any(x < 1 for x in found):
            raise ValueError(f"`{name}` must be at least 1, got {value}.")
