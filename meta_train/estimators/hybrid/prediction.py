"""A small network that predicts the next gradient from past ones, trained while it is used."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from meta_train.checks import check_positive, check_whole

_DECAYS = (0.5, 0.9)  # Of the running means of the gradient, per refresh.


class Predictor(NamedTuple):
    """Predicts the gradient between two refreshes.

    Attributes:
      init: ``(key, P, dtype) -> state``.
      predict: ``state -> [P]``.
      learn: ``(state, gradient [P]) -> state`` at a refresh: the network is first trained to
        have predicted this gradient, then remembers it.
    """

    init: Callable[[jax.Array, int, Any], Any]
    predict: Callable[[Any], jax.Array]
    learn: Callable[[Any, jax.Array], Any]


class PredictionState(NamedTuple):
    """The network's ``params`` and ``opt_state``, the last gradients ``past`` ``[h, P]`` (newest
    first), their running ``means`` ``[2, P]``, and how many were seen, int32."""

    params: Any
    opt_state: Any
    past: jax.Array
    means: jax.Array
    seen: jax.Array


class _PerParameter(nn.Module):
    """The same small network for every parameter; its last layer starts at zero."""

    hidden_sizes: Sequence[int]

    @nn.compact
    def __call__(self, features):
        x = features
        for size in self.hidden_sizes:
            x = nn.tanh(nn.Dense(size)(x))
        return nn.Dense(1, use_bias=False, kernel_init=nn.initializers.zeros)(x)[..., 0]


def learned_features(
    *,
    num_past: int = 4,
    hidden_sizes: Sequence[int] = (),
    learning_rate: float = 0.03,
    updates: int = 5,
) -> Predictor:
    """The newest gradient plus what a per-parameter network adds to it.

    Inputs are the last ``num_past`` refresh gradients and their running means, in units of
    about the newest one's root mean square; so is the output. It starts as the stale gradient, and
    can learn to average out noise and to extrapolate. Weights are shared by all parameters,
    so each refresh is a training set of ``P`` examples.

    Args:
      num_past: ``h``, gradients remembered.
      hidden_sizes: widths of tanh layers; empty for a linear prediction.
      learning_rate: of Adam.
      updates: steps of Adam per refresh.

    Raises:
      ValueError: on a count that is not a whole number of at least 1, or a rate not above 0.

    Source: "learned features" of the Hybrid-ES poster's future work.
    """
    check_whole(num_past=num_past, updates=updates)
    check_positive(learning_rate=learning_rate)
    network = _PerParameter(tuple(hidden_sizes))
    optimizer = optax.adam(learning_rate)

    def init(key, size, dtype):
        past = jnp.zeros((num_past, size), dtype)
        means = jnp.zeros((len(_DECAYS), size), dtype)
        params = network.init(key, jnp.zeros((1, num_past + len(_DECAYS)), dtype))
        params = jax.tree.map(lambda x: x.astype(dtype), params)
        return PredictionState(
            params, optimizer.init(params), past, means, jnp.zeros([], jnp.int32)
        )

    def unit(state):
        """The power of two nearest to the newest gradient's root mean square; 1 if it is zero.

        Scaling by it is exact, so it rounds the same whether XLA divides or multiplies.
        """
        rms = jnp.sqrt(jnp.mean(jnp.square(state.past[0])))
        exponent = jnp.round(jnp.log2(jnp.where(rms > 0, rms, 1.0))).astype(jnp.int32)
        return jnp.ldexp(jnp.ones([], rms.dtype), exponent)

    def correction(params, state):
        """What the network adds to the newest gradient, in units of it, ``[P]``."""
        rows = [*state.past, *state.means]
        return network.apply(params, jnp.stack(rows, axis=-1) / unit(state))

    def predict(state):
        return state.past[0] + unit(state) * correction(state.params, state)

    def learn(state, gradient):
        target = (gradient - state.past[0]) / unit(state)

        def loss(params):
            return jnp.mean(jnp.square(correction(params, state) - target))

        def update(carry, _):
            params, opt_state = carry
            steps, opt_state = optimizer.update(jax.grad(loss)(params), opt_state, params)
            return (optax.apply_updates(params, steps), opt_state), None

        before = state.params, state.opt_state
        after = jax.lax.scan(update, before, None, length=updates)[0]
        known = state.seen > 0
        params, opt_state = jax.tree.map(lambda a, b: jnp.where(known, a, b), after, before)
        decays = jnp.asarray(_DECAYS, gradient.dtype)[:, None]
        # Bias-corrected as it goes: the first gradient is the first mean.
        decays = jnp.minimum(decays, state.seen / (state.seen + 1.0))
        return PredictionState(
            params,
            opt_state,
            jnp.concatenate([gradient[None], state.past[:-1]]),
            (decays * state.means + (1 - decays) * gradient).astype(gradient.dtype),
            state.seen + 1,
        )

    return Predictor(init, predict, learn)
