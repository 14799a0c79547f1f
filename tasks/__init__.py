"""Inner problems for meta-training."""

from collections.abc import Callable

from tasks.base import SPLITS, Split, Task, TaskConfig
from tasks.mixture import TaskMixture
from tasks.mlp import mlp_classifier
from tasks.quadratic import quadratic_family

TASKS: dict[str, type[TaskConfig] | Callable[..., Task]] = {
    "mlp": mlp_classifier,
    "quadratic": quadratic_family,
}

__all__ = [
    "SPLITS",
    "TASKS",
    "Split",
    "Task",
    "TaskConfig",
    "TaskMixture",
    "mlp_classifier",
    "quadratic_family",
]
