"""Images described by themselves: what autoencoders have in common."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from tasks.arguments import SCALES, check_count, check_names, check_numbers
from tasks.base import Params, Task
from tasks.data.pool import as_float, load_pool
from tasks.instances import Options
from tasks.supervised import Activation, activation_names, activation_of, scaled

# ``(params, activation, images [N, pixels], key) -> [N]``: the loss of each.
Losses = Callable[[Params, Activation, jax.Array, jax.Array], jax.Array]


def check_reconstruction(
    dataset: str, activation: str, init_scale: tuple[float, ...], batch_size: int
) -> None:
    """Raises ``ValueError`` on a value out of range, or a name that is none."""
    check_names(None, dataset=dataset)
    activation_names(activation)
    check_numbers(SCALES, init_scale=init_scale)
    check_count(batch_size=batch_size)


def reconstruction(
    dataset: str,
    init: Callable[[int, jax.Array], Params],
    losses: Losses,
    constant: Callable[[np.ndarray], float],
    *,
    activation: str,
    init_scale: tuple[float, ...],
    batch_size: int,
    unit: str,
    draws: int = 1,
    data_dir: str | None = None,
) -> Task:
    """The mean of ``losses`` over images, which are the whole batch.

    Args:
      dataset: image data sets of one shape, with commas between.
      init: ``(pixels, key) -> params``.
      losses: of a batch, with what noise it has.
      constant: the best mean loss without looking at an image, from those of training,
        ``[N, pixels]``.
      activation, init_scale, batch_size: as of ``tasks.supervised.supervised``.
      unit: of the loss.
      draws: of the noise in ``losses``, over which the score is a mean.
      data_dir: TFDS data folder.

    Raises:
      ValueError: on an unknown name, or a data set that is not there or not of images.
    """
    names = activation_names(activation)
    pool = load_pool(dataset, data_dir)
    if pool.inputs["train"].ndim != 4:
        raise ValueError(f"`dataset` must be of images, got {dataset!r}.")
    of_each = [x.reshape(len(x), -1) for x, _ in pool.of_each("train")]
    scales = tuple(init_scale) or (1.0,)
    options = Options({"activation": names, "dataset": of_each, "init_scale": scales})
    constants = [constant(np.asarray(as_float(x), np.float64)) for x in of_each]

    def start(instance, key):
        params = init(of_each[0].shape[1], key)
        return scaled(params, options.value(instance, "init_scale", scales))

    def batch(instance, key, split):
        return pool.batch(options.index(instance, "dataset"), key, split, batch_size)[0]

    def per_image(params, instance, images, key):
        act = activation_of(names, options, instance)
        return losses(params, act, images.reshape(images.shape[0], -1), key)

    def loss(params, instance, batch, key):
        return jnp.mean(per_image(params, instance, batch, key))

    def score(params, instance, split):
        images, _, weights = pool.whole(options.index(instance, "dataset"), split)
        keys = jax.random.split(jax.random.key(0), draws)
        found = jax.lax.map(lambda key: per_image(params, instance, images, key), keys)
        return {"loss": jnp.average(jnp.mean(found, axis=0), weights=weights)}

    return Task(
        options.sample,
        start,
        batch,
        loss,
        score,
        unit=unit,
        constant_loss=lambda instance: jnp.asarray(
            options.value(instance, "dataset", constants), jnp.float32
        ),
    )
