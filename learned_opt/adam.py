"""Adam and NAdamW whose hyperparameters are the meta-parameters."""

import jax
import jax.numpy as jnp
import optax

from learned_opt.base import LearnedOptimizer
from learned_opt.hyperparameters import inverse_time, tuned
from learned_opt.limits import limited


def learnable_adam(
    learning_rate: float = 1e-3, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8
) -> LearnedOptimizer:
    """Adam; theta is its learning rate, decays and epsilon, four scalars.

    The numbers of ``optax.adam``, except that finite gradients count as at most a sixteenth of
    the root of the largest float (float32: 1.2e18), so that no square overflows. Its derivative
    is that of ``optax.adam`` where this one has a finite one; a parameter that never had a
    gradient has a second moment of 0, whose root has no derivative, and here one of 0.

    Args:
      learning_rate: initial learning rate, above 0.
      b1: initial decay of the first moment, strictly between 0 and 1.
      b2: initial decay of the second moment, strictly between 0 and 1.
      eps: initial epsilon, above 0.

    Raises:
      ValueError: on a value out of range.
    """

    def adam(num_steps, learning_rate, b1, b2, eps):
        del num_steps
        return optax.chain(scale_by_adam(b1, b2, eps), optax.scale_by_learning_rate(learning_rate))

    return tuned(
        adam, positive={"learning_rate": learning_rate, "eps": eps}, shares={"b1": b1, "b2": b2}
    )


def learnable_nadamw(
    learning_rate: float = 1e-3,
    decay: float = 1.0,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 1e-4,
) -> LearnedOptimizer:
    """NAdamW under an inverse-time decay of the rate; theta is six scalars.

    The numbers of ``optax.nadamw`` with the rate ``learning_rate / (1 + t / num_steps) ** decay``
    at step ``t``, with limits and derivatives as in ``learnable_adam``. The weight decay is
    multiplied by the rate and moves parameters without a gradient too; ``mask_zero_gradients``
    holds them still.

    Args:
      learning_rate: initial learning rate of the first step, above 0.
      decay: initial exponent of the schedule, above 0.
      b1: initial decay of the first moment, strictly between 0 and 1.
      b2: initial decay of the second moment, strictly between 0 and 1.
      eps: initial epsilon, above 0.
      weight_decay: initial weight decay, above 0.

    Raises:
      ValueError: on a value out of range.

    Source: Dozat 2016 in the form of ``optax.nadamw`` (Loshchilov and Hutter 2019, arXiv
    1711.05101, for the weight decay); the schedule is that of ``learnable_schedule``.
    """

    def nadamw(num_steps, learning_rate, decay, b1, b2, eps, weight_decay):
        return optax.chain(
            scale_by_adam(b1, b2, eps, nesterov=True),
            optax.add_decayed_weights(weight_decay),
            optax.scale_by_learning_rate(inverse_time(learning_rate, decay, num_steps)),
        )

    positive = {"learning_rate": learning_rate, "decay": decay}
    positive |= {"eps": eps, "weight_decay": weight_decay}
    return tuned(
        nadamw, positive=positive, shares={"b1": b1, "b2": b2}, moves_without_gradient=True
    )


def scale_by_adam(b1, b2, eps, nesterov: bool = False) -> optax.GradientTransformation:
    """``optax.scale_by_adam``, step by step, with the same state.

    Without overflow of its squares, and differentiable where they are 0: see ``learnable_adam``.
    """

    def init(params):
        mean, square = (jax.tree.map(jnp.zeros_like, params) for _ in range(2))
        return optax.ScaleByAdamState(jnp.zeros([], jnp.int32), mean, square)

    def update(updates, state, params=None):
        del params
        updates = jax.tree.map(lambda g: limited(g, 2), updates)
        count = optax.safe_increment(state.count)
        mean = optax.tree.update_moment(updates, state.mu, b1, 1)
        square = optax.tree.update_moment(updates, state.nu, b2, 2)
        ahead = nesterov_mean if nesterov else _mean
        directions = jax.tree.map(
            lambda m, v: _adam_direction(m, v, eps),
            ahead(mean, updates, b1, count),
            optax.tree.bias_correction(square, b2, count),
        )
        return directions, optax.ScaleByAdamState(count, mean, square)

    return optax.GradientTransformation(init, update)


def nesterov_mean(mean, updates, decay, count):
    """The mean as it would be if the next gradient were this one again, bias-corrected.

    Args:
      mean, updates: trees, the mean after its update by ``updates``.
      decay: of the mean.
      count: updates done, this one included.
    """
    return jax.tree.map(
        lambda m, g: decay * m + (1 - decay) * g,
        optax.tree.bias_correction(mean, decay, optax.safe_increment(count)),
        optax.tree.bias_correction(updates, decay, count),
    )


def _mean(mean, updates, decay, count):
    del updates
    return optax.tree.bias_correction(mean, decay, count)


@jax.custom_jvp
def _adam_direction(mean, square, eps):
    return mean / (jnp.sqrt(square) + eps)


@_adam_direction.defjvp
def _adam_direction_jvp(primals, tangents):
    """Finite also where ``square`` is 0, whatever ``eps``: no power of a small number is taken."""
    mean, square, eps = primals
    mean_dot, square_dot, eps_dot = tangents
    root = jnp.sqrt(square)
    size = root + eps
    direction = mean / size
    root_dot = jnp.where(root > 0, square_dot / jnp.where(root > 0, 2 * root, 1), 0)
    return direction, (mean_dot - direction * (root_dot + eps_dot)) / size
