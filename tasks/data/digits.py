"""The bundled data set: scikit-learn's handwritten digits, written by TFDS as ``array_record``."""

from typing import ClassVar

import importlib_resources  # noqa: F401  (tensorflow_datasets needs it and does not declare it)
import numpy as np
import tensorflow_datasets as tfds

from tasks.data.digits_copy import SPLIT_SIZES

_ORDER_SEED = 0


class Digits(tfds.core.GeneratorBasedBuilder):
    """1,797 real 8x8 grey images of handwritten digits (UCI ML repository), 10 classes.

    Images are ``uint8 [8, 8, 1]`` scaled from 0..16 to 0..255. They are Tensor features:
    TFDS cannot encode Image features without TensorFlow.
    """

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES: ClassVar = {"1.0.0": "First release."}
    # TFDS looks for files beside the class otherwise, which a builder outside its tree lacks.
    pkg_dir_path = None

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=__doc__,
            homepage="https://archive.ics.uci.edu/dataset/80",
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Tensor(shape=(8, 8, 1), dtype=np.uint8),
                    "label": tfds.features.ClassLabel(num_classes=10),
                }
            ),
        )

    def _split_generators(self, dl_manager):
        del dl_manager  # Nothing to download.
        from sklearn.datasets import load_digits

        digits = load_digits()
        images = np.round(digits.images * (255 / 16)).astype(np.uint8)[..., None]
        order = np.random.default_rng(_ORDER_SEED).permutation(len(images))
        ends = np.cumsum(list(SPLIT_SIZES.values()))
        return {
            name: self._generate_examples(images, digits.target, order[end - size : end])
            for (name, size), end in zip(SPLIT_SIZES.items(), ends, strict=True)
        }

    def _generate_examples(self, images, labels, rows):
        for row in rows:
            yield int(row), {"image": images[row], "label": int(labels[row])}
