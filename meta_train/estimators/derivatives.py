"""What of a state a derivative exists for, a step as a function of it, and whether it has one.

What every estimator that differentiates the loss is unbiased for is the *mean of the derivative*.
That is the derivative of the mean loss, which an optimizer of theta wants, only where the loss of
an episode does not jump in theta. It jumps where the inner gradient does: with a ReLU network or
clipping inside, a small change of theta moves a weight across the kink, and all that follows. A
derivative sees no jump, however many there are, so the two can differ in size and in sign
(the mean loss is smooth in theta all the same: its jumps are spread by the draws). Estimators that
only evaluate the loss, such as ``pes``, ``nres`` and ``full_es``, count the jumps. With smooth
activations (tanh, GELU) and no clipping there are none, and all agree.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.extend.core import Literal

from meta_train.checks import HORIZON, dtype_of
from meta_train.estimators.horizons import Horizons
from meta_train.estimators.particles import Particle
from meta_train.unroll import UnrolledSystem, unroll


def float_leaves(tree: Any) -> list[jax.Array]:
    """What a derivative exists for, as real arrays; counters and PRNG keys are left out.

    A complex leaf is two of them, its real and its imaginary part: it has that many dimensions.
    """
    floats = []
    for x in jax.tree.leaves(tree):
        if jnp.issubdtype(dtype_of(x), jnp.complexfloating):
            floats += [jnp.real(x), jnp.imag(x)]
        elif jnp.issubdtype(dtype_of(x), jnp.floating):
            floats.append(x)
    return floats


def replace_floats(tree: Any, floats: list[jax.Array]) -> Any:
    """``tree`` with what ``float_leaves`` gave of it replaced, in order."""
    leaves, structure = jax.tree.flatten(tree)
    new = iter(floats)

    def replaced(x):
        if jnp.issubdtype(dtype_of(x), jnp.complexfloating):
            return jax.lax.complex(next(new), next(new))
        return next(new) if jnp.issubdtype(dtype_of(x), jnp.floating) else x

    return jax.tree.unflatten(structure, [replaced(x) for x in leaves])


def step_on_floats(system: UnrolledSystem, state: Any, key: jax.Array) -> Callable:
    """A step to differentiate: ``(theta, floats) -> ((new_floats, loss), new_state)``.

    ``floats`` stands for ``float_leaves(state)``; the whole new state is the auxiliary output.
    """

    def step(theta, floats):
        new_state, loss = system.step(theta, replace_floats(state, floats), key)
        return (float_leaves(new_state), loss), new_state

    return step


def _reached(jaxpr, sources: set) -> list[bool]:
    """Which outputs of ``jaxpr`` depend on any of the variables ``sources``."""
    reached = set(sources)

    def depends(value):
        return not isinstance(value, Literal) and value in reached

    for equation in jaxpr.eqns:
        if any(map(depends, equation.invars)):
            reached.update(equation.outvars)
    return [depends(value) for value in jaxpr.outvars]


def check_differentiable(name: str, system: UnrolledSystem, theta: Any, key: jax.Array) -> None:
    """Raises ``ValueError`` if the loss has no derivative, or one that is zero everywhere.

    Linearizes the start and one step (nothing is computed), and asks whether the tangent of the
    loss depends on that of theta, directly or through states that themselves depend on it: that
    of a count, an accuracy or a discrete action does not.
    """

    def tangents(key, horizon, dtheta, dfloats):
        def start(theta):
            return float_leaves(system.init(theta, key, horizon))

        initial = system.init(theta, key, horizon)
        step = step_on_floats(system, initial, key)
        begun = jax.linearize(start, theta)[1](dtheta)
        _, pushforward, _ = jax.linearize(step, theta, float_leaves(initial), has_aux=True)
        return begun, pushforward(dtheta, dfloats)

    shapes = jax.eval_shape(lambda *args: float_leaves(system.init(*args)), theta, key, HORIZON)
    num = len(shapes)
    jaxpr = jax.make_jaxpr(tangents)(key, HORIZON, theta, shapes).jaxpr
    inputs = jaxpr.invars[2:]
    thetas, floats = inputs[: len(inputs) - num], inputs[len(inputs) - num :]
    moved: set = set()  # States that move with theta, after some step or other.
    while True:
        reached = _reached(jaxpr, {*thetas, *(floats[i] for i in moved)})
        if reached[-1]:
            return
        more = {i for i in range(num) if reached[i] or reached[num + i]}
        if more <= moved:
            break
        moved |= more
    raise ValueError(
        f"`{name}` differentiates the loss, but the derivative of this loss is zero wherever it "
        "exists; use an estimator that only evaluates it, such as `pes`, `nres` or `full_es`."
    )


def resting_after_horizon(
    system: UnrolledSystem, horizons: Horizons, horizon: jax.Array
) -> UnrolledSystem:
    """The system, resting in the last state of an episode of ``horizon`` steps.

    For backpropagation: ``episode_loss`` masks the losses of later steps, but a derivative of
    theirs that is not finite would make its product with zero not a number.
    """
    if horizons.fixed:
        return system
    run = _resting(system, horizon)
    return run._replace(init=lambda *args: (system.init(*args), jnp.int32(0)))


def unroll_window(
    system: UnrolledSystem,
    theta: Any,
    particle: Particle,
    horizons: Horizons,
    key: jax.Array,
    truncation: int,
) -> tuple[Any, jax.Array]:
    """``unroll`` through a particle's next truncation, for backpropagation.

    Where its episode ends within the truncation, the system rests: see ``resting_after_horizon``.
    """
    if not np.any(horizons.values % truncation):
        return unroll(system, theta, particle.states, key, truncation)
    run = _resting(system, particle.horizon)
    start = particle.states, particle.position
    (state, _), losses = unroll(run, theta, start, key, truncation)
    return state, losses


def _resting(system: UnrolledSystem, horizon: jax.Array) -> UnrolledSystem:
    """The system with states ``(state, position)``, which takes the last of ``horizon`` steps
    again and again: what is finite there stays so."""

    def step(theta, state, key):
        inner, position = state
        moved, loss = system.step(theta, inner, key)
        return (optax.tree.where(position + 1 < horizon, moved, inner), position + 1), loss

    return UnrolledSystem(system.init, step)
