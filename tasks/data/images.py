"""Image data sets through TFDS, held on the device as one array a split."""

import functools
import os
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tensorflow_datasets as tfds

from tasks.base import SPLITS, Split
from tasks.data.digits import Digits


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
        labels = self.labels[split]
        # One draw of bits where `randint` takes three; the modulo's bias is below 1e-4.
        index = jax.random.bits(key, (size,), jnp.uint32) % jnp.uint32(labels.shape[0])
        return self.images[split][index].astype(jnp.float32) / 255, labels[index]


@functools.cache
def load_images(name: str, data_dir: str | None = None) -> ImageData:
    """Loads a data set by its TFDS name; ``digits`` is bundled, others must be prepared.

    Splits are fixed: ``digits`` has 1,297 / 250 / 250 train / validation / test images;
    where TFDS has no validation split, the last sixth of its train split is it (MNIST:
    50,000 / 10,000 / 10,000).

    Args:
      name: ``digits``, or any TFDS image classification data set prepared as
        ``array_record`` (``mnist``, ``fashion_mnist``, ``cifar10``).
      data_dir: TFDS data folder; ``None`` is TFDS's default.

    Raises:
      ValueError: if the data set is not there, with the command that prepares it.
    """
    data_dir = os.path.expanduser(data_dir or tfds.core.constants.DATA_DIR)
    if name == "digits":
        tfds.disable_progress_bar()
        builder = Digits(data_dir=data_dir, file_format="array_record")
        try:
            builder.download_and_prepare()
        except FileExistsError:  # Another process was faster.
            builder = Digits(data_dir=data_dir, file_format="array_record")
        except OSError as error:
            raise ValueError(
                f"`data_dir` {data_dir} must be a folder that can be written: {error}."
            ) from error
    else:
        builder = _prepared_builder(name, data_dir)
    features = builder.info.features
    if not {"image", "label"} <= set(features):
        raise ValueError(
            f"`dataset` must have the features 'image' and 'label', got {name!r} with "
            f"{sorted(features)}."
        )
    raw = {split: _read(builder, split) for split in builder.info.splits}
    if not {"train", "test"} <= set(raw):
        raise ValueError(
            f"`dataset` must have the splits 'train' and 'test', got {name!r} with {sorted(raw)}."
        )
    if "validation" not in raw:
        images, labels = raw["train"]
        cut = len(labels) - len(labels) // 6
        raw["train"] = images[:cut], labels[:cut]
        raw["validation"] = images[cut:], labels[cut:]
    # Concrete arrays even when the first call comes from inside a trace: the result is cached.
    with jax.ensure_compile_time_eval():
        return ImageData(
            images={split: jnp.asarray(raw[split][0]) for split in SPLITS},
            labels={split: jnp.asarray(raw[split][1]) for split in SPLITS},
            num_classes=features["label"].num_classes,
        )


def _prepared_builder(name: str, data_dir: str) -> tfds.core.DatasetBuilder:
    problem = "it is not there"
    try:
        builder = tfds.core.read_only_builder.builder_from_files(name, data_dir=data_dir)
        if builder.info.file_format.value == "array_record":
            return builder
        problem = f"it is there as {builder.info.file_format.value}, which needs TensorFlow"
    except tfds.core.registered.DatasetNotFoundError:
        pass
    raise ValueError(
        f"`dataset` {name!r} cannot be read from the folder {data_dir}: {problem}. On a machine "
        "with a network, prepare it with\n"
        '  pip install tensorflow-datasets tensorflow && python -c "import tensorflow_datasets '
        f"as tfds; tfds.builder('{name}', data_dir='{data_dir}', "
        "file_format='array_record').download_and_prepare()\"\n"
        "and pass that folder as --data_dir. The data set 'digits' needs no download."
    )


def _read(builder: tfds.core.DatasetBuilder, split: str) -> tuple[np.ndarray, np.ndarray]:
    source = builder.as_data_source(split)
    examples = source.__getitems__(list(range(len(source))))
    return (
        np.stack([example["image"] for example in examples]),
        np.array([example["label"] for example in examples], np.int32),
    )
