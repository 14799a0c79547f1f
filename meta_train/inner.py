"""Inner training as an unrolled system: the only place where tasks and learned optimizers meet."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from learned_opt.base import LearnedOptimizer, check_bound
from meta_train.checks import MAX_LENGTH, check_loss, check_positive, check_takes, check_whole
from meta_train.unroll import UnrolledSystem
from tasks.base import Task

META_LOSSES = ("train", "fresh", "validation", "both")
REDUCTIONS = ("mean", "last", "late")
SCALES = ("loss", "log")

# The steps of a run's last fifth share this part of the weight of all its steps, under "late".
LATE_SHARE = 0.8
# Multiples of the constant predictor's loss: the most that a loss counts as, and what is added
# before the logarithm, so that progress below it is worth less and less.
CEILING, FLOOR = 3.0, 0.01


class InnerState(NamedTuple):
    """One inner training run.

    Attributes:
      instance: the problem.
      params: its parameters.
      opt_state: the optimizer's state.
      step: int32 scalar, steps done.
      horizon: int32 scalar, steps of the whole run.
      constant_loss: scalar, the constant predictor's loss on the instance; () where not asked for.
    """

    instance: Any
    params: Any
    opt_state: Any
    step: jax.Array
    horizon: jax.Array
    constant_loss: Any = ()


def inner_training(
    task: Task,
    learned_optimizer: LearnedOptimizer,
    *,
    meta_loss: str = "train",
    reduction: str = "mean",
    loss_ceiling: float | None = None,
    scale: str = "loss",
    run_weight: float | None = None,
) -> UnrolledSystem:
    """Training ``task`` with ``learned_optimizer``, as a function of its theta.

    The optimizer is told the horizon of each run, as its ``num_steps``.

    Args:
      meta_loss: what ``L_t`` is. ``train``: the loss on the batch the step trains on,
        before its update. ``fresh``: the loss after the update on another training batch.
        ``validation``: the loss after the update on a validation batch. ``both``: the mean of
        ``train`` and ``validation``, each on the ``scale``.
      reduction: ``mean``: every step counts. ``last``: ``L_t`` is the horizon times the loss at
        the last step and 0 elsewhere, so a run's mean per-step loss is its final one. (With
        drawn horizons each run weighs as much as it has steps, as with ``mean``.) ``late``: of
        ``horizon`` steps the last ``n = ceil(horizon / 5)`` count ``0.2 + 0.8 horizon / n`` each,
        at most 4.2, and the others 0.2: the weights sum to ``horizon``, as with ``mean``.
      loss_ceiling: losses above it, and non-finite ones, count as this value, so that a
        diverged run is bad news for theta instead of none; gradients through a capped
        loss are zero. ``None``: losses pass as they are, and the estimator drops particles
        whose loss is not finite.
      scale: ``loss``: as it is. ``log``: ``log(min(L, 3 C) / C + 0.01)`` with ``C`` the task's
        ``constant_loss``, so that tasks of any unit weigh alike and a loss that is not finite
        counts as 3 C; it comes before the ceiling. Where C is no finite number above 0 and that
        is not known before the run, all losses of the run are NaN, whatever the ceiling.
      run_weight: divided by a run's horizon it multiplies the run's losses, so that under drawn
        horizons long runs count no more than short ones. ``None``: they do.

    Raises:
      ValueError: on a function of the task or the optimizer that takes other arguments, an
        unknown ``meta_loss``, ``reduction`` or ``scale``, a ceiling or weight that is no finite
        number above 0, or, under ``log``, a task without ``constant_loss`` or one whose first
        instance has none that is a finite number above 0; from ``init``, on a horizon that is not
        a whole number from 1 to 2^30, or such a constant; from ``step``, on a loss of the task
        that is no real float scalar.
    """
    check_arguments(task, learned_optimizer, meta_loss, reduction, loss_ceiling)
    _check_name("scale", scale, SCALES)
    if scale == "log" and task.constant_loss is None:
        raise ValueError(
            "`task` must have a `constant_loss` for scale='log'; give it one, or set scale='loss'."
        )
    if scale == "log":
        # One program, compiled and run at once even where the caller is being traced.
        first = jax.jit(lambda seed: _constant_of(task, task.sample(jax.random.key(seed))))
        with jax.disable_jit(False):  # Whoever looks for a mistake has it on.
            constant = np.asarray(first.lower(np.uint32(0)).compile()(np.uint32(0)))
        if not (np.isfinite(constant) and constant > 0):
            raise _no_scale(constant)
    if run_weight is not None:
        check_positive(run_weight=run_weight)

    def init(theta, key, horizon):
        check_horizon(horizon)
        key_sample, key_init = jax.random.split(key)
        instance = task.sample(key_sample)
        params = task.init(instance, key_init)
        if not any(map(jnp.size, jax.tree.leaves(params))):
            raise ValueError(
                "`task.init` must return at least one parameter, got a tree without entries: there "
                "is nothing to train."
            )
        opt_state = check_bound(learned_optimizer.bind(theta, horizon)).init(params)
        start = InnerState(
            instance, params, opt_state, jnp.zeros([], jnp.int32), jnp.asarray(horizon, jnp.int32)
        )
        if scale == "log":
            return start._replace(constant_loss=_sound(_constant_of(task, instance)))
        return start

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
        _check_updates(updates, state.params)
        params = optax.apply_updates(state.params, updates)
        losses = [train_loss] if meta_loss in ("train", "both") else []
        if meta_loss != "train":
            split = "train" if meta_loss == "fresh" else "validation"
            meta_batch = task.batch(state.instance, key_meta_batch, split)
            losses += [task.loss(params, state.instance, meta_batch, key_meta_loss)]
        if scale == "log":
            losses = [log_share(loss, state.constant_loss) for loss in losses]
        loss = sum(losses) / len(losses)
        loss = step_loss(loss, state.step, state.horizon, reduction, loss_ceiling)
        if scale == "log":  # After the ceiling, which would make a number of it.
            loss = jnp.where(jnp.isnan(state.constant_loss), jnp.nan, loss)
        if run_weight is not None:
            loss = loss * jnp.asarray(run_weight / state.horizon, loss.dtype)
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
    if reduction == "late":
        late = (horizon + 4) // 5
        share = jnp.where(step >= horizon - late, LATE_SHARE * (horizon / late), 0)
        loss = loss * (1 - LATE_SHARE + share).astype(loss.dtype)
    return loss


def log_share(loss: jax.Array, constant_loss: jax.Array) -> jax.Array:
    """``log(min(L, 3 C) / C + 0.01)``; of a loss that is not finite or above 3 C, log 3.01.

    A negative loss (of a variational bound) counts as 0. In NumPy:
    ``launch.evaluation.aggregates.log_loss``.
    """
    capped = jnp.where(jnp.isfinite(loss), jnp.clip(loss / constant_loss, 0, CEILING), CEILING)
    return jnp.log(capped + FLOOR)


def _constant_of(task: Task, instance: Any) -> jax.Array:
    """The constant predictor's loss; raises ``ValueError`` on what is no real float scalar."""
    constant: Any = task.constant_loss(instance) if task.constant_loss else None
    check_loss("task.constant_loss", constant)
    return jnp.asarray(constant)


def _sound(constant: jax.Array) -> jax.Array:
    """It, or NaN in place of one that is no finite number above 0.

    Raises:
      ValueError: on such a one, where it is not traced.
    """
    is_sound = jnp.isfinite(constant) & (constant > 0)
    if not isinstance(is_sound, jax.core.Tracer) and not is_sound:
        raise _no_scale(constant)
    return jnp.where(is_sound, constant, jnp.nan)


def _no_scale(constant: Any) -> ValueError:
    return ValueError(
        "`task.constant_loss` must be a finite number above 0 for scale='log', got "
        f"{constant}; shift or mend it, or set scale='loss'."
    )


def _check_name(name: str, value: Any, valid: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in valid:
        raise ValueError(f"`{name}` must be one of {list(valid)}, got {value!r}.")


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
        _check_name(name, value, valid)
    if loss_ceiling is not None:
        check_positive(loss_ceiling=loss_ceiling)


def _check_updates(updates: Any, params: Any) -> None:
    """Raises ``ValueError`` unless each update has its parameter's shape; others broadcast."""
    shapes = [jax.tree.map(jnp.shape, tree) for tree in (updates, params)]
    if shapes[0] != shapes[1]:
        raise ValueError(
            "`learned_optimizer` must return updates of the parameters' structure and shapes, got "
            f"{shapes[0]} for {shapes[1]}."
        )
