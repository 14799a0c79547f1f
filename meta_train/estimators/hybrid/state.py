"""What ``hybrid_es`` keeps from step to step."""

from typing import Any, NamedTuple

import jax

from meta_train.estimators.hybrid.noise import Scale

# The address of the candidates' draws; no particle has this id.
SEARCH = 2**32 - 2


class Shared(NamedTuple):
    """What every device knows; all of it follows from the messages.

    Attributes:
      step: int32, outer steps done.
      surrogate: the stale gradient ``d``, or what is predicted in its place, ``[P]``.
      past: what the search remembers of past gradients, or ``()``.
      scale: what sigma has learned.
      prediction: the predictor's state, or ``()``.
    """

    step: jax.Array
    surrogate: jax.Array
    past: Any
    scale: Scale
    prediction: Any


class HybridState(NamedTuple):
    """The state of ``hybrid_es``.

    Attributes:
      particles: the surrogate estimator's population.
      workers: int32 ``[N]``, global worker ids.
      residuals: what compression left out, ``[N, P]``; ``()`` without.
      shared: replicated.
    """

    particles: Any
    workers: jax.Array
    residuals: Any
    shared: Shared
