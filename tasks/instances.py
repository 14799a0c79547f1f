"""What an instance of a family has drawn: one of several options, under each name."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tasks.base import Instance


class Options:
    """Named options, of each of which an instance has one, drawn with equal probability.

    An instance is ``{name: index}`` of the names that have several options, and ``()`` if none
    has, so a task without a choice is one problem.
    """

    def __init__(self, options: Mapping[str, Sequence[Any]]):
        self._names = [name for name, values in options.items() if len(values) > 1]
        self._options = options

    def sample(self, key: jax.Array) -> Instance:
        """Draws an instance: int32 scalars."""
        keys = jax.random.split(key, len(self._names)) if len(self._names) > 1 else [key]
        return {
            name: jax.random.randint(keys[i], (), 0, len(self._options[name]))
            for i, name in enumerate(self._names)
        } or ()

    def index(self, instance: Instance, name: str) -> jax.Array | int:
        """Which option of ``name`` the instance has."""
        return instance[name] if name in self._names else 0

    def value(self, instance: Instance, name: str, values: Sequence[Any] | np.ndarray) -> Any:
        """The one of ``values``, a number or an array an option, that belongs to the instance."""
        if name not in self._names:
            return values[0]
        return jnp.asarray(values)[instance[name]]
