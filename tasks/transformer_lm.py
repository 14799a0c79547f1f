"""A Transformer language model."""

from dataclasses import dataclass

import flax.linen as nn
import jax

from tasks.arguments import check_count
from tasks.data.symbols import VOCABULARY
from tasks.language_model import LanguageModel
from tasks.layers import Block


@dataclass(frozen=True)
class TransformerLM(LanguageModel):
    """A decoder: embedding and learned positions, pre-norm blocks with GELU, a linear output.

    Source: Radford et al. 2019. Differs: its size; no dropout, no tied output.

    Attributes:
      width: of a token.
      heads: of the attention; divides the width.
      layers: number of blocks.
    """

    width: int = 16
    heads: int = 2
    layers: int = 1

    def __post_init__(self):
        super().__post_init__()
        check_count(width=self.width, heads=self.heads, layers=self.layers)
        if self.width % self.heads:
            raise ValueError(f"`heads` must divide width={self.width}, got {self.heads}.")

    def module(self) -> nn.Module:
        return _Network(self.width, self.heads, self.layers)


class _Network(nn.Module):
    width: int
    heads: int
    layers: int

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(self.width, use_bias=False)(x)
        x = x + self.param("position", nn.initializers.normal(0.02), x.shape[1:])
        for _ in range(self.layers):
            x = Block(self.heads, jax.nn.gelu, causal=True)(x)
        return nn.Dense(VOCABULARY)(nn.LayerNorm()(x))
