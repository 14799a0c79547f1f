"""Inner training as an unrolled system: the only place where tasks and learned optimizers meet."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from learned_opt.base import LearnedOptimizer
from meta_train.checks import MAX_LENGTH, check_loss, check_whole
from meta_train.unroll import UnrolledSystem
from tasks.base import Task

META_LOSSES = ("train", "fresh", "validation")
REDUCTIONS = ("mean", "last")


class InnerState(NamedTuple):
    """One inner training run: the problem, its parameters, the optimizer's state, steps done."""

    instance: Any
    params: Any
    opt_state: Any
    step: jax.Array


def inner_training(
    task: Task,
    learned_optimizer: LearnedOptimizer,
    *,
    num_steps: int,
    meta_loss: str = "train",
    reduction: str = "mean",
    loss_ceiling: float | None = None,
) -> UnrolledSystem:
    """Training ``task`` with ``learned_optimizer``, as a function of its theta.

    Args:
      num_steps: length of a full episode, told to the optimizer's schedules; with random
        horizons, the longest one.
      meta_loss: what ``L_t`` is. ``train``: the loss on the batch the step trains on,
        before its update. ``fresh``: the loss after the update on another training batch.
        ``validation``: the loss after the update on a validation batch.
      reduction: ``mean``: every step counts. ``last``: ``L_t`` is ``num_steps`` times the
        loss at the last step and 0 elsewhere, so the mean per-step loss is the final one.
      loss_ceiling: losses above it, and non-finite ones, count as this value, so that a
        diverged run is bad news for theta instead of none; gradients through a capped
        loss are zero. ``None``: losses pass as they are, and the estimator drops particles
        whose loss is not finite.

    Raises:
      ValueError: on an unknown ``meta_loss`` or ``reduction``, a ``num_steps`` that is not a whole
        number from 1 to 2^30, or a non-positive ceiling; from ``step``, on a loss of the task that
        is no real float scalar.
    """
    check_arguments(num_steps, meta_loss, reduction, loss_ceiling)

    def init(theta, key):
        key_sample, key_init = jax.random.split(key)
        instance = task.sample(key_sample)
        params = task.init(instance, key_init)
        opt_state = learned_optimizer.bind(theta, num_steps).init(params)
        return InnerState(instance, params, opt_state, jnp.zeros([], jnp.int32))

    def step(theta, state, key):
        key_batch, key_loss, key_meta_batch, key_meta_loss = jax.random.split(key, 4)
        batch = task.batch(state.instance, key_batch, "train")
        spec = jax.eval_shape(task.loss, state.params, state.instance, batch, key_loss)
        check_loss("task.loss", spec)
        train_loss, grads = jax.value_and_grad(task.loss)(
            state.params, state.instance, batch, key_loss
        )
        updates, opt_state = learned_optimizer.bind(theta, num_steps).update(
            grads, state.opt_state, state.params, value=train_loss
        )
        params = optax.apply_updates(state.params, updates)
        if meta_loss == "train":
            loss = train_loss
        else:
            split = "train" if meta_loss == "fresh" else "validation"
            meta_batch = task.batch(state.instance, key_meta_batch, split)
            loss = task.loss(params, state.instance, meta_batch, key_meta_loss)
        loss = counted(loss, state.step, num_steps, reduction, loss_ceiling)
        return InnerState(state.instance, params, opt_state, state.step + 1), loss

    return UnrolledSystem(init, step)


def counted(
    loss: jax.Array, step: jax.Array, num_steps: int, reduction: str, loss_ceiling: float | None
) -> jax.Array:
    """What the loss of ``step`` counts as in the mean: capped, and only in the end if so asked."""
    if loss_ceiling is not None:
        loss = jnp.where(loss < loss_ceiling, loss, loss_ceiling)
    if reduction == "last":
        loss = jnp.where(step == num_steps - 1, num_steps * loss, 0.0)
    return loss


def check_arguments(
    num_steps: int, meta_loss: str, reduction: str, loss_ceiling: float | None
) -> None:
    """Raises ``ValueError`` as ``inner_training`` says."""
    for name, value, valid in (
        ("meta_loss", meta_loss, META_LOSSES),
        ("reduction", reduction, REDUCTIONS),
    ):
        if value not in valid:
            raise ValueError(f"`{name}` must be one of {list(valid)}, got {value!r}.")
    check_whole(maximum=MAX_LENGTH, num_steps=num_steps)
    if loss_ceiling is not None and not loss_ceiling > 0:
        raise ValueError(f"`loss_ceiling` must be above 0 or None, got {loss_ceiling}.")
