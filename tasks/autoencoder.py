"""An autoencoder of images."""

from collections.abc import Sequence
from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp

from tasks.arguments import check_counts
from tasks.base import Task, TaskConfig
from tasks.reconstruction import check_reconstruction, reconstruction
from tasks.supervised import Activation


class Dense(nn.Module):
    """A stack of dense layers with the activation between.

    Attributes:
      sizes: outputs of each layer.
      act: the activation.
    """

    sizes: Sequence[int]
    act: Activation

    @nn.compact
    def __call__(self, x):
        for size in self.sizes[:-1]:
            x = self.act(nn.Dense(size)(x))
        return nn.Dense(self.sizes[-1])(x)


@dataclass(frozen=True)
class Autoencoder(TaskConfig):
    """Squared error per pixel of images, in 0..1, from a bottleneck; the output is a sigmoid.

    Source: Metz et al. 2022 ("Practical tradeoffs"), its autoencoder tasks.

    Attributes:
      dataset: of images, bundled (docs/tasks.md) or of TFDS, or several of one shape with commas
        between, of which an instance has one.
      hidden_sizes: width of each hidden layer, the bottleneck among them.
      activation: relu, gelu, swish, tanh or sigmoid, or several with commas between.
      init_scale: factors, one of which an instance has, of the initial weights; empty: 1.
      batch_size: images per batch, drawn with replacement.
    """

    dataset: str = "digits"
    hidden_sizes: tuple[int, ...] = (32, 8, 32)
    activation: str = "relu"
    init_scale: tuple[float, ...] = ()
    batch_size: int = 64

    def __post_init__(self):
        check_reconstruction(self.dataset, self.activation, self.init_scale, self.batch_size)
        check_counts(hidden_sizes=self.hidden_sizes)

    def make(self, data_dir: str | None = None) -> Task:
        """The task.

        Args:
          data_dir: folder of prepared data sets.

        Raises:
          ValueError: on a data set that is not there, or not of images.
        """

        def init(pixels, key):
            network = Dense((*self.hidden_sizes, pixels), jax.nn.relu)
            return network.init(key, jnp.zeros((1, pixels)))["params"]

        def losses(params, act, images, key):
            del key
            network = Dense((*self.hidden_sizes, images.shape[1]), act)
            found = jax.nn.sigmoid(network.apply({"params": params}, images))
            return jnp.mean((found - images) ** 2, axis=-1)

        return reconstruction(
            self.dataset,
            init,
            losses,
            lambda images: images.var(axis=0).mean(),
            activation=self.activation,
            init_scale=self.init_scale,
            batch_size=self.batch_size,
            unit="squared error per pixel",
            data_dir=data_dir,
        )
