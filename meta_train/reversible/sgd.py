"""SGD with momentum that can be walked back exactly, and its hypergradients."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from meta_train.reversible.arithmetic import (
    SINGLE,
    FixedPoint,
    SpillPlan,
    check_fixed_point,
    dequantize,
    plan_spills,
    snap,
)
from meta_train.reversible.dynamics import (
    Cotangents,
    Dynamics,
    Run,
    float_step,
    push,
    reverse,
    run,
)
from meta_train.reversible.report import Report, first, poison
from meta_train.reversible.resolution import of_descent
from meta_train.reversible.schedule import (
    check_schedule,
    expand,
    merge,
    smallest_numerators,
    split,
)

Params = Any
Loss = Callable[[Params, Any, jax.Array], jax.Array]
Objective = Callable[[Params, Any], jax.Array]


class Setup(NamedTuple):
    """Everything that decides a training run; also what hypergradients are shaped like.

    All floats are float32, or all are float64; Python floats are either.

    A schedule is a pytree prefix of ``params``: one array for all parameters, or one per
    layer. Each array is ``[]`` (constant), ``[T]`` (per step), ``[T, *shape]`` or
    ``[1, *shape]`` (per parameter, per step or constant), with ``shape`` that of the tensor.

    Attributes:
      params: initial weights, a pytree of float arrays of one dtype.
      learning_rates: a schedule, of any sign.
      momenta: a schedule in [0, 1], rounded to multiples of ``2^-decay_bits``: 0 to one of
        them (an exact 0 would have to store the whole velocity), and all below 1 to at most
        one below (rounded to 1, training would stand still).
      velocity: initial velocity, like ``params``.
      theta: whatever else the loss depends on: a float pytree.
    """

    params: Params
    learning_rates: Any
    momenta: Any
    velocity: Params
    theta: Any = ()


class Trained(NamedTuple):
    """The outcome of training; NaN where the run failed, with the reason in ``report``.

    Attributes:
      params: final weights.
      velocity: final velocity, like ``params``.
      losses: float ``[T]``, the training loss at each step before its update.
      report: see ``report.explain``.
      tape_bits: bits per parameter of tape and buffer, a Python int.
      bound_bits: bits per parameter that the momenta destroy, a Python float.
    """

    params: Params
    velocity: Params
    losses: jax.Array
    report: Report
    tape_bits: int
    bound_bits: float


def setup(params: Params, learning_rates: Any, momenta: Any, theta: Any = ()) -> Setup:
    """A run that starts at rest; schedules may be Python floats."""
    dtype = jnp.result_type(*jax.tree.leaves(params), jnp.float32)
    as_float = lambda tree: jax.tree.map(lambda x: jnp.asarray(x, dtype), tree)  # noqa: E731
    velocity = jax.tree.map(jnp.zeros_like, params)
    return Setup(params, as_float(learning_rates), as_float(momenta), velocity, theta)


def train(
    loss: Loss,
    start: Setup,
    *,
    num_steps: int,
    fixed: FixedPoint = SINGLE,
    momentum_floor: float | None = None,
) -> Trained:
    """SGD with momentum: ``v <- m v - (1 - m) g;  w <- w + lr v``.

    Args:
      loss: ``(params, theta, step) -> scalar``; ``step`` is an int32 scalar, with which to
        pick the batch.
      start: weights, schedules and the rest.
      num_steps: ``T``.
      fixed: resolution of the exact state; ``DOUBLE`` for float64.
      momentum_floor: no momentum is below this; needed inside `jit`, where the momenta that
        size the tape are not known yet.

    Raises:
      ValueError: on a momentum outside [0, 1], a schedule of a wrong shape, parameters that
        are not real floats, anything of another dtype than theirs, or traced momenta without
        ``momentum_floor``.
      TypeError: when `jax.grad` or the like differentiates it; see ``hypergradients``.
    """
    problem = _problem(loss, start, num_steps, fixed, momentum_floor)
    return _outcome(_run(problem), problem)


def hypergradients(
    loss: Loss,
    objective: Objective,
    start: Setup,
    *,
    num_steps: int,
    fixed: FixedPoint = SINGLE,
    momentum_floor: float | None = None,
) -> tuple[jax.Array, Setup, Trained]:
    """The derivatives of ``objective(final params, theta)`` with respect to all of ``start``.

    Exact for the run as trained, in the memory of one step and the tape: what backpropagation
    through the run gives, also where the gradient that training takes is not that of a smooth
    function (``jax.custom_vjp``, ``stop_gradient``, straight-through rounding), whose derivative
    is taken backwards and no symmetry of it assumed. Compute: the run, and about twice that to
    walk back.

    A derivative is of one run. Where training is chaotic an exact one is as useless as any other:
    see the largest learning rates. And where the gradient of ``loss`` jumps, as it does in a
    network of ReLUs, the outcome of training jumps in ``start``: derivatives between the jumps
    see none of them, and their mean over random runs is not the derivative of the mean outcome.
    Use smooth activations, or evolution strategies.

    Args:
      objective: ``(params, theta) -> scalar``, differentiated in both.
      Others: as in ``train``.

    Returns:
      ``(value, gradients, trained)``: gradients are shaped like ``start``, and NaN if the
      run failed, its reversal was not exact to the bit, or what it adds up is rounded away by
      the grid (``resolution``); ``trained.report`` says why.

    Raises:
      ValueError, TypeError: as ``train``; there are no second derivatives. Or the gradient of
        ``loss`` cannot itself be differentiated backwards.

    Source: Maclaurin, Duvenaud, Adams 2015, Algorithm 2, with its misprinted indices mended.
    """
    problem = _problem(loss, start, num_steps, fixed, momentum_floor)
    ended = _run(problem)
    trained = _outcome(ended, problem)
    value, (d_params, d_theta) = jax.value_and_grad(objective, argnums=(0, 1))(
        trained.params, problem.theta[0]
    )
    cotangents = Cotangents(
        ravel_pytree(d_params)[0],
        jnp.zeros_like(problem.velocity),
        jnp.zeros_like(ended.observed),
    )
    gradients, report, _ = reverse(*problem.arguments, ended, cotangents)
    theta_run, constants = gradients.theta
    learning_rates, momenta = jax.tree.map(
        lambda like, c, v: (v if c is None else c).reshape(jnp.shape(like)),
        (start.learning_rates, start.momenta),
        constants,
        gradients.hypers,
    )
    result = Setup(
        problem.unravel(gradients.weights),
        learning_rates,
        momenta,
        problem.unravel(gradients.accumulators[0]),
        poison(report.ok, jax.tree.map(jnp.add, d_theta, theta_run)),
    )
    return value, result, trained._replace(report=report)


def naive_reversal(
    loss: Loss, start: Setup, *, num_steps: int, fixed: FixedPoint = SINGLE
) -> jax.Array:
    """Trains in ordinary floats and solves every step backwards, for comparison only.

    Each division by the momentum magnifies what rounding lost, so the error grows like
    ``momentum^-steps``. Memory: all ``T`` states, to compare with.

    Returns:
      The largest error of the recovered weights at each step, ``[T]``.
    """
    problem = _problem(loss, start, num_steps, fixed, None)
    dynamics, theta = problem.dynamics, problem.theta

    def forward(carry, xs):
        w, v, _ = float_step(dynamics, theta, *xs, *carry)
        return (w, v), carry[0]

    def backward(carry, xs):
        (w, v), ((hyper, t), w_true) = carry, xs
        w = w - dynamics.move(theta, hyper, v, t)
        absorbed = push(dynamics, theta, hyper, w, t)[2]
        v = (v - absorbed) / dynamics.decay(theta, hyper)
        return (w, v), jnp.max(jnp.abs(w - w_true))

    xs = (problem.hypers, problem.steps)
    end, weights = jax.lax.scan(forward, (problem.weights, problem.velocity), xs)
    return jax.lax.scan(backward, end, (xs, weights), reverse=True)[1]


class _Problem(NamedTuple):
    """``Setup`` in the flat form of ``dynamics``."""

    dynamics: Dynamics
    theta: Any
    hypers: Any
    steps: jax.Array
    weights: jax.Array
    velocity: jax.Array
    plan: SpillPlan
    fixed: FixedPoint
    unravel: Callable[[jax.Array], Params]
    schedules: tuple[Any, Any]

    @property
    def arguments(
        self,
    ) -> tuple[Dynamics, Any, Any, jax.Array, jax.Array, jax.Array, SpillPlan, FixedPoint]:
        """Those of ``run``."""
        return (
            self.dynamics,
            self.theta,
            self.hypers,
            self.steps,
            self.weights,
            self.velocity,
            self.plan,
            self.fixed,
        )


def _problem(loss, start, num_steps, fixed, momentum_floor) -> _Problem:
    check_fixed_point(fixed)
    if num_steps != int(num_steps) or num_steps < 1:
        raise ValueError(f"`num_steps` must be an integer of at least 1, got {num_steps}.")
    _check_start(start)
    dtype = jnp.result_type(*jax.tree.leaves(start.params))
    start = jax.tree.map(lambda x: _strongly_typed(x, dtype), start)
    _check_theta(start.theta, dtype)
    found = jax.eval_shape(loss, start.params, start.theta, jnp.int32(0))
    if found.shape != () or found.dtype != dtype:
        raise ValueError(
            f"`loss` must return a {dtype} scalar like `params`, got {found.dtype} of shape "
            f"{found.shape}; reduce it, and cast the data it closes over."
        )
    rates = check_schedule("learning_rates", start.learning_rates, start.params, num_steps)
    momenta = check_schedule("momenta", start.momenta, start.params, num_steps)
    plan = plan_spills(
        smallest_numerators(momenta, num_steps, fixed, momentum_floor), fixed.decay_bits
    )
    weights, unravel = ravel_pytree(start.params)
    velocity = ravel_pytree(start.velocity)[0][None]
    momenta = jax.tree.map(lambda m: snap(m, fixed.decay_bits), momenta)
    constants, varying = split((rates, momenta))

    def schedules(theta, hyper):
        rate, momentum = merge(theta[1], hyper)
        return expand(rate, start.params), expand(momentum, start.params)

    def flat_loss(theta, weights, step):
        return loss(unravel(weights), theta[0], step)

    def decay(theta, hyper):
        return schedules(theta, hyper)[1].reshape(1, -1)

    def absorb(theta, hyper, gradient, step):
        del step
        return (schedules(theta, hyper)[1] - 1.0) * gradient[None]

    def move(theta, hyper, velocity, step):
        del step
        return schedules(theta, hyper)[0] * velocity[0]

    dynamics = Dynamics(flat_loss, decay, absorb, move)
    steps = jnp.arange(num_steps, dtype=jnp.int32)
    theta = (start.theta, constants)
    return _Problem(
        dynamics,
        theta,
        varying,
        steps,
        weights,
        velocity,
        plan,
        fixed,
        unravel,
        (rates, momenta),
    )


def _run(problem: _Problem) -> Run:
    """The run; failed, too, where rounding to the grid has spoilt it."""
    ended = run(*problem.arguments)
    spoilt = of_descent(
        problem.unravel(problem.weights),
        problem.unravel(problem.velocity[0]),
        *problem.schedules,
        ended.travel,
        problem.steps.size,
        problem.fixed,
    )
    return ended._replace(report=first(ended.report, spoilt))


def _outcome(ended: Run, problem: _Problem) -> Trained:
    fixed, dtype = problem.fixed, problem.weights.dtype
    with jax.enable_x64(True):
        weights = dequantize(ended.weights, fixed.weight_bits, dtype)
        velocity = dequantize(ended.accumulators[0], fixed.accumulator_bits, dtype)
    weights, velocity = poison(ended.report.ok, (weights, velocity))
    plan = problem.plan
    return Trained(
        problem.unravel(weights),
        problem.unravel(velocity),
        ended.losses,
        ended.report,
        plan.tape_bits,
        plan.bound_bits,
    )


def _strongly_typed(x, dtype) -> jax.Array:
    """Python floats, and arrays made of them, take the type of what they meet: ``dtype``."""
    x = jnp.asarray(x)
    weak = jnp.issubdtype(x.dtype, jnp.floating) and x.weak_type
    return jax.lax.convert_element_type(x, dtype if weak else x.dtype)


def _check_start(start: Setup) -> None:
    leaves = jax.tree_util.tree_leaves_with_path(start.params)
    if not any(jnp.size(leaf) for _, leaf in leaves):
        raise ValueError(
            f"`params` must hold at least one number, got {len(leaves)} arrays, all of size 0: "
            "there is nothing to train."
        )
    for path, leaf in leaves:
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            raise ValueError(
                f"`params` must be real floats, got {jnp.result_type(leaf)} at params"
                f"{jax.tree_util.keystr(path)}; cast them, or split complex numbers into parts."
            )
    dtypes = {str(jnp.result_type(leaf)) for _, leaf in leaves}
    if len(dtypes) > 1 or not dtypes <= {"float32", "float64"}:
        raise ValueError(
            f"`params` must all be float32 or all float64, got {sorted(dtypes)}; cast them to one."
        )
    like = [
        jax.tree.map(lambda x: (jnp.shape(x), str(jnp.result_type(x))), tree)
        for tree in (start.params, start.velocity)
    ]
    if like[0] != like[1]:
        raise ValueError(
            "`velocity` must have the structure, shapes and dtypes of `params`, got (shape, dtype) "
            f"{like[1]} for params {like[0]}."
        )


def _check_theta(theta, dtype) -> None:
    for path, leaf in jax.tree_util.tree_leaves_with_path(theta):
        if leaf.dtype != dtype:
            raise ValueError(
                f"`theta` must be {dtype} like `params`, got {leaf.dtype} at theta"
                f"{jax.tree_util.keystr(path)}; cast it, and let `loss` close over what is not "
                "differentiated."
            )
