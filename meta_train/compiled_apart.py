"""Keeping XLA from fusing a computation with its surroundings."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def compiled_apart(fn: Callable, *args, witness: jax.Array) -> Any:
    """``fn(*args)``, compiled as a computation of its own, whatever surrounds it.

    So it rounds the same wherever it stands, and is computed once however many read it.
    (An optimization barrier does neither: it does not stop fusion.)

    Args:
      witness: numbers of any shape that come with the run, so that XLA cannot know them: of the
        state, for example. (A loop's own counter will not do: in a loop of one step it is a
        constant.)
    """
    return branch_apart(always(witness), fn, *args)


def branch_apart(condition: jax.Array, fn: Callable, *args) -> Any:
    """``compiled_apart`` under a condition at hand: a bool scalar that is true, unknown to XLA."""
    fn = jax.jit(fn)  # Traced once, for its shapes and as a branch.
    shapes = jax.eval_shape(fn, *args)

    def never(*args):
        del args
        return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)

    return jax.lax.cond(condition, fn, never, *args)


def always(x: jax.Array) -> jax.Array:
    """True, but XLA cannot tell, so it keeps a branch under this condition.

    It sorts, because a loop that touches less than a kilobyte a step, and has no sort or the
    like, is compiled on a CPU as one function, where branches are fused with the rest after
    all. One such condition in a loop's body protects all of it.
    """
    return _always(x.ravel()[0])


@jax.custom_batching.custom_vmap
def _always(x: jax.Array) -> jax.Array:
    low, high = jax.lax.sort(jnp.stack([x, jnp.zeros_like(x)]))
    return ~(low > high)


@_always.def_vmap
def _always_for_all(axis_size, in_batched, x):
    """Unbatched under ``vmap``, where a condition per element would compute both branches."""
    del axis_size, in_batched
    return _always(x[0]), False
