"""Influence balancing: a linear system in which truncated gradients have the wrong sign."""

import jax
import jax.numpy as jnp

SIZE = 23
POSITIVE = 10
OPTIMUM = -1 / 6
THETA_INIT = 0.5


def influence_balancing(end_of_window: int = 1):
    """``s <- A s + theta * signs``, ``L = (s[0] - 1)^2 / 2``; theta is a scalar.

    ``A`` is half the identity plus half the shift, so entry 0 feels the others only after a
    delay, and in the long run the 13 negative entries outweigh the 10 positive ones:
    ``s[0] -> -6 theta``. A gradient that looks back less than 41 steps points the wrong way.
    The optimum is ``theta = -1/6``, with loss 0.

    Args:
      end_of_window: count only the loss of every ``end_of_window``-th step, times
        ``end_of_window``, so a window's mean loss is the loss at its end. 1: every loss.

    Returns:
      ``init(theta, key, horizon) -> state`` and ``step(theta, state, key) -> (state, loss)``.

    Source: Tallec and Ollivier 2018; settings of Vicol et al. 2021, section 5.1.
    """

    def init(theta, key, horizon):
        del key, horizon
        return jnp.ones(SIZE, jnp.result_type(theta)), jnp.int32(0)

    def step(theta, state, key):
        del key
        s, count = state
        signs = jnp.where(jnp.arange(SIZE) < POSITIVE, 1.0, -1.0).astype(s.dtype)
        s = 0.5 * s + 0.5 * jnp.append(s[1:], jnp.zeros_like(s[:1])) + theta * signs
        count = (count + 1) % end_of_window
        loss = 0.5 * (s[0] - 1) ** 2
        return (s, count), jnp.where(count == 0, end_of_window * loss, 0.0)

    return init, step


def final_loss(theta: jax.Array, steps: int = 500) -> jax.Array:
    """The loss after ``steps`` steps from a fresh start, the figure's measure of theta."""
    init, step = influence_balancing()
    key = jax.random.key(0)
    _, losses = jax.lax.scan(
        lambda state, _: step(theta, state, key), init(theta, key, steps), length=steps
    )
    return losses[-1]
