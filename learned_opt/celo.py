"""Celo: a small learned rule, and a learned scheduler trained on top of it."""

import math
from typing import NamedTuple

import jax
import optax

from learned_opt import adafactor
from learned_opt.arguments import check_between, check_count, check_given, check_one_of
from learned_opt.base import LearnedOptimizer, learned_optimizer
from learned_opt.controller import Controller, Scheduler, SchedulerState, state_dtype
from learned_opt.groups import group_by_shape, stack, unstack
from learned_opt.small_network import Layers
from learned_opt.thirty_inputs import NUM_INPUTS, NUM_OUTPUTS, scaled_steps

PHASES = (0, 1, 2)


class CeloState(NamedTuple):
    """State of Celo.

    Attributes:
      scheduler: of the scheduler; as it begins in phase 1.
      accumulators: for every shape among the parameters an ``adafactor.Accumulators``, each
        array with an axis of the tensors of that shape before its own.
    """

    scheduler: SchedulerState
    accumulators: tuple[adafactor.Accumulators, ...]


def celo_optimizer(
    hidden_size: int = 64, step_mult: float = 1e-3, exp_mult: float = 1e-3, phase: int = 0
) -> LearnedOptimizer:
    """Celo: a rule of 159 meta-parameters under an LSTM scheduler; 37,089 in all.

    For every parameter thirty inputs (see ``thirty_inputs``) are divided by their root mean square
    over the tensor and pass through an MLP 4-4 with ReLU to a direction ``d`` and a magnitude
    ``m``. The update is ``-s step_mult d exp(exp_mult m) rms(p)``, where ``rms(p)`` is
    ``sqrt(mean(p^2) + 1e-9)`` over the tensor, and ``s`` is a scheduler's, an LSTM that reads the
    loss (``value``) and the step over ``num_steps``. Gradients count as at most 1000, and
    parameters as at most 1.2e18 (float32).

    Its authors meta-train it in two phases: first the rule, without the scheduler
    (``phase=1``), then the scheduler over that rule (``phase=2``, started from the first with
    ``--cfg.init_from``). What a phase does not train it holds still; perturbations of evolution
    strategies still reach it, as with its authors. 1,286 meta-parameters do nothing: layers that
    the authors' code computes and does not use.

    A parameter whose gradient is exactly zero moves all the same: the network has no reason to
    answer zero features with a zero direction. ``mask_zero_gradients`` holds it still.

    Args:
      hidden_size: of the scheduler.
      step_mult: scale of the update.
      exp_mult: scale of the log-magnitude.
      phase: 0: all is trained, and used; 1: the rule is, the scheduler counts as 1; 2: the
        scheduler is, over the rule.

    Raises:
      ValueError: on a size, multiplier or phase out of range.

    Source: Moudgil et al. 2025 (arXiv 2501.12670); `celo.py` in amoudgl/celo. Differs: the limit
    of parameters.
    """
    check_count(hidden_size=hidden_size)
    check_between(0, math.inf, step_mult=step_mult, exp_mult=exp_mult)
    check_one_of(PHASES, phase=phase)
    rule = Layers((NUM_INPUTS, 4, 4, NUM_OUTPUTS))
    scheduler = Scheduler(Controller(hidden_size, num_controls=1))

    def init(key):
        keys = jax.random.split(key)
        both = {"rule": rule.init(keys[0]), "scheduler": scheduler.init(keys[1])}
        return {"params": {name: variables["params"] for name, variables in both.items()}}

    def bind(theta, num_steps):
        weights = {name: {"params": part} for name, part in theta["params"].items()}
        layers = rule.apply(weights["rule"])

        def init_fn(params):
            stacks = stack(params, group_by_shape(params))
            accumulators = tuple(jax.vmap(adafactor.init_accumulators)(x) for x in stacks)
            start = scheduler.start(weights["scheduler"], state_dtype(params))
            return CeloState(start, accumulators)

        def update_fn(updates, state, params=None, *, value=None, **extra):
            del extra
            check_given("Celo", params, value)
            multiplier, schedule = 1.0, state.scheduler
            if phase != 1:
                multiplier, schedule = scheduler.advance(
                    weights["scheduler"], state.scheduler, value, num_steps
                )
            groups = group_by_shape(params)
            stacks = zip(
                state.accumulators, stack(updates, groups), stack(params, groups), strict=True
            )
            found = [scaled_steps(exp_mult, False, layers, *group) for group in stacks]
            steps = [-multiplier * step_mult * step for step, _ in found]
            accumulators = tuple(new for _, new in found)
            return unstack(steps, groups, updates), CeloState(schedule, accumulators)

        return optax.GradientTransformationExtraArgs(init_fn, update_fn)

    held = {1: ("scheduler",), 2: ("rule",)}.get(phase, ())
    return learned_optimizer(init, bind, moves_without_gradient=True, held=held)
