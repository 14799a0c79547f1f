"""JSON that every parser reads: it has no ``Infinity`` and no ``NaN``."""

import json
import math
from typing import Any


def dumps(value: Any, **options: Any) -> str:
    """``json.dumps`` with null in place of numbers that are not finite.

    NumPy and JAX scalars and arrays are written as numbers and nested lists.

    Args:
      options: those of ``json.dumps``.
    """
    return json.dumps(_finite(value), allow_nan=False, **options)


def _finite(value: Any) -> Any:
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return value
