"""Which picture is this patch from: real image statistics at any size, without a download.

Every picture is cut into cells of 64x64 pixels, every cell belongs to one split, and a patch lies
within one cell: no pixel is in two splits. A patch is a region of 32x32 pixels, averaged over areas
to 8 or 16 pixels or left as it is, so the sizes are one data set at three resolutions. 400 / 80 /
80 patches of each picture, no two of them equal at 8 grey pixels.
"""

import functools
import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from tasks.base import Split
from tasks.data.splits import Raw, area_average

CELL, REGION, STRIDE = 64, 32, 4
PER_PICTURE: dict[Split, int] = {"train": 400, "validation": 80, "test": 80}
# Of the cells of a picture; training gets the rest.
_HELD_OUT = 0.15
# Pictures with a shorter side of twice this and more are averaged down, or patches would be flat.
_SIDE = 350


def picture(path: Path) -> np.ndarray:
    """An image file, or an array of one, as uint8 ``[height, width, 3]``."""
    from PIL import Image

    with Image.open(path) as opened:
        pixels = np.asarray(opened.convert("RGB"))
    factor = max(1, min(pixels.shape[:2]) // _SIDE)
    height, width = (size // factor * factor for size in pixels.shape[:2])
    blocks = pixels[:height, :width].reshape(height // factor, factor, width // factor, factor, 3)
    return np.round(blocks.mean(axis=(1, 3))).astype(np.uint8)


def grey(images: np.ndarray) -> np.ndarray:
    """Luma (ITU-R BT.601) of uint8 ``[..., 3]``, as uint8 ``[..., 1]``."""
    return np.round(images @ np.array([0.299, 0.587, 0.114])).astype(np.uint8)[..., None]


@functools.cache
def regions(paths: Sequence[Path]) -> Raw:
    """Regions uint8 ``[N, 32, 32, 3]`` of pictures, and which picture each is from, int32 ``[N]``.

    Raises:
      ValueError: if a picture is too small, or too uniform, for so many patches.
    """
    rng = np.random.default_rng(0)
    found: dict[Split, list[np.ndarray]] = {split: [] for split in PER_PICTURE}
    # Over all pictures and splits: uniform patches, of sky and margins, occur in many.
    seen: set[bytes] = set()
    for path in paths:
        pixels = picture(path)
        cells = list(itertools.product(*(range(0, s - CELL + 1, CELL) for s in pixels.shape[:2])))
        order, cut = rng.permutation(len(cells)), round(_HELD_OUT * len(cells))
        parts = {"validation": order[:cut], "test": order[cut : 2 * cut], "train": order[2 * cut :]}
        for split, number in PER_PICTURE.items():
            offsets = range(0, CELL - REGION + 1, STRIDE)
            corners = [
                (cells[cell][0] + down, cells[cell][1] + right)
                for cell in parts[split]
                for down in offsets
                for right in offsets
            ]
            kept: list[np.ndarray] = []
            for corner in rng.permutation(corners):
                if len(kept) == number:
                    break
                region = pixels[corner[0] : corner[0] + REGION, corner[1] : corner[1] + REGION]
                small = area_average(grey(region)[None], 8).tobytes()
                if small not in seen:
                    seen.add(small)
                    kept.append(region)
            if len(kept) < number:
                raise ValueError(
                    f"`paths` must be pictures of at least {number} different {split} patches, "
                    f"got {path} with {len(kept)}; leave it out."
                )
            found[split].append(np.stack(kept))
    labels = np.arange(len(paths), dtype=np.int32)
    return {
        split: (np.concatenate(parts), np.repeat(labels, PER_PICTURE[split]))
        for split, parts in found.items()
    }


def read(paths: Sequence[Path], side: int, color: bool) -> tuple[Raw, int]:
    """Patches uint8 ``[N, side, side, 3 or 1]`` of pictures, and the number of pictures."""
    raw = regions(tuple(paths))
    kept = {split: (x if color else grey(x), y) for split, (x, y) in raw.items()}
    return {split: (area_average(x, side), y) for split, (x, y) in kept.items()}, len(paths)
