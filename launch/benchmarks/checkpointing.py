"""Backpropagation through a loop with few stored states, to measure reversible training against."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Step = Callable[[Any, jax.Array], Any]


class Schedule(NamedTuple):
    """An optimal order of forward and backward steps, as arrays ``[items]``.

    Item ``i``: take the state in slot ``restore``, which is that of step ``begin``; advance
    ``advance`` steps; put the state in slot ``save`` (a spare slot if it is not needed);
    and if ``back``, step back across the step it stands at.
    """

    restore: np.ndarray
    begin: np.ndarray
    advance: np.ndarray
    save: np.ndarray
    back: np.ndarray


def binomial_schedule(num_steps: int, num_slots: int) -> Schedule:
    """The order with the fewest forward steps that holds ``num_slots`` states, the first included.

    Source: Griewank 1992 (treeverse), Griewank and Walther 2000 (revolve); the split points
    come from dynamic programming instead of their closed form.
    """
    cost = np.zeros((num_slots + 1, num_steps + 1))
    split = np.ones((num_slots + 1, num_steps + 1), np.int64)
    lengths = np.arange(num_steps + 1)
    cost[1] = lengths * (lengths - 1) / 2
    for slots in range(2, num_slots + 1):
        for length in range(2, num_steps + 1):
            middle = lengths[1:length]
            total = middle + cost[slots - 1, length - middle] + cost[slots, middle]
            best = int(np.argmin(total))
            cost[slots, length], split[slots, length] = total[best], middle[best]

    items = []
    pending = [(0, num_steps, 0)]  # first step, last step, slot that holds the first state
    while pending:
        begin, end, slot = pending.pop()
        free = num_slots - slot  # this slot and those above it
        if free == 1 or end - begin == 1:
            for last in range(end - 1, begin - 1, -1):
                items.append((slot, begin, last - begin, num_slots, True))
            continue
        advance = int(split[free, end - begin])
        items.append((slot, begin, advance, slot + 1, False))
        pending.append((begin, begin + advance, slot))
        pending.append((begin + advance, end, slot + 1))
    return Schedule(*(np.array(column, np.int32) for column in zip(*items, strict=True)))


def binomial_vjp(
    step: Callable[[Any, Any, jax.Array], Any],
    theta: Any,
    state: Any,
    schedule: Schedule,
    objective: Callable[[Any], jax.Array],
) -> tuple[Any, Any]:
    """Gradients of ``objective(final state)`` by ``theta`` and the first state.

    Compute: the schedule's forward steps and one backward step each. Memory: its slots, and
    the residuals of one step.

    Args:
      step: ``(theta, state, t) -> state``.
      state: the first state.
    """
    num_slots = int(schedule.save.max())
    stack = jax.tree.map(
        lambda x: jnp.zeros((num_slots + 1, *x.shape), x.dtype).at[0].set(x), state
    )

    def item(carry, xs):
        slots, d_state, d_theta, started = carry
        current = jax.tree.map(lambda s: s[xs.restore], slots)
        current = jax.lax.fori_loop(
            xs.begin, xs.begin + xs.advance, lambda t, s: step(theta, s, t), current
        )
        slots = jax.tree.map(lambda s, x: s.at[xs.save].set(x), slots, current)

        def back(current, d_state, d_theta, started):
            t = xs.begin + xs.advance
            after, pull = jax.vjp(lambda theta, s: step(theta, s, t), theta, current)
            d_state = jax.lax.cond(started, lambda _: d_state, jax.grad(objective), after)
            d_theta_t, d_state = pull(d_state)
            return d_state, jax.tree.map(jnp.add, d_theta, d_theta_t), True

        def stay(current, d_state, d_theta, started):
            del current
            return d_state, d_theta, started

        rest = jax.lax.cond(xs.back, back, stay, current, d_state, d_theta, started)
        return (slots, *rest), None

    zeros = jax.tree.map(jnp.zeros_like, (state, theta))
    carry, _ = jax.lax.scan(item, (stack, *zeros, False), jax.tree.map(jnp.asarray, schedule))
    return carry[2], carry[1]


def nested_scan(step: Step, state: Any, lengths: tuple[int, ...]) -> Any:
    """``prod(lengths)`` steps as nested loops that recompute their insides when differentiated.

    One level is a plain scan with recomputed steps. Memory: ``sum(lengths)`` states and the
    residuals of one step; compute: one more forward pass a level.
    """

    def level(state, offset, lengths):
        if not lengths:
            return step(state, offset)
        inner = int(np.prod(lengths[1:]))

        @jax.checkpoint
        def body(state, i):
            return level(state, offset + i * inner, lengths[1:]), None

        return jax.lax.scan(body, state, jnp.arange(lengths[0], dtype=jnp.int32))[0]

    return level(state, jnp.int32(0), lengths)
