"""Flax layers that several families share, cheap for a population of networks."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from tasks.arguments import check_name

NORMALIZATIONS = ("none", "layer", "group")


class Convolution(nn.Module):
    """A 3x3 convolution with zero padding, as nine shifts and one matrix product.

    Under ``vmap`` over its weights a convolution becomes a grouped one, which XLA runs slowly on
    CPUs; the product becomes a batched product.

    Attributes:
      channels: of the output.
      stride: in both directions.
    """

    channels: int
    stride: int = 1

    @nn.compact
    def __call__(self, x):
        """``[N, h, w, c]`` -> ``[N, ceil(h / stride), ceil(w / stride), channels]``."""
        height, width = x.shape[1:3]
        padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        shifts = [
            padded[:, i : i + height : self.stride, j : j + width : self.stride]
            for i in range(3)
            for j in range(3)
        ]
        return nn.Dense(self.channels, kernel_init=nn.initializers.he_normal())(
            jnp.concatenate(shifts, axis=-1)
        )


class Normalization(nn.Module):
    """Over the channels, or over groups of 4 channels and all pixels; with gain and bias.

    Attributes:
      kind: one of ``NORMALIZATIONS``.
    """

    kind: str

    @nn.compact
    def __call__(self, x):
        if self.kind == "layer":
            return nn.LayerNorm()(x)
        if self.kind == "group":
            return nn.GroupNorm(num_groups=None, group_size=4)(x)
        return x


class Block(nn.Module):
    """A pre-norm Transformer block.

    Attributes:
      heads: of the attention; divides the width.
      act: the activation of the hidden layer, four times as wide.
      causal: whether a position sees only itself and those before.
    """

    heads: int
    act: Callable[[jax.Array], jax.Array]
    causal: bool

    @nn.compact
    def __call__(self, x):
        """``[N, length, width]`` -> the same shape."""
        width = x.shape[-1]
        mask = nn.make_causal_mask(x[..., 0]) if self.causal else None
        attend = nn.MultiHeadDotProductAttention(self.heads, qkv_features=width)
        x = x + attend(nn.LayerNorm()(x), mask=mask)
        hidden = self.act(nn.Dense(4 * width)(nn.LayerNorm()(x)))
        return x + nn.Dense(width)(hidden)


def check_normalization(kind: str, channels: tuple[int, ...]) -> None:
    """Raises ``ValueError`` on an unknown kind, or channels that have no groups of 4."""
    check_name(NORMALIZATIONS, normalization=kind)
    if kind == "group" and any(number % 4 for number in channels):
        raise ValueError(f"`channels` must be multiples of 4 for group norm, got {channels}.")
