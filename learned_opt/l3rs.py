"""Mixtures of base optimizers, layer by layer, by one small network: like L3RS."""

import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from learned_opt.adam import scale_by_adam
from learned_opt.arguments import check_between, check_count, check_given, check_num_tensors
from learned_opt.base import LearnedOptimizer, learned_optimizer
from learned_opt.groups import group_by_shape, stack, unstack
from learned_opt.norms import norm, over_norm

BASES = ("gradient", "momentum", "adam")
OBSERVED = ("loss", "gradient", "parameter")
DECAYS = (0.9, 0.99)  # At first.

_B1, _B2, _EPS = 0.9, 0.999, 1e-8


class LayerwiseController(nn.Module):
    """From what is seen of every tensor to its step size and the shares of the base optimizers.

    Attributes:
      num_tensors: tensors that have an embedding.
      embedding_size, hidden_size: widths.
      learning_rate: the step size at first.
    """

    num_tensors: int
    embedding_size: int
    hidden_size: int
    learning_rate: float

    @nn.compact
    def __call__(self, observed, averages, steps, num_steps, places):
        """One step.

        Args:
          observed: ``[tensors, 3]``, see ``OBSERVED``.
          averages: ``[tensors, 3, 2]``, of the steps before.
          steps: updates done.
          num_steps: updates in all.
          places: which of the ``num_tensors`` these are, a tuple.

        Returns:
          Step sizes ``[tensors]``, shares ``[tensors, 3]`` (see ``BASES``) and the averages.
        """
        logits = self.param(
            "logit_decays", lambda key: jax.scipy.special.logit(jnp.asarray(DECAYS, jnp.float32))
        )
        embedding = self.param(
            "embedding", nn.initializers.normal(1.0), (self.num_tensors, self.embedding_size)
        )
        log_rate = self.param(
            "log_learning_rate", lambda key: jnp.float32(math.log(self.learning_rate))
        )
        decays = jax.nn.sigmoid(logits)
        averages = decays * averages + (1 - decays) * observed[..., None]
        corrected = averages / (1 - decays ** (steps + 1))
        done = jnp.asarray(steps, averages.dtype)
        time = jnp.stack([jnp.minimum(done / num_steps, 1), jnp.log1p(done) / 10])
        features = jnp.concatenate(
            [
                embedding[jnp.asarray(places, int)],
                corrected.reshape(len(observed), len(OBSERVED) * len(DECAYS)),
                jnp.broadcast_to(time, (len(observed), 2)),
            ],
            axis=1,
        )
        hidden = jax.nn.relu(nn.Dense(self.hidden_size, name="hidden")(features))
        outputs = nn.Dense(1 + len(BASES), kernel_init=nn.initializers.zeros, name="out")(hidden)
        sizes = jnp.exp(log_rate + outputs[:, 0])
        return sizes, jax.nn.softmax(outputs[:, 1:]), averages


class L3RSState(NamedTuple):
    """State of the mixture.

    Attributes:
      adam: ``optax.ScaleByAdamState``; its moments are lists with an array ``[n, *shape]`` for
        every shape that ``n`` tensors have.
      averages: ``[tensors, 3, 2]``, of what is seen of every tensor with elements, group by
        group, with either decay.
    """

    adam: optax.ScaleByAdamState
    averages: jax.Array


def l3rs_optimizer(
    num_tensors: int = 4,
    learning_rate: float = 1e-3,
    embedding_size: int = 8,
    hidden_size: int = 16,
) -> LearnedOptimizer:
    """A learned mixture of base optimizers for every tensor, as in L3RS: 375 meta-parameters.

    ``w_l <- w_l - size_l sum_p share_lp d_lp / rms(d_lp)`` with the gradient, its momentum and
    Adam's step as directions ``d``. Step size and shares (a softmax) come from one network with a
    ReLU, whose inputs are a learned embedding of the tensor, two numbers of time, and two
    averages with learned decays of the loss and of the root mean square of gradient and
    parameters, all three as logs. At first the shares are equal and the size is
    ``learning_rate``.

    Every direction has a root mean square of 1, so sizes compare with rates of Adam. An embedding
    belongs to a place in the parameters: theta fits one network, at any width.

    Args:
      num_tensors: leaves of the parameters (an MLP of L layers, biases included, has 2 L).
      learning_rate: initial step size, above 0.
      embedding_size: numbers that are learned of a tensor.
      hidden_size: width of the network.

    Raises:
      ValueError: on a value out of range; from the transformation's ``init``, on parameters with
        another number of leaves; from its ``update``, without parameters or without
        ``value=loss``.

    Source: Kristiansen et al. 2024 (arXiv 2408.09310), whose step is
    ``lambda_l sum_p mu_lp d_lp`` with normalized directions and features of these three kinds.
    Differs: no code was published; sizes, decays and the choice of base optimizers are ours.
    """
    check_count(num_tensors=num_tensors, embedding_size=embedding_size, hidden_size=hidden_size)
    check_between(0, math.inf, learning_rate=learning_rate)
    module = LayerwiseController(num_tensors, embedding_size, hidden_size, learning_rate)
    base = scale_by_adam(_B1, _B2, _EPS)

    def init(key):
        nothing = jnp.zeros((1, 3)), jnp.zeros((1, 3, 2))
        return module.init(key, *nothing, jnp.int32(0), 1, (0,))

    def bind(theta, num_steps):
        def init_fn(params):
            check_num_tensors(num_tensors, params)
            stacks = stack(params, group_by_shape(params))
            count = sum(map(len, stacks))
            dtype = jnp.result_type(jnp.float32, *stacks)
            return L3RSState(
                base.init(stacks), jnp.zeros((count, len(OBSERVED), len(DECAYS)), dtype)
            )

        def update_fn(updates, state, params=None, *, value=None, **extra):
            del extra
            check_given("L3RS", params, value)
            groups = group_by_shape(params)
            grads, weights = stack(updates, groups), stack(params, groups)
            adam_steps, adam = base.update(grads, state.adam)
            sizes, shares, averages = module.apply(
                theta,
                _observed(grads, weights, value, state.averages.dtype),
                state.averages,
                state.adam.count,
                num_steps,
                sum(groups, ()),
            )
            steps, at = [], 0
            for directions in zip(grads, adam.mu, adam_steps, strict=True):
                here = slice(at, at := at + len(directions[0]))
                steps.append(_mixed(directions, sizes[here], shares[here]))
            return unstack(steps, groups, updates), L3RSState(adam, averages)

        return optax.GradientTransformationExtraArgs(init_fn, update_fn)

    return learned_optimizer(init, bind)


def _observed(grads, weights, loss, dtype) -> jax.Array:
    """``[tensors, 3]``: see ``OBSERVED``."""

    def log_sizes(stacks):
        sizes = [norm(x, range(1, x.ndim)) / (x.size / len(x)) ** 0.5 for x in stacks]
        return jnp.log(1e-8 + jnp.concatenate(sizes)) / 10

    grad_sizes, weight_sizes = log_sizes(grads), log_sizes(weights)
    loss = jnp.asarray(loss, dtype)
    log_loss = jnp.sign(loss) * jnp.log1p(jnp.abs(loss))  # Losses may be negative.
    return jnp.stack([jnp.broadcast_to(log_loss, grad_sizes.shape), grad_sizes, weight_sizes], 1)


def _mixed(directions: Any, sizes: jax.Array, shares: jax.Array) -> jax.Array:
    """The steps of tensors of one shape, ``[n, *shape]``."""
    axes = range(1, directions[0].ndim)
    root = (directions[0].size / len(directions[0])) ** 0.5
    weights = -sizes * shares.T * root  # [bases, n]
    mixed = [
        jnp.expand_dims(weight, axes) * over_norm(direction, axes, _EPS)
        for direction, weight in zip(directions, weights, strict=True)
    ]
    return sum(mixed, jnp.zeros_like(mixed[0]))
