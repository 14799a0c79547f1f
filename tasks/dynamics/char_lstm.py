"""A small LSTM reading one sequence of symbols: the gradient of its prediction loss."""

import jax
import jax.numpy as jnp
import numpy as np


def char_lstm_theta(key: jax.Array, hidden: int, vocabulary: int) -> dict[str, jax.Array]:
    """Initial parameters: weights with standard deviation ``1/sqrt(fan in)``, zero biases."""
    key_input, key_recurrent, key_output = jax.random.split(key, 3)
    scale = hidden**-0.5
    return {
        "input": scale * jax.random.normal(key_input, (vocabulary, 4 * hidden)),
        "recurrent": scale * jax.random.normal(key_recurrent, (hidden, 4 * hidden)),
        "gate_bias": jnp.zeros(4 * hidden),
        "output": scale * jax.random.normal(key_output, (hidden, vocabulary)),
        "output_bias": jnp.zeros(vocabulary),
    }


def char_lstm(symbols: np.ndarray, hidden: int):
    """Predicts each of ``symbols``, int ``[T + 1]``, from those before it.

    Theta is what ``char_lstm_theta`` returns; the loss of a step is the cross-entropy of the
    next symbol in nats. An episode has at most ``T`` steps.

    Returns:
      ``init(theta, key, horizon) -> state`` and ``step(theta, state, key) -> (state, loss)``.
    """
    text = jnp.asarray(symbols, jnp.int32)

    def init(theta, key, horizon):
        del key, horizon
        zeros = jnp.zeros(hidden, theta["recurrent"].dtype)
        return zeros, zeros, jnp.int32(0)

    def step(theta, state, key):
        del key
        memory, output, position = state
        gates = theta["input"][text[position]] + output @ theta["recurrent"]
        forget, add, emit, candidate = jnp.split(gates + theta["gate_bias"], 4)
        memory = jax.nn.sigmoid(forget) * memory + jax.nn.sigmoid(add) * jnp.tanh(candidate)
        output = jax.nn.sigmoid(emit) * jnp.tanh(memory)
        logits = output @ theta["output"] + theta["output_bias"]
        loss = -jax.nn.log_softmax(logits)[text[position + 1]]
        return (memory, output, position + 1), loss

    return init, step
