"""Classification and regression on a pool of data sets, whatever the network."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from tasks.arguments import (
    SCALES,
    SHARE,
    check_count,
    check_flag,
    check_name,
    check_names,
    check_numbers,
)
from tasks.base import Instance, Params, Split, Task
from tasks.data.images import ImageData
from tasks.data.pool import as_float, load_pool
from tasks.instances import Options

Activation = Callable[[jax.Array], jax.Array]

ACTIVATIONS: dict[str, Activation] = {
    "relu": jax.nn.relu,
    "gelu": jax.nn.gelu,
    "swish": jax.nn.swish,
    "tanh": jnp.tanh,
    "sigmoid": jax.nn.sigmoid,
}
LOSSES = {"cross_entropy": "nats per example", "mse": "squared error per example"}


class Network(NamedTuple):
    """A network of an instance.

    Attributes:
      init: ``(options, instance, key) -> params``.
      apply: ``(params, options, instance, inputs [N, ...]) -> outputs [N, num_outputs]``.
    """

    init: Callable[[Options, Instance, jax.Array], Params]
    apply: Callable[[Params, Options, Instance, jax.Array], jax.Array]


class Data(NamedTuple):
    """What a network is made for.

    Attributes:
      shape: of one input.
      num_outputs: classes, or 1.
    """

    shape: tuple[int, ...]
    num_outputs: int


def activation_names(activation: str) -> tuple[str, ...]:
    """The names in ``"relu,tanh"``.

    Raises:
      ValueError: on an unknown name, or one named twice.
    """
    check_names(ACTIVATIONS, activation=activation)
    return tuple(activation.split(","))


def activation_of(names: Sequence[str], options: Options, instance: Instance) -> Activation:
    """The activation of the instance; where it was drawn, all of them are computed."""

    def act(x):
        values = [ACTIVATIONS[name](x) for name in names]
        which = options.index(instance, "activation")
        return jax.lax.select_n(which, *values) if len(names) > 1 else values[0]

    return act


def module_network(
    make: Callable[[Activation], nn.Module], names: Sequence[str], shape: Sequence[int]
) -> Network:
    """A Flax network, ``make`` of an activation, on inputs of ``shape``."""
    make(ACTIVATIONS[names[0]])  # What does not fit the inputs is refused now.

    def module(options, instance):
        return make(activation_of(names, options, instance))

    def init(options, instance, key):
        return module(options, instance).init(key, jnp.zeros((1, *shape), jnp.float32))["params"]

    def apply(params, options, instance, inputs):
        return module(options, instance).apply({"params": params}, inputs)

    return Network(init, apply)


def check_supervised(
    dataset: str | ImageData,
    *,
    batch_size: int,
    activation: str = "relu",
    loss: str = "cross_entropy",
    label_noise: Sequence[float] = (),
    init_scale: Sequence[float] = (),
    standardize: bool = False,
) -> None:
    """Raises ``ValueError`` as ``supervised`` does, but for what depends on the data."""
    if not isinstance(dataset, ImageData):
        check_names(None, dataset=dataset)
    activation_names(activation)
    check_name(LOSSES, loss=loss)
    check_count(batch_size=batch_size)
    check_numbers(SHARE, label_noise=label_noise)
    check_numbers(SCALES, init_scale=init_scale)
    check_flag(standardize=standardize)


def supervised(
    dataset: str | ImageData,
    network: Callable[[Data], Network],
    *,
    batch_size: int,
    activation: str = "relu",
    loss: str = "cross_entropy",
    label_noise: Sequence[float] = (),
    init_scale: Sequence[float] = (),
    standardize: bool = False,
    data_dir: str | None = None,
) -> Task:
    """A network's mean loss over examples.

    Of what has several options (data sets, activations, label noise, scales of the start), an
    instance has one, drawn with equal probability; the arrays keep their shapes, so all instances
    run as one population. Where targets are numbers, the loss is the squared error.

    Args:
      dataset: as of ``tasks.data.pool.load_pool``.
      network: makes the network for the data.
      batch_size: examples per batch, drawn with replacement.
      activation: one of ``ACTIVATIONS``, or several with commas between.
      loss: ``cross_entropy`` of the softmax, or ``mse``: the squared distance of the outputs from
        the one-hot labels.
      label_noise: probabilities, in each training batch anew, that a label is replaced by one drawn
        from all classes; empty: 0.
      init_scale: factors of the initial weights (of tensors of two and more dimensions); empty: 1.
      standardize: inputs with mean 0 and variance 1 over the training examples of the data set (one
        mean and one variance for all).
      data_dir: TFDS data folder, for ``dataset`` by name.

    Raises:
      ValueError: on a value out of range, an unknown name, or a data set that is not there.
    """
    check_supervised(
        dataset,
        batch_size=batch_size,
        activation=activation,
        loss=loss,
        label_noise=label_noise,
        init_scale=init_scale,
        standardize=standardize,
    )
    names = activation_names(activation)
    noises, scales = tuple(label_noise) or (0.0,), tuple(init_scale) or (1.0,)
    pool = load_pool(dataset, data_dir)
    classes = pool.num_classes
    if not classes and any(noises):
        raise ValueError(
            f"`label_noise` must be 0 where targets are numbers, as those of {dataset!r}, got "
            f"{label_noise}."
        )
    of_each = pool.of_each("train")
    options = Options(
        {"activation": names, "dataset": of_each, "label_noise": noises, "init_scale": scales}
    )
    inputs_shape = pool.inputs["train"].shape[1:]
    net = network(Data(inputs_shape, classes or 1))
    centers, spreads = _moments([x for x, _ in of_each]) if standardize else ((), ())
    per_example, best = _losses(loss if classes else "numbers")

    def outputs(params, instance, inputs):
        if standardize:
            center, spread = (options.value(instance, "dataset", x) for x in (centers, spreads))
            inputs = (inputs - center) / spread
        return net.apply(params, options, instance, inputs)

    def init(instance, key):
        params = net.init(options, instance, key)
        return scaled(params, options.value(instance, "init_scale", scales))

    def batch(instance, key, split):
        which = options.index(instance, "dataset")
        if split != "train" or not any(noises):
            return pool.batch(which, key, split, batch_size)
        key, key_noise, key_label = jax.random.split(key, 3)
        inputs, labels = pool.batch(which, key, split, batch_size)
        share = options.value(instance, "label_noise", noises)
        replaced = jax.random.bernoulli(key_noise, share, labels.shape)
        other = jax.random.randint(key_label, labels.shape, 0, classes, labels.dtype)
        return inputs, jnp.where(replaced, other, labels)

    def targets_of(labels):
        """What outputs are held against."""
        return jax.nn.one_hot(labels, classes) if classes else labels[:, None]

    def batch_loss(params, instance, batch, key):
        del key
        inputs, labels = batch
        return jnp.mean(per_example(outputs(params, instance, inputs), targets_of(labels)))

    def noisy(instance, split, targets):
        """Expected targets under label noise, which training alone has."""
        if split != "train" or not any(noises):
            return targets
        share = options.value(instance, "label_noise", noises)
        return (1 - share) * targets + share / classes

    def score(params, instance, split: Split):
        inputs, labels, weights = pool.whole(options.index(instance, "dataset"), split)
        found = outputs(params, instance, inputs)
        # The expected loss under them: cross-entropy is linear in targets, and so is the squared
        # distance but for the variance of one-hot labels.
        targets = noisy(instance, split, targets_of(labels))
        losses = per_example(found, targets)
        if loss == "mse" and classes:
            losses += 1 - jnp.sum(targets**2, axis=-1)
        scores = {"loss": jnp.average(losses, weights=weights)}
        if classes:
            right = (jnp.argmax(found, axis=-1) == labels).astype(jnp.float32)
            scores["accuracy"] = jnp.average(right, weights=weights)
        return scores

    # Of each data set: how frequent each class is, or how much numbers vary.
    known = [np.bincount(y, minlength=classes) / len(y) if classes else y.var() for _, y in of_each]

    def constant_loss(instance):
        found = options.value(instance, "dataset", known)
        return jnp.asarray(best(noisy(instance, "train", found)), jnp.float32)

    return Task(
        sample=options.sample,
        init=init,
        batch=batch,
        loss=batch_loss,
        score=score,
        unit=LOSSES[loss] if classes else "squared error per example",
        score_units={"accuracy": "share of examples"} if classes else {},
        constant_loss=constant_loss,
    )


def scaled(params: Params, factor: jax.Array | float) -> Params:
    """The weights, which have two and more dimensions, times ``factor``; the rest as it is."""
    return jax.tree.map(lambda p: (p * factor).astype(p.dtype) if p.ndim > 1 else p, params)


def _moments(inputs: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of each data set's inputs, as the network gets them."""
    floats = [as_float(x) for x in inputs]
    return np.array([x.mean() for x in floats]), np.array([x.std() for x in floats])


def _losses(kind: str) -> tuple[Callable[..., jax.Array], Callable[[Any], jax.Array]]:
    """``(outputs, targets) -> [N]``, and the best constant's mean.

    That is a function of how frequent each class is, or of the variance.
    """

    def cross_entropy(outputs, targets):
        # The product with one-hot targets differentiates to a product, not to a scatter.
        return -jnp.sum(jax.nn.log_softmax(outputs) * targets, axis=-1)

    def squared(outputs, targets):
        return jnp.sum((outputs - targets) ** 2, axis=-1)

    found: Mapping[str, tuple[Any, Any]] = {
        "cross_entropy": (cross_entropy, lambda shares: jnp.sum(jax.scipy.special.entr(shares))),
        "mse": (squared, lambda shares: 1 - jnp.sum(shares**2)),
        "numbers": (squared, lambda variance: variance),
    }
    return found[kind]
