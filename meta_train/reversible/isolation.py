"""Keeping XLA from fusing a computation with its surroundings."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def isolated(natural: jax.Array, fn: Callable, *args) -> Any:
    """``fn(*args)``, compiled as a computation of its own, whatever surrounds it.

    So it rounds the same wherever it stands, and is computed once however many read it.
    (An optimization barrier does neither: it does not stop fusion.)

    Args:
      natural: a traced integer that is never negative. XLA cannot tell, so it keeps the
        branch. It must not be batched by ``vmap`` where equal rounding matters.
    """
    shapes = jax.eval_shape(fn, *args)

    def never(*args):
        del args
        return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)

    return jax.lax.cond(natural >= 0, fn, never, *args)
