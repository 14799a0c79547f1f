"""Patches of ten textures: which one is it? (See ``tasks.data.patches`` for the splits.)

Surfaces, tissue and other pictures of one kind of structure; none is among the photographs.
"""

import functools

from tasks.data.packaged import packaged_file
from tasks.data.patches import read as read_patches
from tasks.data.splits import Raw, Source

TEXTURES = (
    "brick.png",  # CC0Textures; CC0.
    "camera.png",  # L. Varshney; CC0. Grass and blurred buildings, mostly.
    "cell.png",  # CC0.
    "clock_motion.png",  # S. van der Walt; public domain.
    "coins.png",  # Brooklyn Museum; no known restrictions.
    "grass.png",  # CC0.
    "gravel.png",  # CC0Textures; CC0.
    "ihc.png",  # Stained tissue; no known restrictions.
    "moon.png",  # No known restrictions.
    "page.png",  # A scanned page; no known restrictions.
)


def read(side: int) -> tuple[Raw, int]:
    """Patches uint8 ``[N, side, side, 1]``, and 10 classes."""
    paths = [packaged_file("scikit-image", f"skimage/data/{name}") for name in TEXTURES]
    return read_patches(paths, side, color=False)


DATASETS = {
    f"textures_{side}": Source(
        functools.partial(read, side),
        f"patches of 10 textures, grey, {side}x{side}",
        "pictures in scikit-image",
        "CC0, public domain, or no known restrictions",
    )
    for side in (8, 16, 32)
}
