"""Plain supervised training as an unrolled system of one step."""

from collections.abc import Callable

import jax

from meta_train.unroll import UnrolledSystem


def supervised_training(loss: Callable[[object, jax.Array], jax.Array]) -> UnrolledSystem:
    """One step an episode: theta are the network's weights, the step's loss is that of a batch.

    So every estimator of the gradient of the mean loss trains a network: ``bptt`` with
    ``num_particles`` batches is minibatch gradient descent, ``full_es`` plain ES.

    Args:
      loss: ``(theta, key) -> scalar``, the loss on a batch drawn with ``key``. For a task:
        ``lambda params, key: task.loss(params, instance, task.batch(instance, key, "train"),
        key)``.
    """
    return UnrolledSystem(
        init=lambda theta, key, horizon: (),
        step=lambda theta, state, key: ((), loss(theta, key)),
    )
