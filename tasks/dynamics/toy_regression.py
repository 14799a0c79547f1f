"""The two-dimensional learning-rate problem: a meta-loss surface that can be drawn."""

import jax.numpy as jnp

HORIZON = 100
THETA_INIT = (-4.0, -4.0)


def toy_regression(horizon: int = HORIZON):
    """SGD on a rippled valley whose learning rate goes linearly from one value to another.

    Theta is ``[2]``: the logarithms of the first and the last learning rate,
    ``a_t = (1 - t/T) exp(theta_0) + (t/T) exp(theta_1)``. The inner problem, from ``(1, 1)``,
    has most of its loss in the distance of ``x_1`` to 100, which only a large learning rate
    covers in ``T`` steps, while short horizons favour a small one.

    Args:
      horizon: ``T``, inner steps in an episode.

    Returns:
      ``init(theta, key, horizon) -> state`` and ``step(theta, state, key) -> (state, loss)``.

    Source: Vicol et al. 2021, section 5.2 and its code.
    """

    def loss(x):
        wave = jnp.sin(x[1]) ** 2 * jnp.exp(-5 * x[0] ** 2)
        return jnp.sqrt(x[0] ** 2 + 5) - jnp.sqrt(5.0) + wave + 0.25 * jnp.abs(x[1] - 100)

    def loss_gradient(x):
        decay = jnp.exp(-5 * x[0] ** 2)
        by_0 = x[0] / jnp.sqrt(x[0] ** 2 + 5) - 10 * x[0] * jnp.sin(x[1]) ** 2 * decay
        by_1 = jnp.sin(2 * x[1]) * decay + 0.25 * jnp.sign(x[1] - 100)
        return jnp.array([by_0, by_1])

    def init(theta, key, _):
        del key
        return jnp.ones(2, theta.dtype), jnp.int32(0)

    def step(theta, state, key):
        del key
        x, count = state
        progress = count / horizon
        rate = (1 - progress) * jnp.exp(theta[0]) + progress * jnp.exp(theta[1])
        x = x - rate * loss_gradient(x)
        return (x, count + 1), loss(x)

    return init, step
