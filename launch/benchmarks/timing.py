"""Programs timed in turns, so that what else the machine does meets all of them alike."""

import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np


def in_turns(
    steps: dict[str, tuple[Callable, Any]],
    rounds: int,
    warm_up: int,
    clock: Callable[[], float] = time.process_time,
) -> dict[str, np.ndarray]:
    """Seconds of each step in each round, ``[rounds]``.

    Args:
      steps: a step, ``state -> (state, what is waited for)``, and its first state.
      rounds: timed ones, after ``warm_up`` others.
      clock: of the seconds; the processor's, of all threads, or ``time.perf_counter``.
    """
    states = {name: state for name, (_, state) in steps.items()}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(warm_up + rounds):
        for name, (step, _) in steps.items():
            began = clock()
            states[name], result = step(states[name])
            jax.block_until_ready(result)
            seconds[name].append(clock() - began)
    return {name: np.array(times[warm_up:]) for name, times in seconds.items()}
