"""Curved valleys in a few dimensions: what can be said of an optimizer without data."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from tasks.arguments import NOISES, check_count, check_name, check_names, check_number
from tasks.base import SPLITS, Task
from tasks.instances import Options


def rosenbrock(x: jax.Array) -> jax.Array:
    """A bent valley with a flat floor; minimum 0 at ones."""
    return jnp.mean(100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2)


def dixon_price(x: jax.Array) -> jax.Array:
    """A chain in which each coordinate squared is half the one before; minimum 0."""
    weights = jnp.arange(2, x.shape[0] + 1)
    return ((x[0] - 1) ** 2 + jnp.sum(weights * (2 * x[1:] ** 2 - x[:-1]) ** 2)) / x.shape[0]


def styblinski_tang(x: jax.Array) -> jax.Array:
    """Two wells a coordinate, of different depth; minimum 0 where all are in the deeper."""
    return jnp.mean(x**4 - 16 * x**2 + 5 * x) / 2 + 39.16616570377142


FUNCTIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "rosenbrock": rosenbrock,
    "dixon_price": dixon_price,
    "styblinski_tang": styblinski_tang,
}


def toy(*, function: str = "rosenbrock", dim: int = 10, noise: float = 0.1) -> Task:
    """A function of ``dim`` numbers, from a start drawn per instance, with noisy gradients.

    A training batch adds ``e^T x`` to the loss, ``e ~ N(0, noise^2 I)``, which vanishes in the
    mean; ``validation`` and ``test`` are noiseless. Where nothing is predicted, the constant
    predictor's loss is that of the start, ``N(0, I)``.

    Args:
      function: one of ``FUNCTIONS``, or several with commas between, of which an instance has one.
      dim: dimension, at least 2.
      noise: standard deviation of each entry of the gradient.

    Raises:
      ValueError: on an unknown function, or a number out of range.

    Source: Surjanovic and Bingham's collection of test functions. Differs: means over coordinates
    for sums, so that the scale does not grow with the dimension.
    """
    check_names(FUNCTIONS, function=function)
    check_count(2, dim=dim)
    check_number(NOISES, noise=noise)
    names = tuple(function.split(","))
    options = Options({"function": names})

    def sample(key):
        key_option, key_start = jax.random.split(key)
        return {"option": options.sample(key_option), "start": jax.random.normal(key_start, (dim,))}

    def value(params, instance):
        values = [FUNCTIONS[name](params) for name in names]
        which = options.index(instance["option"], "function")
        return jax.lax.select_n(which, *values) if len(names) > 1 else values[0]

    def batch(instance, key, split):
        del instance
        check_name(SPLITS, split=split)
        return (noise if split == "train" else 0.0) * jax.random.normal(key, (dim,))

    def loss(params, instance, batch, key):
        del key
        return value(params, instance) + batch @ params

    def score(params, instance, split):
        check_name(SPLITS, split=split)
        return {"loss": value(params, instance)}

    return Task(
        sample=sample,
        init=lambda instance, key: instance["start"],
        batch=batch,
        loss=loss,
        score=score,
        unit="value of the function",
        constant_loss=lambda instance: value(instance["start"], instance),
    )
