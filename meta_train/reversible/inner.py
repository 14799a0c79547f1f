"""Inner training with a reversible learned optimizer, as a system that can be walked back."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from learned_opt.reversible import ReversibleOptimizer
from meta_train.reversible.arithmetic import SINGLE, FixedPoint
from meta_train.reversible.dynamics import Dynamics
from meta_train.reversible.system import ReversibleSystem, Start, reversible_system
from tasks.base import Task


def reversible_inner_training(
    task: Task, optimizer: ReversibleOptimizer, *, fixed: FixedPoint = SINGLE
) -> ReversibleSystem:
    """Training ``task`` with ``optimizer``; ``L_t`` is the training loss before the update.

    The parameters are one flat vector, in the order of ``jax.tree.leaves``.

    Args:
      task: all its parameters of one dtype.
      optimizer: from ``learned_opt.reversible``.
      fixed: resolution of the exact state.

    Raises:
      ValueError: on decays that the fixed-point format cannot express.
    """
    decays = np.asarray(optimizer.decays)

    # The shapes of the parameters do not depend on the instance or the key.
    instance = jax.eval_shape(task.sample, jax.random.key(0))
    like = jax.eval_shape(task.init, instance, jax.random.key(0))
    sizes = tuple(leaf.size for leaf in jax.tree.leaves(like))

    def begin(theta, key):
        del theta
        key_sample, key_init = jax.random.split(key)
        instance = task.sample(key_sample)
        weights, _ = ravel_pytree(task.init(instance, key_init))
        return Start(instance, weights, jnp.zeros((len(decays), weights.size), weights.dtype))

    def dynamics(instance):
        unravel = _unravel(like, sizes)

        def loss(theta, weights, x):
            del theta
            key_batch, key_loss = jax.random.split(x[1])
            batch = task.batch(instance, key_batch, "train")
            return task.loss(unravel(weights), instance, batch, key_loss)

        def decay(theta, hyper):
            del theta, hyper
            leaf = jax.tree.leaves(like)[0]
            return jnp.asarray(decays[:, None], leaf.dtype)

        def absorb(theta, hyper, gradient, x):
            del theta, hyper, x
            return optimizer.absorb(gradient)

        def move(theta, hyper, accumulators, x):
            del hyper
            return optimizer.move(theta, accumulators, x[0], sizes)

        return Dynamics(loss, decay, absorb, move)

    return reversible_system(begin, dynamics, decays, fixed)


def _unravel(like, sizes):
    leaves, treedef = jax.tree.flatten(like)

    def unravel(flat):
        pieces = jnp.split(flat, np.cumsum(sizes)[:-1])
        shaped = [piece.reshape(leaf.shape) for piece, leaf in zip(pieces, leaves, strict=True)]
        return jax.tree.unflatten(treedef, shaped)

    return unravel
