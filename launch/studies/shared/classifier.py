"""The small classifiers that studies train: digits, or MNIST with a data folder."""

from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tasks.data.images import load_images

Activation = Callable[[jax.Array], jax.Array]


class Split(NamedTuple):
    """Images float ``[N, pixels]`` in 0..1 and one-hot labels ``[N, 10]``."""

    images: jax.Array
    targets: jax.Array


def splits(data_dir: str | None, largest: int = 10_000) -> tuple[Split, Split, int]:
    """Train and test split (validation images belong to train), and the side of an image."""
    data = load_images("mnist" if data_dir else "digits", data_dir)

    def one(*names):
        images = np.concatenate([np.asarray(data.images[name]) for name in names])[:largest]
        labels = np.concatenate([np.asarray(data.labels[name]) for name in names])[:largest]
        flat = images.reshape(len(images), -1).astype(np.float32) / 255
        return Split(jnp.asarray(flat), jax.nn.one_hot(labels, data.num_classes))

    return one("train", "validation"), one("test"), data.images["train"].shape[1]


def name(data_dir: str | None) -> str:
    """Of the data, for a caption."""
    return "MNIST" if data_dir else "digits"


def init(key: jax.Array, sizes: tuple[int, ...]) -> list[dict[str, jax.Array]]:
    """Weights ``N(0, 1 / fan_in)`` and zero biases of a tanh network."""
    keys = jax.random.split(key, len(sizes) - 1)
    return [
        {"w": jax.random.normal(k, (a, b)) / np.sqrt(a), "b": jnp.zeros(b)}
        for k, (a, b) in zip(keys, pairwise(sizes), strict=True)
    ]


def logits(params, images: jax.Array, activation: Activation = jnp.tanh) -> jax.Array:
    """Scores ``[N, 10]``; the last layer is linear."""
    x = images
    for layer in params[:-1]:
        x = activation(x @ layer["w"] + layer["b"])
    return x @ params[-1]["w"] + params[-1]["b"]


def cross_entropy(params, split: Split, activation: Activation = jnp.tanh) -> jax.Array:
    """Mean over examples, in nats."""
    scores = jax.nn.log_softmax(logits(params, split.images, activation))
    return -jnp.mean(jnp.sum(scores * split.targets, axis=1))


def accuracy(params, split: Split, activation: Activation = jnp.tanh) -> jax.Array:
    """Share of examples whose largest score is the label's."""
    scores = logits(params, split.images, activation)
    return jnp.mean(jnp.argmax(scores, 1) == jnp.argmax(split.targets, 1), dtype=float)


def batch(split: Split, key: jax.Array, size: int) -> Split:
    """``size`` examples with replacement."""
    index = jax.random.randint(key, (size,), 0, split.images.shape[0])
    return Split(split.images[index], split.targets[index])
