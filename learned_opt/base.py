"""The learned optimizer: a function of meta-parameters theta that acts as an optax optimizer."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from learned_opt.arguments import check_loss
from learned_opt.limits import finite_loss

Theta = Any

# Arguments that say what meta-training moves, or how it is computed; theta is the same whatever
# they are.
WITHOUT_PART_IN_THETA = ("phase", "bfloat16")


class ReversibleUpdate(NamedTuple):
    """An update on flat parameters ``[P]``, in the parts that let it be undone.

    ``a <- decays * a + absorb(g);  w <- w + move(theta, a, count, sizes)``

    Attributes:
      decays: ``K`` floats, one for each accumulator.
      absorb: ``gradient [P] -> [K, P]``.
      move: ``(theta, accumulators [K, P], count, sizes) -> [P]``, with ``sizes`` the number
        of parameters in each tensor.
    """

    decays: tuple[float, ...]
    absorb: Callable[[jax.Array], jax.Array]
    move: Callable[[Theta, jax.Array, jax.Array, tuple[int, ...]], jax.Array]


class LearnedOptimizer(NamedTuple):
    """An optimizer with meta-parameters ``theta``, as two pure functions.

    Attributes:
      init: ``key -> theta``. Fresh meta-parameters, a pytree of float arrays (for a
        Flax module: its variables).
      bind: ``(theta, num_steps) -> optax.GradientTransformationExtraArgs``. The
        optimizer that ``theta`` encodes, told that it will run for ``num_steps``
        inner steps (an int or a traced scalar; only schedules read it). What is
        meta-trained is exactly what ``bind`` returns, so a trained optimizer runs in
        any optax loop: in ``optax.chain``, and under ``jit``, ``vmap`` and ``scan``.
      reversible: the same update in parts that can be undone, from the few optimizers
        that have them.
      moves_without_gradient: whether a parameter moves whose gradient has been exactly 0
        in every step (``mask_zero_gradients`` stops it).
      held: the keys of ``theta["params"]`` that meta-training leaves as they are.
    """

    init: Callable[[jax.Array], Theta]
    bind: Callable[[Theta, Any], optax.GradientTransformationExtraArgs]
    reversible: ReversibleUpdate | None = None
    moves_without_gradient: bool = False
    held: tuple[str, ...] = ()


@dataclass(frozen=True)
class OptimizerConfig:
    """The kind of all learned optimizers: an optimizer's architecture as values.

    An optimizer is a frozen dataclass derived from this one, or a plain function that returns a
    ``LearnedOptimizer``; its arguments, each with a default, are then the fields.
    """

    def make(self) -> LearnedOptimizer:
        """The learned optimizer."""
        raise NotImplementedError(f"{type(self).__name__} must define `make`.")


def learned_optimizer(
    init: Callable[[jax.Array], Theta],
    bind: Callable[[Theta, Any], optax.GradientTransformation],
    *,
    reversible: ReversibleUpdate | None = None,
    moves_without_gradient: bool = False,
    held: tuple[str, ...] = (),
) -> LearnedOptimizer:
    """A ``LearnedOptimizer`` that keeps the rules below, whatever ``bind`` does.

    What ``bind`` returns sees arrays of float32 (float64 where a parameter is float64): gradients
    and parameters of the same shapes, some of size 0 perhaps, at least one not. Around it:

    - accumulators are as wide as that, however narrow the parameters, and keep their types;
    - so is the loss, ``value``, where it is given; one that is not finite counts as 1.2e18 (see
      ``limits.finite_loss``), so that no average of losses is lost to it;
    - updates have the types of the parameters (if none are given, of the gradients);
    - ``None`` leaves are passed over, Python floats are scalars, and a tree without elements
      (a group of ``optax.multi_transform`` that got no parameters) is left as it is.

    Raises:
      ValueError: from the result's ``bind``, on a ``num_steps`` below 1 or not whole; from the
        transformation, by the name of the leaf, on gradients or parameters that are complex or
        no floats, gradients that differ from the parameters in structure or shape, or a ``value``
      that is no real number of shape ().
    """

    def bind_by_rules(theta, num_steps):
        _check_num_steps(num_steps)
        return _by_rules(optax.with_extra_args_support(check_bound(bind(theta, num_steps))))

    return LearnedOptimizer(init, bind_by_rules, reversible, moves_without_gradient, held)


def check_bound(made: Any) -> Any:
    """What a ``bind`` returned; raises ``ValueError`` unless it is an optax transformation."""
    if not isinstance(made, optax.GradientTransformation):
        raise ValueError(
            "`bind` of the learned optimizer must return an optax.GradientTransformation, got a "
            f"{getattr(made, '__name__', type(made).__name__)}."
        )
    return made


def _by_rules(
    inner: optax.GradientTransformationExtraArgs,
) -> optax.GradientTransformationExtraArgs:
    def init(params):
        _check_leaves("params", params)
        return inner.init(_widened(params, params))

    def update(updates, state, params=None, *, value=None, **extra):
        if value is not None:
            check_loss(value)
        _check_order(updates, state, params)
        _check_leaves("updates", updates)
        like = updates if params is None else params
        _check_leaves("params", like)
        _check_same_shapes(updates, like)
        if not any(map(np.size, jax.tree.leaves(like))):
            return jax.tree.map(lambda p: jnp.zeros(np.shape(p), jnp.result_type(p)), like), state
        wide_params = None if params is None else _widened(params, params)
        if value is not None:
            dtype = jnp.result_type(jnp.float32, *jax.tree.leaves(_widened(like, like)))
            extra["value"] = finite_loss(value, dtype)
        steps, after = inner.update(_widened(updates, like), state, wide_params, **extra)
        steps = jax.tree.map(lambda s, p: _cast(s, jnp.result_type(p)), steps, like)
        return steps, jax.tree.map(_like_before, after, state)

    return optax.GradientTransformationExtraArgs(init, update)


def _widened(tree, params):
    def widen(x, param):
        is_double = jnp.result_type(param) == jnp.float64
        return _cast(x, jnp.float64 if is_double else jnp.float32)

    return jax.tree.map(widen, tree, params)


def _cast(x, dtype) -> jax.Array:
    # Also makes arrays of Python floats, and strong types of weak ones; else costs nothing.
    return jax.lax.convert_element_type(x, dtype)


def _like_before(after, before):
    # A theta of float64 would widen the state, and a loop could not carry it.
    is_float = jnp.issubdtype(jnp.result_type(before), jnp.floating)
    return _cast(after, jnp.result_type(before)) if is_float else after


def _check_order(updates: Any, state: Any, params: Any) -> None:
    structures: Any = map(jax.tree.structure, (updates, state, params))
    found, of_state, of_params = structures
    if params is not None and found == of_state != of_params:
        raise ValueError(
            "`update` takes `(updates, state, params)`, got the parameters as `state`; swap the "
            "last two."
        )


def _check_leaves(argument: str, tree: Any) -> None:
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        dtype = getattr(leaf, "dtype", None)
        if dtype is None and isinstance(leaf, float | int | complex):
            dtype = jnp.result_type(leaf)
        if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
            is_complex = dtype is not None and jnp.issubdtype(dtype, jnp.complexfloating)
            remedy = (
                "wrap the optimizer in `optax.contrib.split_real_and_imaginary`"
                if is_complex
                else "make it a float, or leave it out with `optax.masked`"
            )
            given = "float0" if dtype == jax.dtypes.float0 else dtype or type(leaf).__name__
            raise ValueError(
                f"`{argument}` must hold real floats, got {given} {_name(path)}; {remedy}."
            )


def _check_same_shapes(updates: Any, params: Any) -> None:
    given, expected = (str(jax.tree.structure(tree)) for tree in (updates, params))
    if given != expected:
        raise ValueError(
            f"`updates` must have the structure of `params`, got {given} for {expected}; give the "
            "gradient with respect to `params`."
        )
    leaves = jax.tree_util.tree_leaves_with_path(updates)
    for (path, update), param in zip(leaves, jax.tree.leaves(params), strict=True):
        if np.shape(update) != np.shape(param):
            raise ValueError(
                f"`updates` must have the shapes of `params`, got {np.shape(update)} for "
                f"{np.shape(param)} {_name(path)}; give the gradient with respect to `params`."
            )


def _check_num_steps(num_steps: Any) -> None:
    if isinstance(num_steps, jax.core.Tracer):
        is_number, is_count = num_steps.shape == (), True
    else:
        is_number = not isinstance(num_steps, bool | str) and np.ndim(num_steps) == 0
        is_number = is_number and np.asarray(num_steps).dtype.kind in "iuf"
        is_count = is_number and 1 <= num_steps <= 2**30 and num_steps == int(num_steps)
    if not (is_number and is_count):
        raise ValueError(
            f"`num_steps` must be a whole number of at least 1, at most 2^30, got "
            f"num_steps={num_steps!r}; give the steps that the inner run will take."
        )


def _name(path: tuple) -> str:
    return f"at {jax.tree_util.keystr(path)}" if path else "(an array without a name)"
