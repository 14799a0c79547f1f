"""Lion whose hyperparameters are the meta-parameters."""

import optax

from learned_opt.base import LearnedOptimizer
from learned_opt.hyperparameters import inverse_time, tuned


def learnable_lion(
    learning_rate: float = 1e-4,
    decay: float = 1.0,
    b1: float = 0.9,
    b2: float = 0.99,
    weight_decay: float = 1e-3,
) -> LearnedOptimizer:
    """Lion under an inverse-time decay of the rate; theta is five scalars.

    ``optax.lion``, whose direction is the sign of ``b1 m + (1 - b1) g``, with the rate
    ``learning_rate / (1 + t / num_steps) ** decay`` at step ``t``. The weight decay is multiplied
    by the rate and moves parameters without a gradient too; ``mask_zero_gradients`` holds them
    still.

    A sign has the derivative 0, so estimators that differentiate see the rate, its decay and the
    weight decay alone; evolution strategies see ``b1`` and ``b2`` too.

    Args:
      learning_rate: initial learning rate of the first step, above 0.
      decay: initial exponent of the schedule, above 0.
      b1: initial share of the momentum in the direction, strictly between 0 and 1.
      b2: initial decay of the momentum, strictly between 0 and 1.
      weight_decay: initial weight decay, above 0.

    Raises:
      ValueError: on a value out of range.

    Source: Chen et al. 2023 (arXiv 2302.06675); the schedule is that of ``learnable_schedule``.
    """

    def lion(num_steps, learning_rate, decay, b1, b2, weight_decay):
        rate = inverse_time(learning_rate, decay, num_steps)
        return optax.lion(rate, b1, b2, weight_decay=weight_decay)

    return tuned(
        lion,
        positive={"learning_rate": learning_rate, "decay": decay, "weight_decay": weight_decay},
        shares={"b1": b1, "b2": b2},
        moves_without_gradient=True,
    )
