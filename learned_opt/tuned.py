"""Hand-designed optimizers whose hyperparameters are the meta-parameters."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from learned_opt.base import LearnedOptimizer


class SGDHyperparameters(nn.Module):
    """Learning rate (stored as its log) and momentum (as its logit)."""

    learning_rate: float
    momentum: float

    @nn.compact
    def __call__(self) -> dict[str, jax.Array]:
        log_rate = self.param("log_learning_rate", _constant(jnp.log(self.learning_rate)))
        logit = self.param("logit_momentum", _constant(_logit(self.momentum)))
        return {"learning_rate": jnp.exp(log_rate), "momentum": jax.nn.sigmoid(logit)}


class AdamHyperparameters(nn.Module):
    """Learning rate and epsilon (stored as logs), the two decays (as logits)."""

    learning_rate: float
    b1: float
    b2: float
    eps: float

    @nn.compact
    def __call__(self) -> dict[str, jax.Array]:
        log_rate = self.param("log_learning_rate", _constant(jnp.log(self.learning_rate)))
        logit_b1 = self.param("logit_b1", _constant(_logit(self.b1)))
        logit_b2 = self.param("logit_b2", _constant(_logit(self.b2)))
        log_eps = self.param("log_eps", _constant(jnp.log(self.eps)))
        return {
            "learning_rate": jnp.exp(log_rate),
            "b1": jax.nn.sigmoid(logit_b1),
            "b2": jax.nn.sigmoid(logit_b2),
            "eps": jnp.exp(log_eps),
        }


def learnable_sgdm(learning_rate: float = 0.1, momentum: float = 0.9) -> LearnedOptimizer:
    """SGD with momentum; theta is its learning rate and momentum, two scalars.

    Args:
      learning_rate: initial learning rate, above 0.
      momentum: initial momentum, strictly between 0 and 1.

    Raises:
      ValueError: on a value out of range.
    """
    _check(learning_rate=learning_rate, momentum=momentum)
    module = SGDHyperparameters(learning_rate, momentum)
    return _tuned(module, optax.sgd)


def learnable_adam(
    learning_rate: float = 1e-3, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8
) -> LearnedOptimizer:
    """Adam; theta is its learning rate, decays and epsilon, four scalars.

    Args:
      learning_rate: initial learning rate, above 0.
      b1: initial decay of the first moment, strictly between 0 and 1.
      b2: initial decay of the second moment, strictly between 0 and 1.
      eps: initial epsilon, above 0.

    Raises:
      ValueError: on a value out of range.
    """
    _check(learning_rate=learning_rate, b1=b1, b2=b2, eps=eps)
    return _tuned(AdamHyperparameters(learning_rate, b1, b2, eps), optax.adam)


def _tuned(module: nn.Module, optimizer) -> LearnedOptimizer:
    def bind(theta, num_steps):
        del num_steps
        return optax.with_extra_args_support(optimizer(**module.apply(theta)))

    return LearnedOptimizer(module.init, bind)


def _constant(value):
    return lambda key: jnp.asarray(value, jnp.float32)


def _logit(probability):
    return jnp.log(probability) - jnp.log1p(-probability)


def _check(**values):
    for name, value in values.items():
        upper = float("inf") if name in ("learning_rate", "eps") else 1.0
        if not 0 < value < upper:
            raise ValueError(f"`{name}` must be strictly between 0 and {upper}, got {value}.")
