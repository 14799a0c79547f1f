"""Image classification with a multilayer perceptron."""

import itertools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from tasks.base import Task
from tasks.data.images import ImageData, load_images

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "relu": jax.nn.relu,
    "gelu": jax.nn.gelu,
    "tanh": jnp.tanh,
    "sigmoid": jax.nn.sigmoid,
}


def mlp_classifier(
    dataset: str | ImageData = "digits",
    *,
    hidden_sizes: Sequence[int] = (32,),
    activation: str = "relu",
    batch_size: int = 64,
    standardize: bool = False,
    data_dir: str | None = None,
) -> Task:
    """Softmax cross-entropy of an MLP on flattened images, in nats per example.

    With several activations the network of an instance has one of them, drawn with equal
    probability: networks of one shape, which run as one population (and one program).

    Weights start as ``N(0, 1/fan_in)`` for the last layer and saturating activations and
    ``N(0, 2/fan_in)`` before rectifiers; biases start at 0. Parameters are a tuple of
    ``{"b": [out], "w": [in, out]}``, one a layer.

    Args:
      dataset: digits, or a TFDS image data set prepared in ``data_dir``; or the images themselves,
        from ``tasks.data.load_images``.
      hidden_sizes: width of each hidden layer; empty for logistic regression.
      activation: one of ``ACTIVATIONS``, or several with commas between: ``"relu,tanh"``.
      batch_size: examples per batch, drawn with replacement.
      standardize: give the network pixels with mean 0 and variance 1 over the training images
        (one mean and one variance for all), instead of values in 0..1.
      data_dir: TFDS data folder, for ``dataset`` by name.

    Raises:
      ValueError: on an unknown activation, one named twice, a size below 1, or a data set that is
        not there.
    """
    names = tuple(activation.split(","))
    if not set(names) <= set(ACTIVATIONS) or len(set(names)) < len(names):
        raise ValueError(
            f"`activation` must be one of {sorted(ACTIVATIONS)}, or several different ones with "
            f"commas between, got {activation!r}."
        )
    if batch_size < 1 or any(size < 1 for size in hidden_sizes):
        raise ValueError(
            "`batch_size` and every entry of `hidden_sizes` must be at least 1, got "
            f"batch_size={batch_size}, hidden_sizes={tuple(hidden_sizes)}."
        )
    data = load_images(dataset, data_dir) if isinstance(dataset, str) else dataset
    inputs = int(np.prod(data.images["train"].shape[1:]))
    sizes = (inputs, *hidden_sizes, data.num_classes)
    shapes = list(itertools.pairwise(sizes))
    # Of the weights of each layer at the start, a row an activation.
    scales = [
        [math.sqrt(gain / fan_in) for gain, (fan_in, _) in zip(gains, shapes, strict=True)]
        for gains in (
            [2.0 if name in ("relu", "gelu") else 1.0] * len(hidden_sizes) + [1.0] for name in names
        )
    ]

    def sample(key):
        return jax.random.randint(key, (), 0, len(names)) if len(names) > 1 else ()

    def act(instance, x):
        """The activation of the instance; where it was drawn, all of them are computed."""
        values = [ACTIVATIONS[name](x) for name in names]
        return jax.lax.select_n(instance, *values) if len(names) > 1 else values[0]

    def init(instance, key):
        own = jnp.asarray(scales)[instance] if len(names) > 1 else scales[0]
        # One draw for all weights: random bits are a fixed cost per draw on small networks.
        ends = np.cumsum([fan_in * fan_out for fan_in, fan_out in shapes])
        pieces = jnp.split(jax.random.normal(key, (int(ends[-1]),)), ends[:-1])
        return tuple(
            {"b": jnp.zeros(shape[1]), "w": piece.reshape(shape) * scale}
            for piece, shape, scale in zip(pieces, shapes, own, strict=True)
        )

    pixels = np.asarray(data.images["train"], np.float32) / 255
    center, spread = (pixels.mean(), pixels.std()) if standardize else (0.0, 1.0)

    def logits(params, instance, images):
        x = (images.reshape(images.shape[0], -1) - center) / spread
        for layer in params[:-1]:
            x = act(instance, x @ layer["w"] + layer["b"])
        return x @ params[-1]["w"] + params[-1]["b"]

    def loss(params, instance, batch, key):
        del key
        images, labels = batch
        # The one-hot product differentiates to a product, not to a scatter.
        log_probs = jax.nn.log_softmax(logits(params, instance, images))
        return -jnp.mean(jnp.sum(log_probs * jax.nn.one_hot(labels, data.num_classes), axis=-1))

    def score(params, instance, split):
        images, labels = data.images[split].astype(jnp.float32) / 255, data.labels[split]
        right = jnp.argmax(logits(params, instance, images), axis=-1) == labels
        mean_loss = loss(params, instance, (images, labels), None)
        return {"loss": mean_loss, "accuracy": jnp.mean(right.astype(jnp.float32))}

    return Task(
        sample=sample,
        init=init,
        batch=lambda instance, key, split: data.batch(key, split, batch_size),
        loss=loss,
        score=score,
        unit="nats per example",
        score_units={"accuracy": "share of examples"},
    )
