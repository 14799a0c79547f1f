"""A variational autoencoder of images."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from tasks.arguments import check_count, check_counts
from tasks.autoencoder import Dense
from tasks.base import Task, TaskConfig
from tasks.reconstruction import check_reconstruction, reconstruction

# Over how many draws of the latents the score of a split is a mean.
SCORE_DRAWS = 16


@dataclass(frozen=True)
class VariationalAutoencoder(TaskConfig):
    """The negative evidence lower bound per pixel, a pixel's value being a coin's probability.

    ``(E_q[-log p(x | z)] + KL(q(z | x) || N(0, I))) / pixels`` in nats, with one draw of
    ``z ~ q = N(mean, deviation^2)`` a step. The constant predictor knows each pixel's mean.

    Source: Kingma and Welling 2014.

    Attributes:
      dataset: of images, bundled (docs/tasks.md) or of TFDS, or several of one shape with commas
        between, of which an instance has one.
      hidden_sizes: width of the encoder's hidden layers; the decoder has them in reverse.
      latents: dimension of z.
      activation: relu, gelu, swish, tanh or sigmoid, or several with commas between.
      init_scale: factors, one of which an instance has, of the initial weights; empty: 1.
      batch_size: images per batch, drawn with replacement.
    """

    dataset: str = "digits"
    hidden_sizes: tuple[int, ...] = (32,)
    latents: int = 8
    activation: str = "tanh"
    init_scale: tuple[float, ...] = ()
    batch_size: int = 64

    def __post_init__(self):
        check_reconstruction(self.dataset, self.activation, self.init_scale, self.batch_size)
        check_counts(hidden_sizes=self.hidden_sizes)
        check_count(latents=self.latents)

    def make(self, data_dir: str | None = None) -> Task:
        """The task.

        Args:
          data_dir: folder of prepared data sets.

        Raises:
          ValueError: on a data set that is not there, or not of images.
        """

        def parts(pixels, act):
            encoder = Dense((*self.hidden_sizes, 2 * self.latents), act)
            return encoder, Dense((*reversed(self.hidden_sizes), pixels), act)

        def init(pixels, key):
            key_encoder, key_decoder = jax.random.split(key)
            encoder, decoder = parts(pixels, jax.nn.relu)
            return {
                "encoder": encoder.init(key_encoder, jnp.zeros((1, pixels)))["params"],
                "decoder": decoder.init(key_decoder, jnp.zeros((1, self.latents)))["params"],
            }

        def losses(params, act, images, key):
            encoder, decoder = parts(images.shape[1], act)
            code = encoder.apply({"params": params["encoder"]}, images)
            mean, log_deviation = jnp.split(code, 2, axis=-1)
            noise = jax.random.normal(key, mean.shape, mean.dtype)
            z = mean + jnp.exp(log_deviation) * noise
            logits = decoder.apply({"params": params["decoder"]}, z)
            # -log p of a coin: softplus(logit) - x logit.
            nats = jnp.sum(jax.nn.softplus(logits) - images * logits, axis=-1)
            kl = 0.5 * (mean**2 + jnp.exp(2 * log_deviation) - 1) - log_deviation
            return (nats + jnp.sum(kl, axis=-1)) / images.shape[1]

        return reconstruction(
            self.dataset,
            init,
            losses,
            _coin_entropy,
            activation=self.activation,
            init_scale=self.init_scale,
            batch_size=self.batch_size,
            unit="nats per pixel",
            draws=SCORE_DRAWS,
            data_dir=data_dir,
        )


def _coin_entropy(images: np.ndarray) -> float:
    """Of each pixel's mean; pixels that are always 0 or always 1 have none."""
    mean = images.mean(axis=0)
    inside = mean[(mean > 0) & (mean < 1)]
    entropies = -inside * np.log(inside) - (1 - inside) * np.log1p(-inside)
    return float(entropies.sum() / mean.size)
