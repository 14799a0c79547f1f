"""Image data sets, held on the device as one array a split."""

import functools
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp

from tasks.arguments import check_name
from tasks.base import SPLITS, Split
from tasks.data import digits_copy
from tasks.data.bundled import IMAGES, TEXTS
from tasks.data.splits import Raw


class ImageData(NamedTuple):
    """An image data set in memory.

    Attributes:
      images: split name -> ``uint8 [N, height, width, channels]``.
      labels: split name -> ``int32 [N]``.
      num_classes: number of labels.
    """

    images: dict[Split, jax.Array]
    labels: dict[Split, jax.Array]
    num_classes: int

    def batch(self, key: jax.Array, split: Split, size: int) -> tuple[jax.Array, jax.Array]:
        """``size`` examples drawn with replacement: float32 images in 0..1, int32 labels."""
        check_name(SPLITS, split=split)
        labels = self.labels[split]
        # One draw of bits where `randint` takes three; the modulo's bias is below 1e-4.
        index = jax.random.bits(key, (size,), jnp.uint32) % jnp.uint32(labels.shape[0])
        return self.images[split][index].astype(jnp.float32) / 255, labels[index]


@functools.cache
def load_images(name: str, data_dir: str | None = None) -> ImageData:
    """Loads a data set by its name; those of TFDS must be prepared, the others are always there.

    Splits are fixed: ``digits`` has 1,297 / 250 / 250 train / validation / test images; the
    bundled ones say theirs in their modules; where TFDS has no validation split, the last sixth
    of its train split is it (MNIST: 50,000 / 10,000 / 10,000).

    Args:
      name: ``digits``, a name of ``tasks.data.bundled.IMAGES``, or any TFDS image classification
        data set prepared as ``array_record`` (``mnist``, ``fashion_mnist``, ``cifar10``).
      data_dir: TFDS data folder; ``None`` is TFDS's default.

    Raises:
      ValueError: if the data set is not there, with the command that prepares it, or if its
        files are damaged.
      ImportError: where only the small base of the library is installed, which has no data.
    """
    raw, num_classes = IMAGES[name].read() if name in IMAGES else _stored(name, data_dir)
    # Concrete arrays even when the first call comes from inside a trace: the result is cached.
    with jax.ensure_compile_time_eval():
        return ImageData(
            images={split: jax.device_put(raw[split][0]) for split in SPLITS},
            labels={split: jax.device_put(raw[split][1]) for split in SPLITS},
            num_classes=num_classes,
        )


def _stored(name: str, data_dir: str | None) -> tuple[Raw, int]:
    """Through TFDS, with a validation split."""
    if not re.fullmatch(r"\w+(/\w[\w.-]*)?", name):
        raise ValueError(f"`dataset` must be the name of a data set, got {name!r}.")
    if name in TEXTS:
        raise ValueError(
            f"`dataset` must be images or a table here, got the text {name!r}; texts are for "
            f"language models (rnn_lm, transformer_lm)."
        )
    if name == "digits" and (raw := digits_copy.read(data_dir)):
        return raw, 10
    try:
        from tasks.data import stored  # TFDS takes long to import, and only readers need it.
    except ModuleNotFoundError as error:
        raise ImportError(
            f"the data set {name!r} is read by {error.name}, which is not installed; install it "
            "in the folder of the repository with `pip install '.[train]'`."
        ) from error
    raw, num_classes = stored.read(name, data_dir)
    if name == "digits":
        digits_copy.write(data_dir, raw)
    if "validation" not in raw:
        images, labels = raw["train"]
        cut = len(labels) - len(labels) // 6
        raw["train"] = images[:cut], labels[:cut]
        raw["validation"] = images[cut:], labels[cut:]
    return raw, num_classes
