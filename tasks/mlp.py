"""Classification or regression with a multilayer perceptron."""

import itertools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from tasks.arguments import check_counts, check_name
from tasks.base import Task
from tasks.data.images import ImageData
from tasks.supervised import ACTIVATIONS, Data, Network, activation_names, activation_of, supervised

__all__ = ["ACTIVATIONS", "mlp_classifier"]

NORMALIZATIONS = ("none", "layer")


def mlp_classifier(
    dataset: str | ImageData = "digits",
    *,
    hidden_sizes: Sequence[int] = (32,),
    activation: str = "relu",
    batch_size: int = 64,
    standardize: bool = False,
    loss: str = "cross_entropy",
    normalization: str = "none",
    label_noise: tuple[float, ...] = (),
    init_scale: tuple[float, ...] = (),
    data_dir: str | None = None,
) -> Task:
    """An MLP on flattened images or rows of a table; softmax cross-entropy in nats per example.

    Of what is given several times (data sets of equal shape, activations, label noise, scales of
    the start), the network of an instance has one, drawn with equal probability: networks of one
    shape, which run as one population (and one program).

    Weights start as ``N(0, 1/fan_in)`` for the last layer and saturating activations and
    ``N(0, 2/fan_in)`` before rectifiers; biases start at 0. Parameters are a tuple of
    ``{"b": [out], "w": [in, out]}``, one a layer, with a gain ``"g": [out]`` of 1 where hidden
    layers are normalized.

    Args:
      dataset: one of the bundled data sets (docs/tasks.md), or a TFDS image data set prepared in
        ``data_dir``; or several with commas between, ``"digits,mnist5k_8"``; or the images
        themselves, from ``tasks.data.load_images``.
      hidden_sizes: width of each hidden layer; empty for logistic (or linear) regression.
      activation: one of ``ACTIVATIONS``, or several with commas between: ``"relu,tanh"``.
      batch_size: examples per batch, drawn with replacement.
      standardize: give the network inputs with mean 0 and variance 1 over the training examples
        (one mean and one variance for all), instead of values in 0..1.
      loss: cross_entropy, or mse: the squared distance of the outputs from the one-hot labels.
      normalization: none, or layer: of the activations' inputs in each hidden layer.
      label_noise: probabilities, one of which an instance has, that a label of a training batch is
        replaced by any; empty: 0.
      init_scale: factors, one of which an instance has, of the initial weights; empty: 1.
      data_dir: TFDS data folder, for ``dataset`` by name.

    Raises:
      ValueError: on an unknown name, one named twice, a number out of range, or a data set that is
        not there.
    """
    names = activation_names(activation)
    check_counts(hidden_sizes=hidden_sizes)
    check_name(NORMALIZATIONS, normalization=normalization)

    def network(data: Data) -> Network:
        sizes = (math.prod(data.shape), *hidden_sizes, data.num_outputs)
        shapes = list(itertools.pairwise(sizes))
        # Of the weights of each layer at the start, a row an activation.
        scales = [
            [math.sqrt(gain / fan_in) for gain, (fan_in, _) in zip(gains, shapes, strict=True)]
            for gains in (
                [1.0 if name in ("tanh", "sigmoid") else 2.0] * len(hidden_sizes) + [1.0]
                for name in names
            )
        ]

        def init(options, instance, key):
            own = options.value(instance, "activation", scales)
            # One draw for all weights: random bits are a fixed cost per draw on small networks.
            ends = np.cumsum([fan_in * fan_out for fan_in, fan_out in shapes])
            pieces = jnp.split(jax.random.normal(key, (int(ends[-1]),)), ends[:-1])
            layers = tuple(
                {"b": jnp.zeros(shape[1]), "w": piece.reshape(shape) * scale}
                for piece, shape, scale in zip(pieces, shapes, own, strict=True)
            )
            if normalization == "none":
                return layers
            return (
                *(layer | {"g": jnp.ones_like(layer["b"])} for layer in layers[:-1]),
                layers[-1],
            )

        def apply(params, options, instance, inputs):
            act = activation_of(names, options, instance)
            x = inputs.reshape(inputs.shape[0], -1)
            for layer in params[:-1]:
                x = x @ layer["w"]
                if normalization == "layer":
                    x = jax.nn.standardize(x) * layer["g"]
                x = act(x + layer["b"])
            return x @ params[-1]["w"] + params[-1]["b"]

        return Network(init, apply)

    return supervised(
        dataset,
        network,
        batch_size=batch_size,
        activation=activation,
        loss=loss,
        label_noise=label_noise,
        init_scale=init_scale,
        standardize=standardize,
        data_dir=data_dir,
    )
