"""Image classification with a small Vision Transformer."""

from dataclasses import dataclass

import flax.linen as nn
import jax.numpy as jnp

from tasks.arguments import check_count
from tasks.image_classifier import ImageClassifier
from tasks.layers import Block
from tasks.supervised import Activation, Data


@dataclass(frozen=True)
class VisionTransformer(ImageClassifier):
    """Patches as tokens with learned positions, pre-norm blocks, and the mean over tokens.

    Source: Dosovitskiy et al. 2021. Differs: no class token.

    Attributes:
      activation: relu, gelu, swish, tanh or sigmoid, or several with commas between.
      patch: pixels of a patch's side; divides the image.
      width: of a token.
      heads: of the attention; divides the width.
      layers: number of blocks.
    """

    activation: str = "gelu"
    patch: int = 4
    width: int = 16
    heads: int = 2
    layers: int = 1

    def __post_init__(self):
        super().__post_init__()
        check_count(patch=self.patch, width=self.width, heads=self.heads, layers=self.layers)
        if self.width % self.heads:
            raise ValueError(f"`heads` must divide width={self.width}, got {self.heads}.")

    def module(self, data: Data, act: Activation) -> nn.Module:
        if any(side % self.patch for side in data.shape[:2]):
            raise ValueError(
                f"`patch` must divide the image, {data.shape[0]}x{data.shape[1]} for "
                f"dataset={self.dataset!r}, got {self.patch}."
            )
        return _Network(self.patch, self.width, self.heads, self.layers, act, data.num_outputs)


class _Network(nn.Module):
    patch: int
    width: int
    heads: int
    layers: int
    act: Activation
    num_outputs: int

    @nn.compact
    def __call__(self, x):
        number, height, width, channels = x.shape
        side = self.patch
        x = x.reshape(number, height // side, side, width // side, side, channels)
        x = x.swapaxes(2, 3).reshape(number, -1, side * side * channels)
        x = nn.Dense(self.width)(x)
        x = x + self.param("position", nn.initializers.normal(0.02), x.shape[1:])
        for _ in range(self.layers):
            x = Block(self.heads, self.act, causal=False)(x)
        return nn.Dense(self.num_outputs)(jnp.mean(nn.LayerNorm()(x), axis=1))
