"""Hand-designed optimizers whose hyperparameters are the meta-parameters."""

import math
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from learned_opt.arguments import check_between, check_count
from learned_opt.base import LearnedOptimizer, learned_optimizer


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

    The numbers of ``optax.adam``, except that finite gradients count as at most a sixteenth of
    the root of the largest float (float32: 1.2e18), so that no square overflows. Its derivative
    is that of ``optax.adam`` where this one has a finite one; a parameter that never had a
    gradient has a second moment of 0, whose root has no derivative, and here one of 0.

    Args:
      learning_rate: initial learning rate, above 0.
      b1: initial decay of the first moment, strictly between 0 and 1.
      b2: initial decay of the second moment, strictly between 0 and 1.
      eps: initial epsilon, above 0.

    Raises:
      ValueError: on a value out of range.
    """
    _check(learning_rate=learning_rate, b1=b1, b2=b2, eps=eps)
    return _tuned(AdamHyperparameters(learning_rate, b1, b2, eps), _adam)


def _adam(learning_rate, b1, b2, eps):
    """``optax.adam``, step by step, with the same state."""

    def init(params):
        mean, square = (jax.tree.map(jnp.zeros_like, params) for _ in range(2))
        return optax.ScaleByAdamState(jnp.zeros([], jnp.int32), mean, square)

    def update(updates, state, params=None):
        del params
        updates = jax.tree.map(_limited, updates)
        count = optax.safe_increment(state.count)
        mean = optax.tree.update_moment(updates, state.mu, b1, 1)
        square = optax.tree.update_moment(updates, state.nu, b2, 2)
        directions = jax.tree.map(
            lambda m, v: _adam_direction(m, v, eps),
            optax.tree.bias_correction(mean, b1, count),
            optax.tree.bias_correction(square, b2, count),
        )
        return directions, optax.ScaleByAdamState(count, mean, square)

    return optax.chain(
        optax.GradientTransformation(init, update), optax.scale_by_learning_rate(learning_rate)
    )


def _limited(gradient):
    limit = float(jnp.finfo(gradient.dtype).max) ** 0.5 / 16
    # An infinite gradient stays one: a diverged run must show.
    return jnp.where(jnp.isinf(gradient), gradient, jnp.clip(gradient, -limit, limit))


@jax.custom_jvp
def _adam_direction(mean, square, eps):
    return mean / (jnp.sqrt(square) + eps)


@_adam_direction.defjvp
def _adam_direction_jvp(primals, tangents):
    """Finite also where ``square`` is 0, whatever ``eps``: no power of a small number is taken."""
    mean, square, eps = primals
    mean_dot, square_dot, eps_dot = tangents
    root = jnp.sqrt(square)
    size = root + eps
    direction = mean / size
    root_dot = jnp.where(root > 0, square_dot / jnp.where(root > 0, 2 * root, 1), 0)
    return direction, (mean_dot - direction * (root_dot + eps_dot)) / size


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
    check_count(num_tensors=num_tensors)
    module = PerTensorHyperparameters(num_tensors, learning_rate, momentum)

    def sgd(learning_rate, momentum):
        def init(params):
            given = len(jax.tree.leaves(params))
            if given not in (0, num_tensors):  # None at all: nothing to do.
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
                momentum[i] * v + g
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
        return build(**module.apply(theta))

    return learned_optimizer(module.init, bind)


def _constant(value):
    return lambda key: jnp.asarray(value, jnp.float32)


def _logit(probability):
    return jnp.log(probability) - jnp.log1p(-probability)


def _check(**values):
    for name, value in values.items():
        unbounded = name in ("learning_rate", "decay", "eps")
        check_between(0, math.inf if unbounded else 1, **{name: value})
