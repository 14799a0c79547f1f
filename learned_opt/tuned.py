"""SGD with momentum whose hyperparameters are the meta-parameters."""

import jax
import jax.numpy as jnp
import optax

from learned_opt.arguments import check_between, check_count, check_num_tensors
from learned_opt.base import LearnedOptimizer
from learned_opt.hyperparameters import inverse_time, tuned


def learnable_sgdm(learning_rate: float = 0.1, momentum: float = 0.9) -> LearnedOptimizer:
    """SGD with momentum; theta is its learning rate and momentum, two scalars.

    Args:
      learning_rate: initial learning rate, above 0.
      momentum: initial momentum, strictly between 0 and 1.

    Raises:
      ValueError: on a value out of range.
    """

    def sgdm(num_steps, learning_rate, momentum):
        del num_steps
        return optax.sgd(learning_rate, momentum)

    return tuned(sgdm, positive={"learning_rate": learning_rate}, shares={"momentum": momentum})


def learnable_schedule(
    learning_rate: float = 0.1, decay: float = 1.0, momentum: float = 0.9
) -> LearnedOptimizer:
    """SGD with momentum under an inverse-time decay, its two numbers tuned.

    Step ``t`` of ``num_steps`` (that of ``bind``) has the learning rate
    ``learning_rate / (1 + t / num_steps) ** decay``; theta is the logs of the two. At the last
    step the rate has fallen by ``2 ** decay``.

    Args:
      learning_rate: initial learning rate of the first step, above 0.
      decay: initial exponent, above 0.
      momentum: strictly between 0 and 1; fixed.

    Raises:
      ValueError: on a value out of range.

    Source: Vicol et al. 2021, section 5.3. Differs: time is counted in units of
    ``num_steps``, which equals the paper's 5,000 at its horizon.
    """
    check_between(0, 1, momentum=momentum)

    def sgdm(num_steps, learning_rate, decay):
        return optax.sgd(inverse_time(learning_rate, decay, num_steps), momentum)

    return tuned(sgdm, positive={"learning_rate": learning_rate, "decay": decay}, shares={})


def per_tensor_sgdm(
    num_tensors: int = 4, learning_rate: float = 0.1, momentum: float = 0.9
) -> LearnedOptimizer:
    """SGD with momentum; every tensor of the parameters has its own learning rate and momentum.

    Theta is two vectors ``[num_tensors]``, in the order of ``jax.tree.leaves`` of the
    parameters: for an MLP, bias then weights of each layer.

    Args:
      num_tensors: leaves of the parameters (an MLP of L layers, biases included, has 2 L).
      learning_rate: initial learning rate of every tensor, above 0.
      momentum: initial momentum of every tensor, strictly between 0 and 1.

    Raises:
      ValueError: on a value out of range, or (from the transformation's ``init``) parameters
        with another number of leaves.

    Source: Vicol et al. 2021, section 5.4 (tuning many hyperparameters).
    """
    check_count(num_tensors=num_tensors)

    def sgdm(num_steps, learning_rate, momentum):
        del num_steps

        def init(params):
            check_num_tensors(num_tensors, params)
            return jax.tree.map(jnp.zeros_like, params)

        def update(updates, velocity, params=None):
            del params
            leaves, structure = jax.tree.flatten(velocity)
            leaves = [
                momentum[i] * v + g
                for i, (v, g) in enumerate(zip(leaves, jax.tree.leaves(updates), strict=True))
            ]
            steps = [-learning_rate[i] * v for i, v in enumerate(leaves)]
            return jax.tree.unflatten(structure, steps), jax.tree.unflatten(structure, leaves)

        return optax.GradientTransformation(init, update)

    return tuned(
        sgdm,
        positive={"learning_rate": learning_rate},
        shares={"momentum": momentum},
        shape=(num_tensors,),
    )
