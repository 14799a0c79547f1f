"""Numbers of hand-designed optimizers as meta-parameters: as logs if positive, shares as logits."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from learned_opt.arguments import check_between
from learned_opt.base import LearnedOptimizer, learned_optimizer


class Hyperparameters(nn.Module):
    """A dict of hyperparameters, whose initial values are given.

    Attributes:
      positive: numbers above 0, stored as ``log_NAME``.
      shares: numbers between 0 and 1, stored as ``logit_NAME``.
      shape: of each; every element starts at its value.
    """

    positive: Mapping[str, float]
    shares: Mapping[str, float]
    shape: tuple[int, ...] = ()

    @nn.compact
    def __call__(self) -> dict[str, jax.Array]:
        def stored(name, value):
            return self.param(name, lambda key: jnp.full(self.shape, value, jnp.float32))

        logs = {name: stored(f"log_{name}", jnp.log(x)) for name, x in self.positive.items()}
        logits = {
            name: stored(f"logit_{name}", jnp.log(x) - jnp.log1p(-x))
            for name, x in self.shares.items()
        }
        positive = {name: jnp.exp(log) for name, log in logs.items()}
        return positive | {name: jax.nn.sigmoid(logit) for name, logit in logits.items()}


def tuned(
    build: Callable[..., optax.GradientTransformation],
    *,
    positive: Mapping[str, Any],
    shares: Mapping[str, Any],
    shape: tuple[int, ...] = (),
    **flags: Any,
) -> LearnedOptimizer:
    """The optimizer ``build(num_steps, **hyperparameters)``, whose theta are the hyperparameters.

    Args:
      positive, shares, shape: as in ``Hyperparameters``.
      flags: of ``learned_optimizer``.

    Raises:
      ValueError: on an initial value out of range.
    """
    check_between(0, math.inf, **positive)
    check_between(0, 1, **shares)
    module = Hyperparameters(positive, shares, shape)

    def bind(theta, num_steps):
        values: Any = module.apply(theta)
        return build(num_steps, **values)

    return learned_optimizer(module.init, bind, **flags)


def inverse_time(learning_rate: Any, decay: Any, num_steps: Any) -> optax.Schedule:
    """``learning_rate / (1 + t / num_steps) ** decay`` at step ``t``.

    Source: Vicol et al. 2021, section 5.3. Differs: time is counted in units of ``num_steps``,
    which equals the paper's 5,000 at its horizon.
    """

    def rate(step):
        # Of integers JAX would take the quotient in single precision.
        return learning_rate * (1 + jnp.asarray(step, learning_rate.dtype) / num_steps) ** -decay

    return rate
