"""A family of noisy quadratic bowls."""

import jax
import jax.numpy as jnp

from tasks.arguments import NOISES, Span, check_count, check_name, check_number
from tasks.base import SPLITS, Task
from tasks.initializers import orthogonal


def quadratic_family(
    *, dim: int = 10, condition: float = 100.0, noise: float = 0.1, batch_size: int = 1
) -> Task:
    """``L(x) = 1/2 (x - c)^T H (x - c)`` with ``H`` and ``c`` drawn per instance.

    ``H`` has a random rotation and eigenvalues log-spaced from ``1 / condition`` to 1 (one alone
    is 1); ``c ~ N(0, I)``; ``x`` starts at 0. A batch shifts ``c`` by the mean of ``batch_size``
    draws of ``N(0, noise^2 I)`` on ``train``; ``validation`` and ``test`` are noiseless.

    Args:
      dim: dimension of ``x``.
      condition: condition number of ``H``, at least 1.
      noise: standard deviation of one example's shift.
      batch_size: examples per batch.

    Raises:
      ValueError: on a value out of range.
    """
    check_count(dim=dim, batch_size=batch_size)
    check_number(Span(1), condition=condition)
    check_number(NOISES, noise=noise)
    eigenvalues = jnp.logspace(-jnp.log10(condition), 0.0, dim) if dim > 1 else jnp.ones(1)

    def sample(key):
        key_rotation, key_center = jax.random.split(key)
        rotation = orthogonal(key_rotation, (dim, dim))
        return {
            "hessian": (rotation * eigenvalues) @ rotation.T,
            "center": jax.random.normal(key_center, (dim,)),
        }

    def init(instance, key):
        del instance, key
        return jnp.zeros(dim)

    def batch(instance, key, split):
        del instance
        check_name(SPLITS, split=split)
        scale = noise / jnp.sqrt(batch_size) if split == "train" else 0.0
        return scale * jax.random.normal(key, (dim,))

    def loss(params, instance, batch, key):
        del key
        offset = params - instance["center"] - batch
        return 0.5 * offset @ instance["hessian"] @ offset

    def score(params, instance, split):
        check_name(SPLITS, split=split)
        value = loss(params, instance, jnp.zeros(dim), None)
        if split == "train":  # The mean over batches.
            value += 0.5 * noise**2 / batch_size * jnp.trace(instance["hessian"])
        return {"loss": value}

    def constant_loss(instance):
        return score(jnp.zeros(dim), instance, "train")["loss"]

    return Task(sample, init, batch, loss, score, unit="squared error", constant_loss=constant_loss)
