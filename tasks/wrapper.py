"""Tasks made of another task."""

from dataclasses import dataclass, field

from tasks.arguments import check_instance
from tasks.base import Task, TaskConfig
from tasks.linear import Linear


@dataclass(frozen=True)
class Wrapper(TaskConfig):
    """Another task, changed; abstract.

    Attributes:
      base: the task.
    """

    base: TaskConfig = field(default_factory=Linear)

    def __post_init__(self):
        check_instance(TaskConfig, base=self.base)

    @property
    def unwrapped(self) -> TaskConfig:
        return self.base.unwrapped


def wrapped(task: Task) -> Task:
    """``task`` for instances ``{"base": one of its own, ...}``; such are still to be sampled."""
    score, constant_loss = task.score, task.constant_loss
    return task._replace(
        init=lambda instance, key: task.init(instance["base"], key),
        batch=lambda instance, key, split: task.batch(instance["base"], key, split),
        loss=lambda params, instance, batch, key: task.loss(params, instance["base"], batch, key),
        score=score and (lambda params, instance, split: score(params, instance["base"], split)),
        constant_loss=constant_loss and (lambda instance: constant_loss(instance["base"])),
    )
