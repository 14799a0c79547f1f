"""Image data sets on disk, read through TFDS."""

import contextlib
import os

import numpy as np
import tensorflow_datasets as tfds

from tasks.data.bundled import IMAGES, TABLES
from tasks.data.digits import Digits
from tasks.data.digits_copy import DIGEST, digest
from tasks.data.splits import Raw


def read(name: str, data_dir: str | None) -> tuple[Raw, int]:
    """Images ``uint8 [N, height, width, channels]`` and labels ``int32 [N]`` of every split.

    Args:
      name, data_dir: as of ``tasks.data.load_images``.

    Returns:
      The arrays by split, and the number of classes.

    Raises:
      ValueError: as ``tasks.data.load_images``.
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
    return raw, num_classes


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
        "and pass that folder as --data_dir. These need no download: digits, "
        f"{', '.join([*IMAGES, *TABLES])}."
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
