"""Logistic and linear regression on tables."""

from dataclasses import dataclass

from tasks.base import Task, TaskConfig
from tasks.mlp import mlp_classifier
from tasks.supervised import check_supervised


@dataclass(frozen=True)
class Linear(TaskConfig):
    """Softmax regression where targets are classes, least squares where they are numbers.

    Convex, so whatever is lost is the optimizer's.

    Attributes:
      dataset: breast_cancer, wine or diabetes (a regression), or any of images.
      label_noise: as of ``mlp``.
      init_scale: as of ``mlp``.
      batch_size: examples per batch, drawn with replacement.
    """

    dataset: str = "breast_cancer"
    label_noise: tuple[float, ...] = ()
    init_scale: tuple[float, ...] = ()
    batch_size: int = 32

    def __post_init__(self):
        check_supervised(
            self.dataset,
            batch_size=self.batch_size,
            label_noise=self.label_noise,
            init_scale=self.init_scale,
        )

    def make(self, data_dir: str | None = None) -> Task:
        """The task.

        Args:
          data_dir: folder of prepared data sets.
        """
        return mlp_classifier(
            self.dataset,
            hidden_sizes=(),
            batch_size=self.batch_size,
            label_noise=self.label_noise,
            init_scale=self.init_scale,
            data_dir=data_dir,
        )
