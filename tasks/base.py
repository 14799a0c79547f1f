"""The inner problem: what a learned optimizer is trained on."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
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
      score_units: ``name -> unit`` of what ``score`` finds besides the loss; what has none here
        is written without one.
      constant_loss: None, or ``instance -> scalar``, the loss of knowing nothing: of the best
        constant prediction on the training split, or, where nothing is predicted, of the start. It
        is the scale on which losses of different tasks can be averaged.
    """

    sample: Callable[[jax.Array], Instance]
    init: Callable[[Instance, jax.Array], Params]
    batch: Callable[[Instance, jax.Array, Split], Batch]
    loss: Callable[[Params, Instance, Batch, jax.Array], jax.Array]
    score: Callable[[Params, Instance, Split], dict[str, jax.Array]] | None = None
    unit: str = "units of the task's loss"
    score_units: Mapping[str, str] = MappingProxyType({})
    constant_loss: Callable[[Instance], jax.Array] | None = None


class Dynamics(NamedTuple):
    """A system whose theta is trained itself, with no optimizer in it: a policy in its world.

    Attributes:
      init_theta: ``key -> theta``.
      init: ``(theta, key, horizon) -> state``, the start of an episode.
      step: ``(theta, state, key) -> (state, loss)``.
      evaluate: ``(theta, num_episodes, seed) -> {name: scalar}``, how good theta is; ``seed`` is
        an int32 scalar.
      unit: of the loss.
    """

    init_theta: Callable[[jax.Array], Any]
    init: Callable[[Any, jax.Array, Any], Any]
    step: Callable[[Any, Any, jax.Array], tuple[Any, jax.Array]]
    evaluate: Callable[[Any, int, jax.Array], dict[str, jax.Array]]
    unit: str


@dataclass(frozen=True)
class TaskConfig:
    """The kind of all tasks: a task as values.

    A task is a frozen dataclass derived from this one, or a plain function that returns a
    ``Task``; its arguments, each with a default, are then the fields (``data_dir`` aside, which
    it gets from the job if it takes it).
    """

    def make(self, data_dir: str | None = None) -> Task:
        """The task.

        Args:
          data_dir: folder of prepared data sets.
        """
        raise NotImplementedError(f"{type(self).__name__} must define `make`.")

    def dynamics(self) -> Dynamics:
        """The system whose theta ``trains=policy`` trains.

        Raises:
          ValueError: of a task that is an inner problem of an optimizer.
        """
        raise ValueError(
            f"`task` must be a system with a policy for trains=policy, got {type(self).__name__}, "
            "an inner problem; start from --preset=swimmer."
        )

    @property
    def unwrapped(self) -> "TaskConfig":
        """The task whose losses it has: itself, or that which it wraps."""
        return self

    @property
    def parts(self) -> tuple["TaskConfig", ...]:
        """The tasks that run at once: itself, or those of a mixture."""
        return (self,)

    @property
    def mixing(self) -> dict[str, Any]:
        """How the gradients of the parts are mixed, where there are several."""
        return {}
