"""Hand-designed optimizers whose hyperparameters are the meta-parameters."""

from functools import partial

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


class ScheduleHyperparameters(nn.Module):
    """First learning rate and decay exponent, both stored as logs."""

    learning_rate: float
    decay: float

    @nn.compact
    def __call__(self) -> dict[str, jax.Array]:
        log_rate = self.param("log_learning_rate", _constant(jnp.log(self.learning_rate)))
        log_decay = self.param("log_decay", _constant(jnp.log(self.decay)))
        return {"learning_rate": jnp.exp(log_rate), "decay": jnp.exp(log_decay)}


class PerTensorHyperparameters(nn.Module):
    """Learning rates (stored as logs) and momenta (as logits), ``[num_tensors]`` each."""

    num_tensors: int
    learning_rate: float
    momentum: float

    @nn.compact
    def __call__(self) -> dict[str, jax.Array]:
        ones = jnp.ones(self.num_tensors)
        log_rate = self.param("log_learning_rate", _constant(jnp.log(self.learning_rate) * ones))
        logit = self.param("logit_momentum", _constant(_logit(self.momentum) * ones))
        return {"learning_rate": jnp.exp(log_rate), "momentum": jax.nn.sigmoid(logit)}


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


def learnable_schedule(
    learning_rate: float = 0.1, decay: float = 1.0, momentum: float = 0.9
) -> LearnedOptimizer:
    """SGD with momentum under an inverse-time decay, its two numbers tuned.

    Step ``t`` of ``num_steps`` (that of ``bind``) has the learning rate
    ``learning_rate / (1 + t / num_steps) ** decay``; theta is the logs of the two. At the last
    step the rate has fallen by ``2 ** decay``.

    Args:
      learning_rate: initial learning rate of the first step, above 0.
      decay: initial exponent, above 0.
      momentum: strictly between 0 and 1; fixed.

    Raises:
      ValueError: on a value out of range.

    Source: Vicol et al. 2021, section 5.3. Differs: time is counted in units of
    ``num_steps``, which equals the paper's 5,000 at its horizon.
    """
    _check(learning_rate=learning_rate, decay=decay, momentum=momentum)

    def sgd(num_steps, learning_rate, decay):
        def schedule(step):
            return learning_rate * (1 + step / num_steps) ** -decay

        return optax.sgd(schedule, momentum)

    return _tuned(ScheduleHyperparameters(learning_rate, decay), sgd, timed=True)


def per_tensor_sgdm(
    num_tensors: int = 4, learning_rate: float = 0.1, momentum: float = 0.9
) -> LearnedOptimizer:
    """SGD with momentum; every tensor of the parameters has its own learning rate and momentum.

    Theta is two vectors ``[num_tensors]``, in the order of ``jax.tree.leaves`` of the
    parameters: for an MLP, bias then weights of each layer.

    Args:
      num_tensors: leaves of the parameters (an MLP of L layers, biases included, has 2 L).
      learning_rate: initial learning rate of every tensor, above 0.
      momentum: initial momentum of every tensor, strictly between 0 and 1.

    Raises:
      ValueError: on a value out of range, or (from the transformation's ``init``) parameters
        with another number of leaves.

    Source: Vicol et al. 2021, section 5.4 (tuning many hyperparameters).
    """
    _check(learning_rate=learning_rate, momentum=momentum)
    if num_tensors < 1:
        raise ValueError(f"`num_tensors` must be at least 1, got {num_tensors}.")
    module = PerTensorHyperparameters(num_tensors, learning_rate, momentum)

    def sgd(learning_rate, momentum):
        def init(params):
            given = len(jax.tree.leaves(params))
            if given != num_tensors:
                raise ValueError(
                    f"`num_tensors` must be the number of leaves of the parameters, got "
                    f"num_tensors={num_tensors} for parameters of {given}; make the optimizer "
                    f"with num_tensors={given}."
                )
            return jax.tree.map(jnp.zeros_like, params)

        def update(updates, velocity, params=None):
            del params
            leaves, structure = jax.tree.flatten(velocity)
            leaves = [
                momentum[i].astype(v.dtype) * v + g
                for i, (v, g) in enumerate(zip(leaves, jax.tree.leaves(updates), strict=True))
            ]
            steps = [-learning_rate[i] * v for i, v in enumerate(leaves)]
            return jax.tree.unflatten(structure, steps), jax.tree.unflatten(structure, leaves)

        return optax.GradientTransformation(init, update)

    return _tuned(module, sgd)


def _tuned(module: nn.Module, optimizer, timed: bool = False) -> LearnedOptimizer:
    """``optimizer`` of the hyperparameters, preceded by the number of steps if ``timed``."""

    def bind(theta, num_steps):
        build = partial(optimizer, num_steps) if timed else optimizer
        transform = optax.with_extra_args_support(build(**module.apply(theta)))

        def update(updates, state, params=None, **extra):
            # theta is float32; the updates of half-precision parameters stay half precision.
            steps, state = transform.update(updates, state, params, **extra)
            return optax.tree.cast_like(steps, updates), state

        return optax.GradientTransformationExtraArgs(transform.init, update)

    return LearnedOptimizer(module.init, bind)


def _constant(value):
    return lambda key: jnp.asarray(value, jnp.float32)


def _logit(probability):
    return jnp.log(probability) - jnp.log1p(-probability)


def _check(**values):
    for name, value in values.items():
        upper = float("inf") if name in ("learning_rate", "decay", "eps") else 1.0
        if not 0 < value < upper:
            raise ValueError(f"`{name}` must be strictly between 0 and {upper}, got {value}.")
