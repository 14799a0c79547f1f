"""What is asked of numbers and of a user's functions, before anything is computed with them.

Every check raises a ``ValueError`` that names the argument, what was given and what to do.
"""

import inspect
import math
import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import keystr, tree_flatten_with_path

# Counts, lengths and what is added to them once more stay below 2^31 - 1, the largest int32.
MAX_LENGTH = 2**30
MAX_COUNT = 2**29

# The least sigma, in spacings of the floats at an entry of theta, from which on rounding the sum of
# both takes less than 2% from the gradient (of a linear loss; measured, and for the two of few
# values, orthogonal ones in one dimension, half a spacing over sigma).
LEAST_SPACINGS = {
    "normal": 0.5,
    "sobol": 0.5,
    "laplace": 1.0,
    "uniform": 4.0,
    "cauchy": 4.0,
    "rademacher": 32.0,
    "orthogonal": 32.0,
}

# What ``UnrolledSystem.init`` is told of the length of an episode.
HORIZON = jax.ShapeDtypeStruct((), jnp.int32)


def check_positive(**values: float) -> None:
    """Raises ``ValueError`` naming the first argument that is not a finite positive number."""
    for name, value in values.items():
        if isinstance(value, jax.core.Tracer):
            continue
        if not _is_number(value) or not (np.isfinite(value) and value > 0):
            raise ValueError(f"`{name}` must be a finite number above 0, got {name}={value!r}.")


def check_decay(**values: float) -> None:
    """Raises ``ValueError`` naming the first argument that is not at least 0 and below 1."""
    for name, value in values.items():
        if not _is_number(value) or not 0 <= value < 1:
            raise ValueError(f"`{name}` must be at least 0 and below 1, got {name}={value!r}.")


def check_whole(minimum: int = 1, maximum: int = MAX_COUNT, **values: Any) -> None:
    """Raises ``ValueError`` naming the first argument that is no whole number in this range."""
    for name, value in values.items():
        if not is_whole(value) or not minimum <= value <= maximum:
            raise ValueError(
                f"`{name}` must be a whole number from {minimum} to {maximum}, got "
                f"{name}={value!r}."
            )


def is_whole(value: Any) -> bool:
    """Whether ``value`` is an integer, of Python, NumPy or JAX; a float never is, nor a bool."""
    if isinstance(value, (bool, np.bool_)):
        return False
    try:
        operator.index(value)
    except TypeError:
        return False
    return True


def _is_number(value: Any) -> bool:
    """Whether ``value`` is one real number; a bool is none."""
    if isinstance(value, bool | np.bool_):
        return False
    try:
        return jnp.shape(value) == () and not jnp.issubdtype(dtype_of(value), jnp.complexfloating)
    except TypeError:
        return False


def check_multiple(horizon: int, truncation: int) -> None:
    """Raises ``ValueError`` unless ``horizon`` is a positive multiple of ``truncation``."""
    for name, value in {"horizon": horizon, "truncation": truncation}.items():
        if not is_whole(value):
            raise ValueError(f"`{name}` must be a whole number, got {name}={value!r}.")
    if truncation < 1 or horizon < 1 or horizon % truncation:
        near = max(1, round(horizon / max(truncation, 1))) * max(truncation, 1)
        raise ValueError(
            f"`horizon` must be a positive multiple of `truncation`, got horizon={horizon}, "
            f"truncation={truncation}; after its end an episode would idle to the end of its "
            f"truncation. Try horizon={near}."
        )


def dtype_of(leaf: Any) -> Any:
    """The dtype of an array, its spec, or a Python number.

    Raises:
      TypeError: if it is none of these.
    """
    if not hasattr(leaf, "dtype") and not isinstance(leaf, (bool, int, float, complex)):
        raise TypeError(f"A {type(leaf).__name__} is no array.")
    return leaf.dtype if hasattr(leaf, "dtype") else jnp.result_type(leaf)


def fixed_types(tree: Any) -> Any:
    """``tree`` with every leaf an array of its own type: no Python or weakly typed numbers.

    Those take the type of what they meet, so a computation would change it on the way.
    """

    def fixed(x):
        if isinstance(x, jax.Array) and not jax.typeof(x).weak_type:
            return x
        return jnp.asarray(x, jnp.result_type(x))

    return jax.tree.map(fixed, tree)


def check_system(system: Any, theta: Any, key: jax.Array) -> None:
    """Asks what types ``system`` makes of theta; nothing is computed.

    Raises:
      ValueError: if theta is empty or not of real floats, ``init`` does not take the horizon,
        ``step`` does not return a pair, its state has not the structure, shapes and dtypes of the
        one from ``init``, or its loss is no real float scalar.
    """
    check_theta(theta)
    check_takes(
        "system.init",
        system.init,
        "theta, key, horizon",
        "; the horizon is the number of steps of the episode that starts, for schedules. Add it, "
        "and ignore it if nothing depends on it",
    )
    check_takes("system.step", system.step, "theta, state, key")
    state = jax.eval_shape(lambda *args: fixed_types(system.init(*args)), theta, key, HORIZON)
    result = jax.eval_shape(system.step, theta, state, key)
    if not isinstance(result, (tuple, list)) or len(result) != 2:
        raise ValueError(
            f"`system.step` must return `(state, loss)`, got a {type(result).__name__}"
            f"{f' of {len(result)}' if hasattr(result, '__len__') else ''}."
        )
    check_same_types("system.step", state, result[0])
    check_loss("system.step", result[1])


def check_estimator(estimator: Any, theta: Any, key: jax.Array) -> None:
    """Asks what types an estimator of somebody's own makes of theta; nothing is computed.

    Raises:
      ValueError: if its functions do not take what they are given, a leaf of its state has not the
        particle axis that ``axes`` says it has, ``estimate`` does not return a gradient like
        theta, a state like the one before and the metrics of ``population_mean``.
    """
    check_takes("estimator.init", estimator.init, "theta, key")
    check_takes("estimator.estimate", estimator.estimate, "theta, state, key")
    state = jax.eval_shape(lambda *args: fixed_types(estimator.init(*args)), theta, key)
    counts = set()
    for axis, leaf in zip(*_by_axis(estimator.axes, state), strict=True):
        if axis is None:
            continue
        if not leaf.shape:
            raise ValueError(
                "`estimator.init` must return arrays with a leading particle axis, got one of "
                "shape (); give it that axis, or `axes` a None in its place."
            )
        counts.add(leaf.shape[0])
    if len(counts) > 1:
        raise ValueError(
            "`estimator.init` must return arrays with one leading particle axis, got axes of "
            f"{', '.join(map(str, sorted(counts)))}."
        )
    result = jax.eval_shape(estimator.estimate, theta, state, key)
    if not isinstance(result, (tuple, list)) or len(result) != 3:
        raise ValueError(
            "`estimator.estimate` must return `(grad, state, metrics)`, got a "
            f"{type(result).__name__}"
            f"{f' of {len(result)}' if hasattr(result, '__len__') else ''}."
        )
    grad, after, metrics = result
    for what, expected, found in (("grad", theta, grad), ("state", state, after)):
        shapes = [jax.tree.map(lambda x: (jnp.shape(x), dtype_of(x)), t) for t in (expected, found)]
        if shapes[0] != shapes[1]:
            like = "theta" if what == "grad" else "the state it is given"
            raise ValueError(
                f"`estimator.estimate` must return a {what} with the structure, shapes and dtypes "
                f"of {like}, got {_shown(found)} for {_shown(expected)}."
            )
    missing = [n for n in _METRICS if not isinstance(metrics, dict) or n not in metrics]
    if missing:
        raise ValueError(
            f"`estimator.estimate` must return metrics with {', '.join(_METRICS)}, got "
            f"{', '.join(metrics) if isinstance(metrics, dict) and metrics else 'none'}; take "
            "meta_train.estimators.base.population_mean."
        )


# Those of ``population_mean``.
_METRICS = ("loss", "finite", "grad_sq_norm")


def _by_axis(axes: Any, state: Any) -> tuple[list, list]:
    """The axis of each leaf of the state, and the leaves; ``axes`` is a prefix of its tree."""
    spread = jax.tree.map(
        lambda axis, part: jax.tree.map(lambda _: -1 if axis is None else axis, part),
        axes,
        state,
        is_leaf=lambda axis: axis is None,
    )
    found = [None if axis == -1 else axis for axis in jax.tree.leaves(spread)]
    return found, jax.tree.leaves(state)


def _shown(tree: Any) -> str:
    leaves = [f"{dtype_of(x)}{list(jnp.shape(x))}" for x in jax.tree.leaves(tree)]
    return f"{', '.join(leaves[:6])}{', ...' if len(leaves) > 6 else ''}"


def check_takes(name: str, fn: Callable, arguments: str, why: str = "") -> None:
    """Raises ``ValueError`` unless ``fn`` can be called with these arguments, by position."""
    try:
        inspect.signature(fn).bind(*arguments.split(", "))
    except TypeError:
        raise ValueError(
            f"`{name}` must take ({arguments}), got one that takes {inspect.signature(fn)}{why}."
        ) from None
    except ValueError:  # Nothing is known of the arguments of some functions not in Python.
        return


def check_theta(theta: Any) -> None:
    """Raises ``ValueError`` unless theta is a tree of real float arrays with an entry in all."""
    size = 0
    for path, leaf in tree_flatten_with_path(theta)[0]:
        try:
            dtype = dtype_of(leaf)
            real = jnp.issubdtype(dtype, jnp.floating)
        except TypeError:
            dtype, real = type(leaf).__name__, False
        if not real:
            raise ValueError(
                f"`theta` must hold real floats only, got {dtype} at `theta{keystr(path)}`: it has "
                "no gradient. Convert it to a float (a complex one to its real and imaginary "
                "parts), or keep it out of theta."
            )
        size += math.prod(jnp.shape(leaf))
    if not size:
        raise ValueError(
            f"`theta` must have at least one entry, got an empty one, {theta}: there is nothing to "
            "train. Give it an array of floats."
        )


def check_loss(where: str, loss: Any) -> None:
    """Raises ``ValueError`` unless the ``loss`` (or its spec) is one real float of shape ()."""
    leaves = jax.tree.leaves(loss)
    if len(leaves) != 1 or leaves[0] is not loss:
        raise ValueError(
            f"`{where}` must give a loss that is one array of shape (), got a "
            f"{type(loss).__name__} of {len(leaves)} arrays; add them up to one number."
        )
    shape, dtype = jnp.shape(loss), dtype_of(loss)
    if shape or not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(
            f"`{where}` must give a loss that is a real float of shape (), got {dtype} of shape "
            f"{shape}; reduce it with `jnp.mean` or `jnp.sum`, and convert it with "
            "`.astype(float)`, a complex one with `jnp.real`."
        )


def check_same_types(where: str, state: Any, new_state: Any) -> None:
    """Raises ``ValueError`` unless a step leaves structure, shapes and dtypes of the state."""
    structures: Any = [jax.tree.structure(tree) for tree in (state, new_state)]
    structure, new_structure = structures
    if structure != new_structure:
        raise ValueError(
            f"`{where}` must give a state structured like the one it got, got {new_structure} from "
            f"{structure}; put everything that the state will hold into `init`."
        )
    old, new = (tree_flatten_with_path(tree)[0] for tree in (state, new_state))
    for (path, a), (_, b) in zip(old, new, strict=True):
        if (jnp.shape(a), dtype_of(a)) != (jnp.shape(b), dtype_of(b)):
            raise ValueError(
                f"`{where}` must leave the shapes and dtypes of the state, got {dtype_of(b)} of "
                f"shape {jnp.shape(b)} from {dtype_of(a)} of shape {jnp.shape(a)} at `state"
                f"{keystr(path)}`; convert it at the end of the step, or start so in `init`."
            )


def lost_share(theta: Any, sigma: Any, sampler: str = "normal") -> jax.Array:
    """The share of theta's entries that a perturbation of ``sigma`` mostly leaves as they are.

    ``theta + eps`` rounds to ``theta`` where ``eps`` is below half the spacing of floats there. If
    that is sigma, so are 68% of normal draws, and rounding of the others still makes up for them
    but for 1.4% of the gradient; with half that sigma 0.43 of it is left, with a third 0.05. Draws
    of fewer or rarer values need a larger sigma for that (``LEAST_SPACINGS``). An entry
    that is 0 is never lost.
    """
    leaves = [jnp.abs(jnp.asarray(x)) for x in jax.tree.leaves(theta)]
    most = sigma / LEAST_SPACINGS[sampler]
    lost = [jnp.nextafter(x, jnp.full_like(x, jnp.inf)) - x > most for x in leaves]
    return jnp.stack([jnp.sum(x) for x in lost]).sum() / sum(x.size for x in leaves)


def check_sigma(sigma: Any, theta: Any, sampler: str = "normal") -> None:
    """Raises ``ValueError`` if ``sigma`` is too small for the dtype of theta, or too large.

    Nothing is known, and nothing refused, while theta or sigma is traced (in ``jax.jit``).
    """
    if any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves((sigma, theta))):
        return
    for path, leaf in tree_flatten_with_path(theta)[0]:
        if not jnp.size(leaf):
            continue
        with jax.ensure_compile_time_eval():  # A constant of a traced function is known too.
            share, largest = (
                float(lost_share([leaf], sigma, sampler)),
                float(jnp.max(jnp.abs(leaf))),
            )
        if share:
            raise ValueError(
                f"`sigma` must move every entry of theta, got sigma={sigma}: with {dtype_of(leaf)} "
                f"at `theta{keystr(path)}`, {share:.0%} of the entries, up to {largest:.3g}, are "
                f"left as they are by {sampler} draws, or moved by other lengths, since the sum is "
                f"rounded. Raise sigma, rescale theta, or use float64."
            )
        info = jnp.finfo(dtype_of(leaf))
        if not float(info.tiny) <= float(sigma) ** 2 <= float(info.max):
            raise ValueError(
                f"`sigma` must have a square that {info.dtype} can hold, got sigma={sigma}; "
                "estimates are divided by it. Rescale theta, or use float64."
            )
