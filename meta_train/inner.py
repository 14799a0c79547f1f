"""Inner training as an unrolled system: the only place where tasks and learned optimizers meet."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from learned_opt.base import LearnedOptimizer
from meta_train.checks import MAX_LENGTH, check_loss, check_takes, check_whole
from meta_train.unroll import UnrolledSystem
from tasks.base import Task

META_LOSSES = ("train", "fresh", "validation")
REDUCTIONS = ("mean", "last")


class InnerState(NamedTuple):
    """One inner training run.

    Attributes:
      instance: the problem.
      params: its parameters.
      opt_state: the optimizer's state.
      step: int32 scalar, steps done.
      horizon: int32 scalar, steps of the whole run.
    """

    instance: Any
    params: Any
    opt_state: Any
    step: jax.Array
    horizon: jax.Array


def inner_training(
    task: Task,
    learned_optimizer: LearnedOptimizer,
    *,
    meta_loss: str = "train",
    reduction: str = "mean",
    loss_ceiling: float | None = None,
) -> UnrolledSystem:
    """Training ``task`` with ``learned_optimizer``, as a function of its theta.

    The optimizer is told the horizon of each run, as its ``num_steps``.

    Args:
      meta_loss: what ``L_t`` is. ``train``: the loss on the batch the step trains on,
        before its update. ``fresh``: the loss after the update on another training batch.
        ``validation``: the loss after the update on a validation batch.
      reduction: ``mean``: every step counts. ``last``: ``L_t`` is the horizon times the loss at
        the last step and 0 elsewhere, so a run's mean per-step loss is its final one. (With
        drawn horizons each run weighs as much as it has steps, as with ``mean``.)
      loss_ceiling: losses above it, and non-finite ones, count as this value, so that a
        diverged run is bad news for theta instead of none; gradients through a capped
        loss are zero. ``None``: losses pass as they are, and the estimator drops particles
        whose loss is not finite.

    Raises:
      ValueError: on a function of the task or the optimizer that takes other arguments, an
        unknown ``meta_loss`` or ``reduction``, or a non-positive ceiling; from
        ``init``, on a horizon that is not a whole number from 1 to 2^30; from ``step``, on a loss
        of the task that is no real float scalar.
    """
    check_arguments(task, learned_optimizer, meta_loss, reduction, loss_ceiling)

    def init(theta, key, horizon):
        check_horizon(horizon)
        key_sample, key_init = jax.random.split(key)
        instance = task.sample(key_sample)
        params = task.init(instance, key_init)
        opt_state = learned_optimizer.bind(theta, horizon).init(params)
        return InnerState(
            instance, params, opt_state, jnp.zeros([], jnp.int32), jnp.asarray(horizon, jnp.int32)
        )

    def step(theta, state, key):
        key_batch, key_loss, key_meta_batch, key_meta_loss = jax.random.split(key, 4)
        batch = task.batch(state.instance, key_batch, "train")
        spec = jax.eval_shape(task.loss, state.params, state.instance, batch, key_loss)
        check_loss("task.loss", spec)
        train_loss, grads = jax.value_and_grad(task.loss)(
            state.params, state.instance, batch, key_loss
        )
        transform = optax.with_extra_args_support(learned_optimizer.bind(theta, state.horizon))
        updates, opt_state = transform.update(
            grads, state.opt_state, state.params, value=train_loss
        )
        params = optax.apply_updates(state.params, updates)
        if meta_loss == "train":
            loss = train_loss
        else:
            split = "train" if meta_loss == "fresh" else "validation"
            meta_batch = task.batch(state.instance, key_meta_batch, split)
            loss = task.loss(params, state.instance, meta_batch, key_meta_loss)
        loss = step_loss(loss, state.step, state.horizon, reduction, loss_ceiling)
        return state._replace(params=params, opt_state=opt_state, step=state.step + 1), loss

    return UnrolledSystem(init, step)


def step_loss(
    loss: jax.Array, step: jax.Array, horizon: jax.Array, reduction: str, loss_ceiling: float | None
) -> jax.Array:
    """What the loss of ``step`` counts as in the mean: capped, and only in the end if so asked."""
    if loss_ceiling is not None:
        loss = jnp.where(loss < loss_ceiling, loss, loss_ceiling)
    if reduction == "last":
        loss = jnp.where(step == horizon - 1, horizon * loss, 0.0)
    return loss


def check_horizon(horizon: Any) -> None:
    """Raises ``ValueError`` unless it is a whole number from 1 to 2^30, or traced."""
    if not isinstance(horizon, jax.core.Tracer):
        check_whole(maximum=MAX_LENGTH, horizon=horizon)


def check_arguments(
    task: Task,
    learned_optimizer: LearnedOptimizer,
    meta_loss: str,
    reduction: str,
    loss_ceiling: float | None,
) -> None:
    """Raises ``ValueError`` as ``inner_training`` says."""
    for where, given, arguments in (
        ("task.sample", task.sample, "key"),
        ("task.init", task.init, "instance, key"),
        ("task.batch", task.batch, "instance, key, split"),
        ("task.loss", task.loss, "params, instance, batch, key"),
        ("learned_optimizer.init", learned_optimizer.init, "key"),
        ("learned_optimizer.bind", learned_optimizer.bind, "theta, num_steps"),
    ):
        check_takes(where, given, arguments)
    for name, value, valid in (
        ("meta_loss", meta_loss, META_LOSSES),
        ("reduction", reduction, REDUCTIONS),
    ):
        if value not in valid:
            raise ValueError(f"`{name}` must be one of {list(valid)}, got {value!r}.")
    if loss_ceiling is not None and not loss_ceiling > 0:
        raise ValueError(f"`loss_ceiling` must be above 0 or None, got {loss_ceiling}.")
