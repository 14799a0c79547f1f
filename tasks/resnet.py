"""Image classification with a small residual network."""

from dataclasses import dataclass

import flax.linen as nn
import jax.numpy as jnp

from tasks.arguments import check_count, check_counts
from tasks.image_classifier import ImageClassifier
from tasks.layers import Convolution, Normalization, check_normalization
from tasks.supervised import Activation, Data


@dataclass(frozen=True)
class ResNet(ImageClassifier):
    """Pre-activation residual blocks of two 3x3 convolutions; each stage halves the image.

    Source: He et al. 2016 ("Identity mappings"). Differs: group or layer norm for batch norm, and
    a first convolution of stride 2.

    Attributes:
      channels: of each stage.
      blocks: in each stage.
      normalization: none, layer or group.
    """

    channels: tuple[int, ...] = (8, 16)
    blocks: int = 1
    normalization: str = "group"

    def __post_init__(self):
        super().__post_init__()
        check_counts(channels=self.channels)
        if not self.channels:
            raise ValueError("`channels` must be of one stage or more, got ().")
        check_count(blocks=self.blocks)
        check_normalization(self.normalization, self.channels)

    def module(self, data: Data, act: Activation) -> nn.Module:
        return _Network(self.channels, self.blocks, self.normalization, act, data.num_outputs)


class _Network(nn.Module):
    channels: tuple[int, ...]
    blocks: int
    normalization: str
    act: Activation
    num_outputs: int

    @nn.compact
    def __call__(self, x):
        x = Convolution(self.channels[0], stride=2)(x)
        for stage, channels in enumerate(self.channels):
            for block in range(self.blocks):
                stride = 2 if stage and not block else 1
                y = self.act(Normalization(self.normalization)(x))
                if stride > 1 or channels != x.shape[-1]:
                    x = nn.Dense(channels, use_bias=False)(x[:, ::stride, ::stride])
                y = Convolution(channels, stride)(y)
                y = self.act(Normalization(self.normalization)(y))
                x = x + Convolution(channels)(y)
        x = self.act(Normalization(self.normalization)(x))
        return nn.Dense(self.num_outputs)(jnp.mean(x, axis=(1, 2)))
