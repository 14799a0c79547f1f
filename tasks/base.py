"""The inner problem: what a learned optimizer is trained on."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")

Params = Any
Instance = Any
Batch = Any


class Task(NamedTuple):
    """An inner problem, or a family of them, as four pure functions.

    Every function runs inside ``jit``, ``vmap`` and ``lax.scan``; data lives on the
    device and is indexed by key, so there is no input pipeline to wait for.

    Attributes:
      sample: ``key -> instance``. Draws one problem of the family as a pytree of
        arrays; ``()`` when there is only one problem.
      init: ``(instance, key) -> params``. Initial inner parameters, float pytree.
      batch: ``(instance, key, split) -> batch``. A minibatch of the named split;
        equal keys give equal batches.
      loss: ``(params, instance, batch, key) -> scalar``. The loss of ``params`` on
        ``batch``; ``key`` feeds any noise in the model (dropout and the like).
      score: None, or ``(params, instance, split) -> {name: scalar}``, how well ``params`` do
        on a whole split (for a classifier, ``loss`` and ``accuracy``).
      unit: of the loss, for tables, axes and files.
    """

    sample: Callable[[jax.Array], Instance]
    init: Callable[[Instance, jax.Array], Params]
    batch: Callable[[Instance, jax.Array, Split], Batch]
    loss: Callable[[Params, Instance, Batch, jax.Array], jax.Array]
    score: Callable[[Params, Instance, Split], dict[str, jax.Array]] | None = None
    unit: str = "units of the task's loss"
