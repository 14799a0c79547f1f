"""Face or not: 100 faces of Labeled Faces in the Wild and 100 pieces of its backgrounds.

Splits: 120 / 40 / 40, balanced. All are different images; the file names neither persons nor
photographs, so a background may be of the photograph of a face in another split.
"""

import numpy as np

from tasks.data.packaged import packaged_file
from tasks.data.splits import Raw, Source, stratified


def read() -> tuple[Raw, int]:
    """Images uint8 ``[N, 25, 25, 1]``; class 1 is a face."""
    values = np.load(packaged_file("scikit-image", "skimage/data/lfw_subset.npy"))
    images = np.round(values * 255).astype(np.uint8)[..., None]
    labels = (np.arange(len(images)) < 100).astype(np.int32)
    return stratified(images, labels, {"validation": 0.2, "test": 0.2}, labels), 2


DATASETS = {
    "faces": Source(
        read,
        "faces and backgrounds, grey, 25x25",
        "lfw_subset of scikit-image (Huang et al. 2007)",
        "photographs from news pages, for research",
    )
}
