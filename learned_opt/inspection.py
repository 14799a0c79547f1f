"""What an optimizer costs and reads, found by asking and tracing it."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.extend import core

from learned_opt.base import LearnedOptimizer

# Networks that optimizers are asked about: so many parameters, in so many tensors, the first
# number that an optimizer takes.
SMALL, LARGE = 2_000, 1_000_000
_MOST_TENSORS = 64

# What an update computes may depend on something only some steps later.
_STEPS = 3


class Reading(NamedTuple):
    """Whether updates depend on something, and whether they can be made without it."""

    used: bool
    needed: bool


class Inspection(NamedTuple):
    """What is found of an optimizer.

    Attributes:
      num_meta_parameters: numbers in theta.
      state_bytes: ``network -> bytes`` of the state for each of its parameters, in float32; the
        networks are ``SMALL`` and ``LARGE``, in parameters.
      adam_bytes: the same of ``optax.adam``.
      reads: of ``params``, ``value`` (the loss) and ``num_steps``.
      num_tensors: tensors of the networks that it was asked about.
      moves_without_gradient: as in ``LearnedOptimizer``.
    """

    num_meta_parameters: int
    state_bytes: dict[int, float]
    adam_bytes: dict[int, float]
    reads: dict[str, Reading]
    num_tensors: int
    moves_without_gradient: bool


def inspect(optimizer: LearnedOptimizer) -> Inspection:
    """Asks for shapes and traces three updates; nothing is computed.

    What an update reads is what its results depend on in the traced program. A loop counts as
    depending on all that enters it, so the answer may be yes where a closer look would say no.

    Raises:
      ValueError: if the optimizer takes no network of 1 to 64 tensors.
    """
    theta = jax.eval_shape(optimizer.init, jax.eval_shape(lambda: jax.random.key(0)))
    num_tensors = _tensors_taken(optimizer, theta)
    networks = {size: _network(num_tensors, size) for size in (SMALL, LARGE)}
    adam = optax.adam(1e-3)
    return Inspection(
        sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(theta)),
        {size: _state_bytes(_init(optimizer, theta), p) for size, p in networks.items()},
        {size: _state_bytes(adam.init, p) for size, p in networks.items()},
        _readings(optimizer, theta, networks[SMALL]),
        num_tensors,
        optimizer.moves_without_gradient,
    )


def _network(num_tensors: int, size: int) -> list[jax.ShapeDtypeStruct]:
    """Square matrices and vectors in turns, of about ``size`` numbers."""
    width = round((size / math.ceil(num_tensors / 2)) ** 0.5)
    shapes = [(width, width), (width,)] * num_tensors
    return [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes[:num_tensors]]


def _init(optimizer, theta):
    """``params -> state``, for a theta whose shapes are known."""
    return lambda params: jax.eval_shape(lambda t: optimizer.bind(t, 1000).init(params), theta)


def _tensors_taken(optimizer, theta) -> int:
    for count in (4, *range(1, _MOST_TENSORS + 1)):
        try:
            jax.eval_shape(lambda t, p: optimizer.bind(t, 1000).init(p), theta, _network(count, 64))
        except ValueError as error:
            refusal = error
        else:
            return count
    raise ValueError(
        f"the optimizer takes no network of 1 to {_MOST_TENSORS} tensors; it says: {refusal}"
    )


def _state_bytes(init, params) -> float:
    state = jax.eval_shape(init, params)
    sizes = [math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(state)]
    return sum(sizes) / sum(math.prod(leaf.shape) for leaf in params)


def _readings(optimizer, theta, params) -> dict[str, Reading]:
    def last_updates(theta, grads, given):
        given = dict(given)
        bound = optimizer.bind(theta, given.pop("num_steps"))
        transform = optax.with_extra_args_support(bound)
        state = transform.init(params_like(params))
        for _ in range(_STEPS):
            updates, state = transform.update(grads, state, given.get("params"), **value(given))
        return updates

    def params_like(tree):
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), tree)

    def value(given):
        return {"value": given["value"]} if "value" in given else {}

    def traced(given):
        return jax.make_jaxpr(last_updates)(theta, params, given)

    scalar = jax.ShapeDtypeStruct((), jnp.float32)
    given = {"params": params, "value": scalar, "num_steps": scalar}
    program = traced(given).jaxpr
    live = used_inputs(program, [True] * len(program.outvars))
    live = live[len(jax.tree.leaves((theta, params))) :]

    def needed(name):
        if name == "num_steps":
            return True  # An argument of ``bind``.
        try:
            traced({key: x for key, x in given.items() if key != name})
        except ValueError:
            return True
        return False

    found = {}
    for name in sorted(given):  # As JAX flattens a dict.
        count = len(jax.tree.leaves(given[name]))
        found[name] = Reading(any(live[:count]), needed(name))
        live = live[count:]
    return found


def used_inputs(program: core.Jaxpr, used_outputs: list[bool]) -> list[bool]:
    """Which inputs of a program its used outputs depend on.

    Exact through calls of functions; loops and branches depend on all that enters them.
    """
    live = {
        x
        for x, used in zip(program.outvars, used_outputs, strict=True)
        if used and isinstance(x, core.Var)
    }
    for step in reversed(program.eqns):
        outputs = [x in live for x in step.outvars]
        if not any(outputs):
            continue
        inner = _called(step)
        inputs = used_inputs(inner, outputs) if inner else [True] * len(step.invars)
        live |= {
            x
            for x, used in zip(step.invars, inputs, strict=True)
            if used and isinstance(x, core.Var)
        }
    return [x in live for x in program.invars]


def _called(step: core.JaxprEqn) -> core.Jaxpr | None:
    """The program of a plain call; None of anything else."""
    if step.primitive.name in ("scan", "while", "cond"):
        return None
    inner = step.params.get("jaxpr", step.params.get("call_jaxpr"))
    inner = getattr(inner, "jaxpr", inner)
    if not isinstance(inner, core.Jaxpr):
        return None
    fits = (len(inner.invars), len(inner.outvars)) == (len(step.invars), len(step.outvars))
    return inner if fits else None
