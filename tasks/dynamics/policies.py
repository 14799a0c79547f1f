"""Policies for control: small Flax modules, and the running normalization of what they see."""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp


class Linear(nn.Module):
    """``action = W observation``, without a bias, from ``W = 0``; ``hidden_sizes`` is not read."""

    num_actions: int
    hidden_sizes: tuple[int, ...] = ()

    @nn.compact
    def __call__(self, observation):
        return nn.Dense(
            self.num_actions, use_bias=False, kernel_init=nn.initializers.zeros, name="out"
        )(observation)


class MLP(nn.Module):
    """Tanh layers, then a linear one without a bias whose first weights are 0."""

    num_actions: int
    hidden_sizes: tuple[int, ...] = (32, 32)

    @nn.compact
    def __call__(self, observation):
        x = observation
        for i, size in enumerate(self.hidden_sizes):
            x = nn.tanh(nn.Dense(size, name=f"hidden_{i}")(x))
        return Linear(self.num_actions, name="out")(x)


POLICIES: dict[str, type[Linear] | type[MLP]] = {"linear": Linear, "mlp": MLP}


class Normalization(NamedTuple):
    """Welford's running moments of observations ``[D]``.

    Attributes:
      number: float scalar, observations so far, and one more.
      mean: ``[D]``.
      squares: ``[D]``, the sum of squared deviations from the mean.
    """

    number: jax.Array
    mean: jax.Array
    squares: jax.Array

    @staticmethod
    def start(size: int) -> "Normalization":
        """As if one observation at 0 with variance 1 had been seen: no division by 0."""
        return Normalization(jnp.ones([]), jnp.zeros(size), jnp.ones(size))


def normalized(seen: Normalization, observation: jax.Array) -> tuple[Normalization, jax.Array]:
    """The moments with this observation, and the observation in units of them.

    Source: Mania et al. 2018 (ARS V2), whose moments are those of all episodes.
    """
    number = seen.number + 1
    off = observation - seen.mean
    mean = seen.mean + off / number
    squares = seen.squares + off * (observation - mean)
    return Normalization(number, mean, squares), (observation - mean) * jax.lax.rsqrt(
        squares / number
    )
