"""The optimizers that others are compared with, as data: how each is built and swept.

A setting of a baseline is a value of its knob and a schedule. Both are data of the compiled
program, so a sweep compiles nothing anew. What a setting says nothing of is at optax's default.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import optax

from launch.evaluation.optlist import OPTLIST, nadamw
from learned_opt.base import LearnedOptimizer, learned_optimizer

# The last is for settings of a list, whose value is the place in it, from 0: each has a schedule
# of its own, and neighbours have nothing in common.
CONSTANT, COSINE, WARMUP, LISTED = "constant", "cosine", "warmup", "of its list"
SCHEDULES = (CONSTANT, COSINE, WARMUP, LISTED)
# The share of a run over which `warmup` raises the rate from 0 to its value.
WARMUP_SHARE = 0.1


class Setting(NamedTuple):
    """A value of a baseline's knob, and one of ``SCHEDULES``."""

    value: float
    schedule: str

    def __str__(self) -> str:
        return f"{self.value:.3g} {self.schedule}"


class Baseline(NamedTuple):
    """An optimizer of optax or a list of settings, and what of it is swept.

    Attributes:
      builder: its name in ``BUILDERS``.
      values: of the knob that is swept, at least 14, in increasing order; or the places of a list.
      default: the library's own value of the knob, or where it has none, the one that its authors
        or most users take, with a constant rate; of a list the first.
      schedules: those that every value is tried with.
      knob: its name.
      arguments: others that differ from optax's defaults.
    """

    builder: str
    values: tuple[float, ...]
    default: float
    schedules: tuple[str, ...] = (CONSTANT, COSINE)
    knob: str = "learning rate"
    arguments: dict[str, Any] = {}  # noqa: RUF012

    @property
    def untuned(self) -> Setting:
        """The default, at a constant rate; of a list the first."""
        return Setting(self.default, self.schedules[0])

    @property
    def settings(self) -> tuple[Setting, ...]:
        """All that are swept: every value under every schedule, and the default."""
        grid = [Setting(v, schedule) for schedule in self.schedules for v in self.values]
        every = dict.fromkeys([*grid, self.untuned])
        return tuple(sorted(every, key=lambda s: (self.schedules.index(s.schedule), s.value)))

    def at_edge(self, setting: Setting) -> bool:
        """Whether its value is the smallest or the largest of the sweep; a list has no edge."""
        return setting.schedule != LISTED and setting.value in (self.values[0], self.values[-1])

    def beside(self, setting: Setting) -> tuple[Setting, ...]:
        """Of the sweep the next smaller and the next larger value under the same schedule, and the
        same value under the others, or the nearest; of a list none.
        """
        if setting.schedule == LISTED:
            return ()
        under = [s for s in self.settings if s.schedule == setting.schedule]
        smaller = [s for s in under if s.value < setting.value]
        larger = [s for s in under if s.value > setting.value]
        others = [
            min(
                (s for s in self.settings if s.schedule == other),
                key=lambda s: abs(math.log(s.value / setting.value)),
            )
            for other in self.schedules
            if other != setting.schedule
        ]
        return (*smaller[-1:], *larger[:1], *others)

    def optimizer(self) -> LearnedOptimizer:
        """The baseline as a learned optimizer whose theta is a setting, from ``theta_of``."""

        def bind(theta, num_steps):
            def factor(count):
                progress = count / num_steps
                warmup = jnp.minimum(1.0, (count + 1) / (WARMUP_SHARE * num_steps))
                cosine = (1 + jnp.cos(jnp.pi * progress)) / 2
                shapes = [jnp.ones_like(progress), cosine, warmup, progress]
                return jnp.stack(shapes)[theta["schedule"]]

            return BUILDERS[self.builder](theta["value"], factor, self.arguments)

        return learned_optimizer(lambda key: theta_of(self.settings[0]), bind)


def theta_of(setting: Setting) -> dict[str, Any]:
    """Theta of a baseline's ``optimizer``: float32 and int32 scalars."""
    return {
        "value": jnp.float32(setting.value),
        "schedule": jnp.int32(SCHEDULES.index(setting.schedule)),
    }


# The step's number -> what the schedule multiplies the rate by, or the progress of the run for
# settings of a list.
Factor = Callable[[Any], Any]


def _by_rate(build: Callable[..., Any]) -> Callable[..., Any]:
    """For optimizers of optax whose knob is the learning rate, which may be a schedule."""
    return lambda value, factor, arguments: build(lambda count: value * factor(count), **arguments)


def _prodigy(value: Any, factor: Factor, arguments: dict[str, Any]) -> Any:
    return optax.contrib.prodigy(factor, estim_lr_coef=value, **arguments)


def _schedule_free(value: Any, factor: Factor, arguments: dict[str, Any]) -> Any:
    # `optax.contrib.schedule_free_adamw` where the length of the warm-up is data.
    def rate(count):
        return value * factor(count)

    base = optax.chain(
        optax.scale_by_rms(decay=0.999, eps=1e-8, eps_in_sqrt=False, bias_correction=True),
        optax.scale_by_learning_rate(rate),
    )
    return optax.contrib.schedule_free(base, rate, b1=0.9, **arguments)


BUILDERS: dict[str, Callable[[Any, Factor, dict[str, Any]], Any]] = {
    "sgd": _by_rate(optax.sgd),
    "adam": _by_rate(optax.adam),
    "adamw": _by_rate(optax.adamw),
    "nadamw": _by_rate(optax.nadamw),
    "lion": _by_rate(optax.lion),
    "muon": _by_rate(optax.contrib.muon),
    "prodigy": _prodigy,
    "schedule_free": _schedule_free,
    "optlist": lambda place, progress, arguments: nadamw(place, progress, **arguments),
}
# Parameters to judge by, where they are not those that gradients are taken at: (state, params).
EVALUATED: dict[str, Callable[[Any, Any], Any]] = {
    "schedule_free": optax.contrib.schedule_free_eval_params,
}


def _grid(low: int, high: int) -> tuple[float, ...]:
    """Three a decade, from ``10 ** (low / 3)`` to ``10 ** (high / 3)``."""
    return tuple(10.0 ** (e / 3) for e in range(low, high + 1))


# A Shampoo is not among optax's optimizers (0.2.8), so there is none.
BASELINES: dict[str, Baseline] = {
    "sgdm": Baseline("sgd", _grid(-11, 3), 0.01, arguments={"momentum": 0.9}),
    "adam": Baseline("adam", _grid(-12, 1), 0.001),
    # With optax's own decay, 1e-4, it is Adam: within .0005 of log-loss on `heldout` (docs).
    "adamw": Baseline("adamw", _grid(-12, 1), 0.001, arguments={"weight_decay": 0.1}),
    "nadamw": Baseline("nadamw", _grid(-12, 1), 0.001),
    "lion": Baseline("lion", _grid(-15, -2), 0.0001),
    "muon": Baseline("muon", _grid(-11, 2), 0.02),
    "prodigy": Baseline("prodigy", _grid(-7, 6), 1.0, knob="coefficient of the estimated rate"),
    "schedule_free_adamw": Baseline(
        "schedule_free", _grid(-12, 1), 0.0025, schedules=(CONSTANT, WARMUP)
    ),
    # The list is an argument, so that it is part of what decides results that are kept.
    "optlist": Baseline(
        "optlist",
        tuple(float(i) for i in range(len(OPTLIST))),
        0.0,
        schedules=(LISTED,),
        knob="place in the list",
        arguments={"settings": OPTLIST},
    ),
}
