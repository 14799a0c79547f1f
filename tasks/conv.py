"""Image classification with a plain convolutional network."""

from dataclasses import dataclass

import flax.linen as nn
import jax.numpy as jnp

from tasks.arguments import check_counts, check_flag
from tasks.image_classifier import ImageClassifier
from tasks.layers import Convolution, Normalization, check_normalization
from tasks.supervised import Activation, Data


@dataclass(frozen=True)
class ConvNet(ImageClassifier):
    """3x3 convolutions, the first of stride 2, then the mean over pixels and a linear layer.

    Source: shapes of Metz et al. 2022 ("Practical tradeoffs"). Differs: no batch statistics, since
    a task's loss is a function of one batch.

    Attributes:
      channels: of each convolution.
      normalization: none, layer (over channels) or group (4 channels and all pixels).
      pool: whether the linear layer gets the mean over pixels, or all of them.
    """

    channels: tuple[int, ...] = (16, 32)
    normalization: str = "none"
    pool: bool = True

    def __post_init__(self):
        super().__post_init__()
        check_counts(channels=self.channels)
        check_flag(pool=self.pool)
        check_normalization(self.normalization, self.channels)

    def module(self, data: Data, act: Activation) -> nn.Module:
        return _Network(self.channels, self.normalization, self.pool, act, data.num_outputs)


class _Network(nn.Module):
    channels: tuple[int, ...]
    normalization: str
    pool: bool
    act: Activation
    num_outputs: int

    @nn.compact
    def __call__(self, x):
        for i, channels in enumerate(self.channels):
            x = Convolution(channels, stride=2 if i == 0 else 1)(x)
            x = self.act(Normalization(self.normalization)(x))
        x = jnp.mean(x, axis=(1, 2)) if self.pool else x.reshape(x.shape[0], -1)
        return nn.Dense(self.num_outputs)(x)
