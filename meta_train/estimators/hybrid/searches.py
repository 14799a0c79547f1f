"""What Hybrid-ES does between two gradients, as a value; and two controls that search nothing."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from meta_train.estimators.hybrid.messages import Costs, Sends


class Setting(NamedTuple):
    """What all candidates of a step share.

    Attributes:
      surrogate: the stale gradient ``d``, ``[P]``.
      sigma: standard deviation of every entry's perturbation, ``[P]``.
      allowed: whether an entry is perturbed, bool ``[P]``.
      block: what the sampler's rows share.
      directions: what ``Search.directions`` made.
    """

    surrogate: jax.Array
    sigma: jax.Array
    allowed: jax.Array
    block: Any
    directions: Any


class Draws(NamedTuple):
    """The random numbers of a step: ``row``, ``index -> [P]``, are the sampler's, of unit variance;
    ``key`` is their address, for what else a search draws."""

    key: jax.Array
    row: Callable[[Any], jax.Array]


# ``index -> [P]``: the perturbation of a row.
Direction = Callable[[jax.Array], jax.Array]


def perturbation(setting: Setting, unit: jax.Array) -> jax.Array:
    """A direction of unit variance, scaled and masked, ``[P]``."""
    return jnp.where(setting.allowed, setting.sigma * unit, 0.0)


class Search(NamedTuple):
    """How the steps between two gradients are found, around the stale gradient ``d``.

    ``P`` is the size of theta. A *row* is a perturbation; where candidates are ``paired``,
    ``2 p`` and ``2 p + 1`` are row ``p`` and its mirror image; else candidate ``c`` is row ``c``.

    Attributes:
      name: for messages.
      sends: what the workers tell each other of the candidates' costs; ``Sends.NOTHING``: none is
        evaluated.
      step: ``(setting, direction, costs) -> [P]``, the gradient that all make of what was sent.
      paired: whether candidates are mirrored pairs.
      keeps_step: whether the step is the next surrogate.
      check: raises ``ValueError`` if there are not enough candidates, whose number it is given.
      independent: ``rows -> int``, how many directions have to be linearly independent, for a
        search that chooses them itself; None: they are the sampler's, and can be masked.
      init: ``(key, P, dtype) -> past``, what it remembers of past gradients.
      observe: ``(past, gradient) -> past``, at a refresh.
      directions: ``(past, d, draws, rows) -> Any``, what all candidates of a step share.
      direction: ``(setting, draws, row) -> [P]``, the perturbation of a row.
      place: ``(theta [P], d, perturbation) -> [P]``, the theta of a candidate.
      stale_step: ``(theta [P], d) -> [P]``, where candidates are steps of training: the step that
        they compete with; else None.
    """

    name: str
    sends: Sends
    step: Callable[[Setting, Direction, Costs], jax.Array]
    paired: bool = False
    keeps_step: bool = False
    check: Callable[[int], None] = lambda num_candidates: None
    independent: Callable[[int], int] | None = None
    init: Callable[[jax.Array, int, Any], Any] = lambda key, size, dtype: ()
    observe: Callable[[Any, jax.Array], Any] = lambda past, gradient: past
    directions: Callable[[Any, jax.Array, Draws, int], Any] = lambda past, d, draws, rows: ()
    direction: Callable[[Setting, Draws, Any], jax.Array] = lambda setting, draws, row: (
        perturbation(setting, draws.row(row))
    )
    place: Callable[[jax.Array, jax.Array, jax.Array], jax.Array] = lambda theta, d, eps: (
        theta + eps
    )
    stale_step: Callable[[jax.Array, jax.Array], jax.Array] | None = None


def weighted_sum(
    setting: Setting, direction: Direction, rows: jax.Array, coefficients: jax.Array
) -> jax.Array:
    """``sum_i coefficients[i] * direction(rows[i])``, one direction in memory at a time."""

    def add(total, term):
        row, coefficient = term
        return total + coefficient * direction(row), None

    return jax.lax.scan(add, jnp.zeros_like(setting.surrogate), (rows, coefficients))[0]


def stale() -> Search:
    """``g = d``: the last gradient again. A control: nothing is evaluated."""
    return Search("stale", Sends.NOTHING, lambda setting, direction, costs: setting.surrogate)


def skip() -> Search:
    """``g = 0``, with which a meta-optimizer of momentum still moves. A control, like ``stale``."""
    return Search(
        "skip",
        Sends.NOTHING,
        lambda setting, direction, costs: jnp.zeros_like(setting.surrogate),
    )
