"""One train step from an estimator and an optax optimizer, and the state it evolves."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from meta_train.checks import fixed_types
from meta_train.compiled_apart import compiled_apart
from meta_train.estimators.base import GradientEstimator, Metrics


class TrainState(NamedTuple):
    """Everything that evolves, and so everything that is checkpointed.

    Attributes:
      step: int32 scalar, outer steps done.
      theta: meta-parameters.
      meta_opt_state: state of the optax meta-optimizer.
      estimator_state: the population; leaves are ``[particles, ...]`` as the estimator's
        ``axes`` say.
      key: the job's root key; never changes, every draw is addressed from it.
    """

    step: jax.Array
    theta: Any
    meta_opt_state: Any
    estimator_state: Any
    key: jax.Array


# Which part of the state has the particle axis, for `devices.population_map`: where all of
# the estimator's state has it, as in all estimators but those that say otherwise.
PARTICLE_AXES: Any = TrainState(None, None, None, 0, None)  # type: ignore[arg-type]


def state_axes(estimator: GradientEstimator) -> Any:
    """``PARTICLE_AXES`` for this estimator."""
    return PARTICLE_AXES._replace(estimator_state=estimator.axes)


def step_key(root: jax.Array, step: jax.Array) -> jax.Array:
    """The key of the outer step after ``step`` of them; 0 is the initialization's."""
    return jax.random.fold_in(root, step + 1)


def init_state(
    estimator: GradientEstimator,
    meta_optimizer: optax.GradientTransformation,
    init_theta: Callable[[jax.Array], Any],
    seed: int | jax.Array,
) -> TrainState:
    """The state before the first outer step; the same for any number of devices."""
    root = jax.random.key(seed)
    key_theta, key_population = jax.random.split(jax.random.fold_in(root, 0))
    theta = fixed_types(init_theta(key_theta))
    return TrainState(
        step=jnp.zeros([], jnp.int32),
        theta=theta,
        meta_opt_state=meta_optimizer.init(theta),
        estimator_state=estimator.init(theta, key_population),
        key=root,
    )


def make_step(
    estimator: GradientEstimator,
    meta_optimizer: optax.GradientTransformation,
    population_mean: Callable[[Any], Any] = lambda tree: tree,
) -> Callable[[TrainState], tuple[TrainState, Metrics]]:
    """``state -> (state, metrics)``: estimate the meta-gradient, update theta.

    If the meta-gradient itself is not finite (which takes an overflow: particles that are
    not finite already contribute zero), theta and the meta-optimizer stay as they are.

    Args:
      population_mean: the mean over devices, inside ``devices.population_map``; not applied
        to an estimator that exchanges its own messages.

    Returns:
      The step. Its metrics are float32 scalars: ``meta_loss`` (mean per-step loss of the
      finite particles), ``meta_grad_norm``, ``meta_grad_spread`` (root mean square distance
      of the particles' contributions from their mean), ``theta_norm``, ``update_norm``,
      ``nonfinite`` (fraction of particles), and the estimator's own. With them are ``meta_grad``,
      the meta-gradient itself, like theta, and of an estimator that exchanges its own messages
      the ``message``.
    """

    def step(state: TrainState) -> tuple[TrainState, Metrics]:
        key = step_key(state.key, state.step)
        grad, estimator_state, metrics = estimator.estimate(state.theta, state.estimator_state, key)
        if estimator.rebuild is None:
            grad, metrics = population_mean((grad, metrics))
        update = meta_update(meta_optimizer, state, grad)
        metrics = dict(metrics)
        loss, finite = metrics.pop("loss"), metrics.pop("finite")
        spread = compiled_apart(
            lambda square, norm: jnp.sqrt(jnp.maximum(square - norm**2, 0.0)),
            metrics.pop("grad_sq_norm"),
            update.grad_norm,
            witness=state.step,
        )
        metrics |= {
            "meta_grad": grad,
            "meta_loss": loss / finite,
            "meta_grad_norm": update.grad_norm,
            "meta_grad_spread": spread,
            "theta_norm": optax.tree.norm(update.theta),
            "update_norm": optax.tree.norm(update.updates),
            "nonfinite": 1.0 - finite,
        }
        state = TrainState(
            state.step + 1,
            update.theta,
            update.meta_opt_state,
            estimator_state,
            state.key,
        )
        return state, metrics

    return step


class MetaUpdate(NamedTuple):
    """One step of the meta-optimizer: what it gave, and the norm of the gradient it took."""

    theta: Any
    meta_opt_state: Any
    updates: Any
    grad_norm: jax.Array


def meta_update(
    meta_optimizer: optax.GradientTransformation, state: TrainState, grad: Any
) -> MetaUpdate:
    """The meta-optimizer's step along ``grad``, rounded the same wherever it is compiled."""

    def update(state, grad):
        updates, meta_opt_state = meta_optimizer.update(grad, state.meta_opt_state, state.theta)
        grad_norm = optax.tree.norm(grad)
        usable = jnp.isfinite(grad_norm)
        updates = optax.tree.where(usable, updates, jax.tree.map(jnp.zeros_like, updates))
        return MetaUpdate(
            optax.apply_updates(state.theta, updates),
            optax.tree.where(usable, meta_opt_state, state.meta_opt_state),
            updates,
            grad_norm,
        )

    start = state._replace(estimator_state=())
    return compiled_apart(update, start, grad, witness=state.step)
