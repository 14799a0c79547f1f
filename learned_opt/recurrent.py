"""The LSTM that published learned optimizers run once a tensor."""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from learned_opt.initializers import fan_in_normal


class LSTMState(NamedTuple):
    """Both ``[tensors, hidden_size]``; ``hidden`` is also what the LSTM puts out."""

    hidden: jax.Array
    cell: jax.Array


class LSTM(nn.Module):
    """One step of an LSTM: ``[tensors, inputs]`` and its state to the next state.

    ``i, g, f, o = split([x, h] W + b);  c <- sigmoid(f + 1) c + sigmoid(i) tanh(g);
    h <- sigmoid(o) tanh(c)``

    Source: Haiku's ``LSTM``, whose order of gates, forget bias and single kernel
    ``[inputs + hidden_size, 4 hidden_size]`` published weights follow.
    """

    hidden_size: int

    @nn.compact
    def __call__(self, inputs: jax.Array, state: LSTMState) -> LSTMState:
        rows, columns = inputs.shape[-1] + self.hidden_size, 4 * self.hidden_size
        kernel = self.param("kernel", fan_in_normal, (rows, columns))
        bias = self.param("bias", nn.initializers.zeros, (columns,))
        gates = jnp.concatenate([inputs, state.hidden], axis=-1) @ kernel + bias
        i, g, f, o = jnp.split(gates, 4, axis=-1)
        cell = jax.nn.sigmoid(f + 1) * state.cell + jax.nn.sigmoid(i) * jnp.tanh(g)
        return LSTMState(jax.nn.sigmoid(o) * jnp.tanh(cell), cell)


class InitialState(nn.Module):
    """The learned state every tensor's LSTM starts from, ``[1, hidden_size]`` each, 0 at first."""

    hidden_size: int

    @nn.compact
    def __call__(self, num_tensors: int) -> LSTMState:
        shape = (1, self.hidden_size)
        start = [self.param(name, nn.initializers.zeros, shape) for name in LSTMState._fields]
        return LSTMState(*(jnp.tile(x, (num_tensors, 1)) for x in start))
