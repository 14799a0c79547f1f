"""Inner problems for meta-training."""

from tasks.base import SPLITS, Split, Task
from tasks.mlp import mlp_classifier
from tasks.quadratic import quadratic_family

__all__ = ["SPLITS", "Split", "Task", "mlp_classifier", "quadratic_family"]
