"""Image data sets through TFDS, held on the device as one array a split."""

import contextlib
import functools
import os
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tensorflow_datasets as tfds

from tasks.base import SPLITS, Split
from tasks.data.digits import DIGEST, Digits, digest


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
      ValueError: if the data set is not there, with the command that prepares it, or if its
        files are damaged.
    """
    data_dir = os.path.expanduser(data_dir or tfds.core.constants.DATA_DIR)
    folder = os.path.join(data_dir, name)
    with _damage_named(folder):
        builder = _digits(data_dir) if name == "digits" else _prepared_builder(name, data_dir)
        features = builder.info.features
    if not {"image", "label"} <= set(features):
        raise ValueError(
            f"`dataset` must have the features 'image' and 'label', got {name!r} with "
            f"{sorted(features)}."
        )
    if not builder.info.splits:
        raise _damage(folder, "dataset_info.json knows of no split")
    if not {"train", "test"} <= set(builder.info.splits):
        raise ValueError(
            f"`dataset` must have the splits 'train' and 'test', got {name!r} with "
            f"{sorted(builder.info.splits)}."
        )
    num_classes = features["label"].num_classes
    with _damage_named(folder):
        raw = {split: _read(builder, split, num_classes) for split in builder.info.splits}
    if name == "digits" and digest(raw) != DIGEST:
        raise _damage(folder, "it does not hold the images of scikit-learn")
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
            num_classes=num_classes,
        )


@contextlib.contextmanager
def _damage_named(folder: str):
    """Turns whatever TFDS and its readers raise on damaged files into one sentence."""
    try:
        yield
    except ValueError as error:
        if str(error).startswith("`"):  # Ours.
            raise
        raise _damage(folder, error) from error
    except Exception as error:  # Of many kinds: protobuf's, riegeli's, JSON's, the system's.
        raise _damage(folder, error) from error


def _damage(folder: str, problem: object) -> ValueError:
    reason = " ".join(str(problem).split())[:200]
    return ValueError(
        f"`data_dir` has a damaged data set in {folder} ({reason}); move that folder away and "
        "prepare it again ('digits' is prepared by itself)."
    )


def _digits(data_dir: str) -> tfds.core.DatasetBuilder:
    tfds.disable_progress_bar()
    try:
        builder = Digits(data_dir=data_dir, file_format="array_record")
        builder.download_and_prepare()
        return builder
    except FileExistsError:  # Another process was faster.
        return Digits(data_dir=data_dir, file_format="array_record")
    except OSError as error:
        raise ValueError(
            f"`data_dir` {data_dir} must be a folder that can be written: {error}."
        ) from error


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


def _read(
    builder: tfds.core.DatasetBuilder, split: str, num_classes: int
) -> tuple[np.ndarray, np.ndarray]:
    source = builder.as_data_source(split)
    examples = source.__getitems__(list(range(len(source))))
    labels = np.array([example["label"] for example in examples], np.int32)
    expected = builder.info.splits[split].num_examples
    if not len(labels) == expected > 0:
        raise ValueError(f"split {split} has {len(labels)} examples instead of {expected}")
    if not 0 <= labels.min() <= labels.max() < num_classes:
        raise ValueError(f"split {split} has labels outside 0..{num_classes - 1}")
    return np.stack([example["image"] for example in examples]), labels
