"""Keeping XLA from fusing a computation with its surroundings."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def isolated(unknown: jax.Array, fn: Callable, *args) -> Any:
    """``fn(*args)``, compiled as a computation of its own, whatever surrounds it.

    So it rounds the same wherever it stands, and is computed once however many read it.
    (An optimization barrier does neither: it does not stop fusion.)

    Args:
      unknown: numbers of any shape that a run brings along, not known to the compiler.
    """
    shapes = jax.eval_shape(fn, *args)

    def never(*args):
        del args
        return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)

    return jax.lax.cond(_always(unknown.ravel()[0]), fn, never, *args)


@jax.custom_batching.custom_vmap
def _always(x: jax.Array) -> jax.Array:
    """True, but XLA cannot tell, so it keeps the branch.

    It sorts, because a loop that touches less than a kilobyte a step, and has no sort or the
    like, is compiled on a CPU as one function, where branches are fused with the rest after
    all. It looks at data, because the step number of a loop of one step is a constant.
    """
    low, high = jax.lax.sort(jnp.stack([x, jnp.zeros_like(x)]))
    return ~(low > high)


@_always.def_vmap
def _always_for_all(axis_size, in_batched, x):
    """Unbatched under ``vmap``, where a condition per element would compute both branches."""
    del axis_size, in_batched
    return _always(x[0]), False
