"""A small network applied to every parameter of a tensor, with few numbers formed for each."""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from learned_opt.initializers import fan_in_normal

# Up to this width layers are sums over parameters in one loop; wider ones are matrix products.
_WIDEST_SUM = 8


class Layer(NamedTuple):
    """``[inputs, outputs]`` and ``[outputs]``."""

    kernel: jax.Array
    bias: jax.Array


class Layers(nn.Module):
    """The weights of a network of these sizes, inputs and outputs included.

    Attributes:
      sizes: of the layers.
      copies: axes of networks before those of each array.
    """

    sizes: Sequence[int]
    copies: tuple[int, ...] = ()

    @nn.compact
    def __call__(self) -> tuple[Layer, ...]:
        return tuple(
            Layer(
                self.param(f"kernel_{i}", fan_in_normal, (*self.copies, *shape)),
                self.param(f"bias_{i}", nn.initializers.zeros, (*self.copies, *shape[1:])),
            )
            for i, shape in enumerate(pairwise(self.sizes))
        )


def apply_layers(
    layers: Sequence[Layer], own: Sequence[jax.Array], offsets: Sequence[jax.Array]
) -> list[jax.Array]:
    """The network's outputs, ``[*shape]`` each, with ReLU between its layers.

    Args:
      layers: the first one without its inputs that ``offsets`` stand for.
      own: an array ``[*shape]`` for each input of the first layer.
      offsets: added to the first layer, ``[outputs, ...]`` with size 1 along the axes of the
        tensor that they are constant along.
    """
    widest = max(layer.kernel.shape[1] for layer in layers)
    function = _sums if widest <= _WIDEST_SUM else _products
    return function(tuple(layers), tuple(own), tuple(offsets))


def _products(layers, own, offsets):
    first, *others = layers
    shape = jnp.shape(own[0])
    outputs = jnp.tensordot(first.kernel.T, jnp.stack(own), 1)
    outputs = sum(offsets, outputs + first.bias.reshape(-1, *[1] * len(shape)))
    for kernel, bias in others:
        outputs = jnp.tensordot(kernel.T, jax.nn.relu(outputs), 1)
        outputs = outputs + bias.reshape(-1, *[1] * len(shape))
    return list(outputs)


@jax.custom_jvp
def _sums(layers, own, offsets):
    """One loop over the parameters: nothing between inputs and outputs is written to memory."""
    first, *others = layers
    values = _sums_of_layer(own, first)
    values = [sum((x[j] for x in offsets), value) for j, value in enumerate(values)]
    for layer in others:
        values = _sums_of_layer([jax.nn.relu(x) for x in values], layer)
    return values


def _sums_of_layer(values, layer):
    rows = [jnp.unstack(row) for row in jnp.unstack(layer.kernel)]
    columns = zip(*rows, strict=True)
    return [
        sum((x * w for x, w in zip(values, column, strict=True)), bias)
        for column, bias in zip(columns, jnp.unstack(layer.bias), strict=True)
    ]


@_sums.defjvp
def _sums_jvp(primals, tangents):
    """That of the products: the derivative of a sum to each weight is a pass over the tensor."""
    return jax.jvp(_products, primals, tangents)
