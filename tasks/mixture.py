"""Several tasks of different shapes in one job."""

from dataclasses import dataclass
from typing import Any

from tasks.arguments import (
    ABOVE_ZERO,
    AT_LEAST_ZERO,
    check_count,
    check_flag,
    check_instances,
    check_number,
    check_numbers,
)
from tasks.base import Task, TaskConfig


@dataclass(frozen=True)
class TaskMixture(TaskConfig):
    """Tasks that one optimizer is trained on at once, each with a population of its own.

    For tasks whose arrays have different shapes. Problems of one shape are better drawn by the
    ``sample`` of one task: then they are one population, and one program.

    Attributes:
      tasks: the tasks; written in a preset or a module of yours.
      names: what metrics call them, one a task; empty: their own names, numbered if equal.
      weights: what each task's gradient counts, above 0, in any unit; empty: all alike.
      drawn: how many tasks run in an outer step, drawn anew each time; 0: all.
      normalize: divide each task's gradient by its running norm, so that none drowns the others.
      cut: gradients above this many times the running norm count as that; 0: none is cut.
    """

    tasks: tuple[TaskConfig, ...] = ()
    names: tuple[str, ...] = ()
    weights: tuple[float, ...] = ()
    drawn: int = 0
    normalize: bool = False
    cut: float = 0.0

    def __post_init__(self):
        check_instances(TaskConfig, tasks=self.tasks)
        check_instances(str, names=self.names)
        check_numbers(ABOVE_ZERO, weights=self.weights)
        check_count(0, drawn=self.drawn)
        check_flag(normalize=self.normalize)
        check_number(AT_LEAST_ZERO, cut=self.cut)
        if len(self.tasks) < 2:
            raise ValueError(
                f"`tasks` must be at least two tasks, got {len(self.tasks)}; a mixture is written "
                "in a preset or a module of yours, for one task give the task itself."
            )
        for name in ("names", "weights"):
            if getattr(self, name) and len(getattr(self, name)) != len(self.tasks):
                raise ValueError(
                    f"`{name}` must have one entry a task, {len(self.tasks)}, or be empty, got "
                    f"{getattr(self, name)}."
                )
        if len(set(self.names)) < len(self.names):
            raise ValueError(f"`names` must differ, got {self.names}.")
        if self.drawn > len(self.tasks):
            raise ValueError(
                f"`drawn` must be between 0 (all) and the number of tasks, {len(self.tasks)}, got "
                f"{self.drawn}."
            )
        if self.cut and not self.normalize:
            raise ValueError(
                "`cut` is in running norms, or 0 for none, and needs normalize=True, got "
                f"cut={self.cut}, normalize={self.normalize}."
            )
        if any(task.parts != (task,) for task in self.tasks):
            raise ValueError("`tasks` must not be mixtures themselves; list all tasks in one.")

    @property
    def parts(self) -> tuple[TaskConfig, ...]:
        return self.tasks

    @property
    def mixing(self) -> dict[str, Any]:
        return {
            "weights": self.weights,
            "drawn": self.drawn,
            "normalize": self.normalize,
            "cut": self.cut,
        }

    def make(self, data_dir: str | None = None) -> Task:
        """Raises ``ValueError``: a mixture is many tasks."""
        raise ValueError(
            f"a mixture of {len(self.tasks)} tasks is not one task; choose one of them."
        )
