"""The train step of a mixture, one program a part, so that each is compiled (and cached) alone."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np
import optax

from meta_train import devices
from meta_train.estimators.base import GradientEstimator
from meta_train.estimators.mixture import Mixture, MixtureState
from meta_train.pool import Pool
from meta_train.progress import progress
from meta_train.trainer import TrainState, make_step, step_key


def make_mixture_step(
    mixture: Mixture, meta_optimizer: optax.GradientTransformation, num_devices: int
) -> Any:
    """``state -> (state, metrics)`` on placed states: what ``make_step(mixture.estimator)`` does.

    Each part that is drawn runs as a program of its own, then one more program combines the
    gradients and moves theta. Parts that are not drawn cost nothing.
    """

    def run(index, shared, state):
        theta, root, step = shared
        grad, state, metrics = mixture.part(index, theta, state, step_key(root, step))
        return devices.device_mean((grad, metrics)), state

    def combine(theta, state, key):
        del theta, key
        return mixture.combine(*state)

    nothing: Any = None  # Its state is given, never begun.
    finish = make_step(GradientEstimator(nothing, combine), meta_optimizer)
    finish = devices.replicated_map(finish, num_devices)
    drawn = jax.jit(lambda root, step: mixture.drawn(step_key(root, step)))
    programs = [devices.part_map(partial(run, i), num_devices) for i in range(mixture.size)]
    return _Step(programs, finish, drawn, partial(_zeros, num_devices))


class _Step:
    """The step, called, lowered and compiled as what ``jax.jit`` returns."""

    def __init__(
        self, programs: Any, finish: Callable, drawn: Callable, zeros: Callable, idle: Any = None
    ):
        self._programs, self._finish, self._drawn, self._zeros = programs, finish, drawn, zeros
        self._idle = idle  # What each part gives when it does not run.

    def __call__(self, state: TrainState) -> tuple[TrainState, Any]:
        population: MixtureState = state.estimator_state
        if self._idle is None:
            self._idle = self._idle_results(state)
        ran = self._drawn(state.key, state.step)
        results, parts = list(self._idle), list(population.parts)
        for index in np.flatnonzero(jax.device_get(ran)):
            ran_part = self._programs[index](_shared(state), parts[index])
            results[index], parts[index] = devices.in_turn(ran_part)
        grads, metrics = map(list, zip(*results, strict=True))
        state, found = self._finish(
            state._replace(estimator_state=(population.norms, grads, metrics, ran))
        )
        population = MixtureState(tuple(parts), state.estimator_state)
        return state._replace(estimator_state=population), found

    def lower(self, state: TrainState) -> "_Step":
        parts = state.estimator_state.parts
        # Tracing and compiling take a minute or more where there are dozens of parts.
        lowered = [
            program.lower(_shared(state), part)
            for program, part in zip(
                progress(self._programs, desc="tracing", unit="program"), parts, strict=True
            )
        ]
        # Asked of what is lowered, as of several processes none can trace the map for the shapes.
        idle = [self._zeros(one.out_info[0]) for one in lowered]
        return _Step(lowered, self._finish, self._drawn, self._zeros, idle)

    def compile(self) -> "_Step":
        compiled = _Compiled(self._programs)
        for index in progress(range(len(self._programs)), desc="compiling", unit="program"):
            compiled[index]
        return _Step(compiled, self._finish, self._drawn, self._zeros, self._idle)

    def memory_analysis(self) -> Any:
        """That of the part that needs most."""
        found = [program.memory_analysis() for program in self._programs]
        return max(found, key=lambda part: part.temp_size_in_bytes)

    def _idle_results(self, state: TrainState) -> list:
        parts = state.estimator_state.parts
        return [
            self._zeros(jax.eval_shape(program, _shared(state), part)[0])
            for program, part in zip(self._programs, parts, strict=True)
        ]


class _Compiled:
    """Programs that are compiled when first asked for, and again after they had to go."""

    def __init__(self, lowered: list):
        # JAX's caches hold what is compiled of a `pmap` until they are cleared.
        self._lowered, self._pool = lowered, Pool(forget=devices.forget_compiled)

    def __getitem__(self, index: int) -> Any:
        # With options, if empty ones: without any, what is lowered holds what was compiled of it.
        return self._pool.get(index, partial(self._lowered[index].compile, {}))


def _shared(state: TrainState) -> tuple:
    return state.theta, state.key, state.step


def _zeros(num_devices: int, tree: Any) -> Any:
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), tree)
    return devices.replicate(zeros, num_devices)
