"""Inner training with a reversible learned optimizer, as a system that can be walked back."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from learned_opt.base import LearnedOptimizer
from meta_train.checks import check_loss
from meta_train.inner import check_arguments, check_horizon, step_loss
from meta_train.reversible.arithmetic import SINGLE, FixedPoint
from meta_train.reversible.dynamics import Dynamics
from meta_train.reversible.system import Start, reversible_system
from meta_train.unroll import UnrolledSystem
from tasks.base import Task


def reversible_inner_training(
    task: Task,
    learned_optimizer: LearnedOptimizer,
    *,
    meta_loss: str = "train",
    reduction: str = "mean",
    loss_ceiling: float | None = None,
    fixed: FixedPoint = SINGLE,
) -> UnrolledSystem:
    """Training ``task`` with ``learned_optimizer``, in a form that can be walked back too.

    Up to rounding the system of ``inner_training`` with the same arguments: equal keys give
    equal runs. The parameters are one flat vector, in the order of ``jax.tree.leaves``.
    A run that diverges to non-finite or out-of-range weights has no exact gradient; with a
    ``loss_ceiling`` its losses still count as the ceiling.

    Args:
      task: its parameters all float32, or all float64.
      learned_optimizer: one with a reversible form, from ``learned_opt.reversible``.
      meta_loss, reduction, loss_ceiling: as in ``inner_training``. A validation or
        fresh loss costs a forward pass more, and another gradient on the way back; with
        ``reduction="last"`` at the last step only.
      fixed: resolution of the exact state.

    Raises:
      ValueError: on an optimizer without a reversible form, other parameters, a loss of the task
        that is no real float scalar, decays that the fixed-point format cannot express, or as
        ``inner_training``.
    """
    check_arguments(task, learned_optimizer, meta_loss, reduction, loss_ceiling)
    if learned_optimizer.reversible is None:
        raise ValueError(
            "`learned_optimizer` must have a reversible form, got one whose steps cannot be "
            "undone: they depend on the raw gradient or the weights. Use "
            "`learned_opt.reversible_mlp_optimizer` (--cfg.optimizer=reversible_mlp), or "
            "`inner_training` and another estimator."
        )
    update = learned_optimizer.reversible
    decays = np.asarray(update.decays)

    # The shapes of the parameters do not depend on the instance or the key.
    instance = jax.eval_shape(task.sample, jax.random.key(0))
    params = jax.eval_shape(task.init, instance, jax.random.key(0))
    leaves, treedef = jax.tree.flatten(params)
    sizes = tuple(leaf.size for leaf in leaves)
    dtypes = sorted({str(leaf.dtype) for leaf in leaves})
    if dtypes not in (["float32"], ["float64"]):
        raise ValueError(
            f"`task` must have parameters that are all float32 or all float64, got {dtypes}: the "
            "exact state has one format. Cast them in `task.init`, and in `task.loss` as needed."
        )

    if not sum(sizes):
        raise ValueError(
            f"`task` must have at least one parameter, got {len(sizes)} arrays, all of size 0."
        )

    def loss_of(params, instance, key):
        return task.loss(params, instance, task.batch(instance, key, "train"), key)

    check_loss("task.loss", jax.eval_shape(loss_of, params, instance, jax.random.key(0)))

    def unravel(flat):
        pieces = jnp.split(flat, np.cumsum(sizes)[:-1])
        shaped = [piece.reshape(leaf.shape) for piece, leaf in zip(pieces, leaves, strict=True)]
        return jax.tree.unflatten(treedef, shaped)

    def begin(theta, key, horizon):
        del theta
        check_horizon(horizon)
        key_sample, key_init = jax.random.split(key)
        instance = task.sample(key_sample)
        weights, _ = ravel_pytree(task.init(instance, key_init))
        context = instance, jnp.asarray(horizon, jnp.int32)
        return Start(context, weights, jnp.zeros((len(decays), weights.size), weights.dtype))

    def dynamics(context):
        instance, horizon = context

        def loss(theta, weights, x):
            del theta
            key_batch, key_loss, _, _ = jax.random.split(x[1], 4)
            batch = task.batch(instance, key_batch, "train")
            return task.loss(unravel(weights), instance, batch, key_loss)

        def decay(theta, hyper):
            del theta, hyper
            return jnp.asarray(decays[:, None], leaves[0].dtype)

        def absorb(theta, hyper, gradient, x):
            del theta, hyper, x
            return update.absorb(gradient)

        def move(theta, hyper, accumulators, x):
            del hyper
            return update.move(theta, accumulators, x[0], sizes)

        def loss_after(before, weights, key):
            _, _, key_batch, key_loss = jax.random.split(key, 4)
            split = "train" if meta_loss == "fresh" else "validation"
            batch = task.batch(instance, key_batch, split)
            loss = task.loss(unravel(weights), instance, batch, key_loss)
            return (before + loss) / 2 if meta_loss == "both" else loss

        def observe(theta, loss, weights, x):
            del theta
            step, key = x
            if meta_loss != "train" and reduction == "last":
                last = step == horizon - 1
                loss = jax.lax.cond(last, loss_after, lambda before, *_: before, loss, weights, key)
            elif meta_loss != "train":
                loss = loss_after(loss, weights, key)
            return step_loss(loss, step, horizon, reduction, loss_ceiling)

        return Dynamics(loss, decay, absorb, move, observe)

    return reversible_system(begin, dynamics, decays, fixed)
