"""What the families of image classifiers have in common."""

from dataclasses import dataclass

import flax.linen as nn

from tasks.base import Task, TaskConfig
from tasks.supervised import (
    Activation,
    Data,
    activation_names,
    check_supervised,
    module_network,
    supervised,
)


@dataclass(frozen=True)
class ImageClassifier(TaskConfig):
    """A Flax network on images; abstract.

    Attributes:
      dataset: a bundled data set (docs/tasks.md) or a TFDS one, or several of one shape with commas
        between, of which an instance has one.
      activation: relu, gelu, swish, tanh or sigmoid, or several with commas between.
      loss: cross_entropy, in nats; or mse: the squared distance of the outputs from the one-hot
        labels.
      label_noise: probabilities, one of which an instance has, that a label of a training batch is
        replaced by any; empty: 0.
      init_scale: factors, one of which an instance has, of the initial weights; empty: 1.
      batch_size: examples per batch, drawn with replacement.
      standardize: inputs with mean 0 and variance 1 over the training images.
    """

    dataset: str = "digits"
    activation: str = "relu"
    loss: str = "cross_entropy"
    label_noise: tuple[float, ...] = ()
    init_scale: tuple[float, ...] = ()
    batch_size: int = 64
    standardize: bool = False

    def __post_init__(self):
        check_supervised(
            self.dataset,
            batch_size=self.batch_size,
            activation=self.activation,
            loss=self.loss,
            label_noise=self.label_noise,
            init_scale=self.init_scale,
            standardize=self.standardize,
        )

    def module(self, data: Data, act: Activation) -> nn.Module:
        """The network: images ``[N, height, width, channels]`` -> ``[N, num_outputs]``.

        Raises:
          ValueError: if images of that shape do not fit it.
        """
        raise NotImplementedError(f"{type(self).__name__} must define `module`.")

    def make(self, data_dir: str | None = None) -> Task:
        """The task.

        Args:
          data_dir: folder of prepared data sets.

        Raises:
          ValueError: on an unknown name, a number out of range, or a data set that is not there.
        """

        def network(data: Data):
            if len(data.shape) != 3:
                raise ValueError(f"`dataset` must be of images, got {self.dataset!r}.")
            names = activation_names(self.activation)
            return module_network(lambda act: self.module(data, act), names, data.shape)

        return supervised(
            self.dataset,
            network,
            batch_size=self.batch_size,
            activation=self.activation,
            loss=self.loss,
            label_noise=self.label_noise,
            init_scale=self.init_scale,
            standardize=self.standardize,
            data_dir=data_dir,
        )
