"""Image classification with a multilayer perceptron."""

import itertools
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

    Weights start as ``N(0, 1/fan_in)`` for the last layer and saturating activations and
    ``N(0, 2/fan_in)`` before rectifiers; biases start at 0. Parameters are a tuple of
    ``{"b": [out], "w": [in, out]}``, one a layer.

    Args:
      dataset: digits, or a TFDS image data set prepared in ``data_dir``; or the images themselves,
        from ``tasks.data.load_images``.
      hidden_sizes: width of each hidden layer; empty for logistic regression.
      activation: one of ``ACTIVATIONS``.
      batch_size: examples per batch, drawn with replacement.
      standardize: give the network pixels with mean 0 and variance 1 over the training images
        (one mean and one variance for all), instead of values in 0..1.
      data_dir: TFDS data folder, for ``dataset`` by name.

    Raises:
      ValueError: on an unknown activation, a size below 1, or a data set that is not there.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"`activation` must be one of {sorted(ACTIVATIONS)}, got {activation!r}.")
    if batch_size < 1 or any(size < 1 for size in hidden_sizes):
        raise ValueError(
            "`batch_size` and every entry of `hidden_sizes` must be at least 1, got "
            f"batch_size={batch_size}, hidden_sizes={tuple(hidden_sizes)}."
        )
    data = load_images(dataset, data_dir) if isinstance(dataset, str) else dataset
    inputs = int(np.prod(data.images["train"].shape[1:]))
    sizes = (inputs, *hidden_sizes, data.num_classes)
    act = ACTIVATIONS[activation]
    gains = [2.0 if activation in ("relu", "gelu") else 1.0] * len(hidden_sizes) + [1.0]

    def init(instance, key):
        del instance
        # One draw for all weights: random bits are a fixed cost per draw on small networks.
        shapes = list(itertools.pairwise(sizes))
        ends = np.cumsum([fan_in * fan_out for fan_in, fan_out in shapes])
        pieces = jnp.split(jax.random.normal(key, (int(ends[-1]),)), ends[:-1])
        return tuple(
            {"b": jnp.zeros(shape[1]), "w": piece.reshape(shape) * np.sqrt(gain / shape[0])}
            for piece, shape, gain in zip(pieces, shapes, gains, strict=True)
        )

    pixels = np.asarray(data.images["train"], np.float32) / 255
    center, spread = (pixels.mean(), pixels.std()) if standardize else (0.0, 1.0)

    def logits(params, images):
        x = (images.reshape(images.shape[0], -1) - center) / spread
        for layer in params[:-1]:
            x = act(x @ layer["w"] + layer["b"])
        return x @ params[-1]["w"] + params[-1]["b"]

    def loss(params, instance, batch, key):
        del instance, key
        images, labels = batch
        # The one-hot product differentiates to a product, not to a scatter.
        log_probs = jax.nn.log_softmax(logits(params, images))
        return -jnp.mean(jnp.sum(log_probs * jax.nn.one_hot(labels, data.num_classes), axis=-1))

    def score(params, instance, split):
        images, labels = data.images[split].astype(jnp.float32) / 255, data.labels[split]
        right = jnp.argmax(logits(params, images), axis=-1) == labels
        mean_loss = loss(params, instance, (images, labels), None)
        return {"loss": mean_loss, "accuracy": jnp.mean(right.astype(jnp.float32))}

    return Task(
        sample=lambda key: (),
        init=init,
        batch=lambda instance, key, split: data.batch(key, split, batch_size),
        loss=loss,
        score=score,
        unit="nats per example",
        score_units={"accuracy": "share of examples"},
    )
