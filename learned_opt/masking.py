"""Parameters without a gradient stay where they are."""

import jax
import jax.numpy as jnp
import optax


def mask_zero_gradients(
    transform: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """``transform``, with an update of exactly 0 wherever the gradient is exactly 0.

    For optimizers that move a parameter also without a gradient (``moves_without_gradient``), and
    so would let unused rows of an embedding drift:
    ``tx = mask_zero_gradients(optimizer.bind(theta, num_steps))``. The state of ``transform`` is
    as without the mask. In an ``optax.chain``, put it around the optimizer, not around what comes
    before it (weight decay added to the gradient makes it non-zero).
    """
    inner = optax.with_extra_args_support(transform)

    def update(updates, state, params=None, **extra):
        steps, state = inner.update(updates, state, params, **extra)
        return jax.tree.map(lambda g, s: jnp.where(g == 0, 0, s), updates, steps), state

    return optax.GradientTransformationExtraArgs(inner.init, update)
