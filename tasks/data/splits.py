"""What data sets share: examples by split, with what is said of them, and averaging of pixels."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from tasks.base import SPLITS, Split

# By split: inputs ``[N, ...]``, uint8 (0 to 255 stand for 0 to 1) or float32, and targets ``[N]``.
Raw = dict[Split, tuple[np.ndarray, np.ndarray]]


class Source(NamedTuple):
    """A data set that needs no download.

    Attributes:
      read: ``() -> (examples by split, number of classes)``; 0 classes: the targets are numbers.
      what: the data, in a few words.
      origin: where they come from.
      licence: under which they may be used.
    """

    read: Callable[[], tuple[Raw, int]]
    what: str
    origin: str
    licence: str


def stratified(
    inputs: np.ndarray, targets: np.ndarray, shares: Mapping[Split, float], strata: np.ndarray
) -> Raw:
    """Each example in one split, by a permutation fixed for good; every stratum in these shares.

    Examples equal to an earlier one are left out, so none is in two splits.

    Args:
      inputs: ``[N, ...]``.
      targets: ``[N]``.
      shares: of validation and test; the rest is the training split.
      strata: ``[N]``, usually the class.
    """
    _, first = np.unique(inputs.reshape(len(inputs), -1), axis=0, return_index=True)
    rng = np.random.default_rng(0)
    held_out: tuple[Split, ...] = ("validation", "test")
    rows: dict[Split, list[np.ndarray]] = {split: [] for split in SPLITS}
    for stratum in np.unique(strata):
        found = rng.permutation(np.intersect1d(first, np.flatnonzero(strata == stratum)))
        sizes = [round(shares[split] * len(found)) for split in held_out]
        for split, size in zip(held_out, sizes, strict=True):
            rows[split].append(found[:size])
            found = found[size:]
        rows["train"].append(found)
    # Mixed, so that a part of a split is as good as the whole.
    mixed = {split: rng.permutation(np.concatenate(parts)) for split, parts in rows.items()}
    return {split: (inputs[index], targets[index]) for split, index in mixed.items()}


def area_average(images: np.ndarray, side: int) -> np.ndarray:
    """Square images ``[N, s, s, channels]`` at ``side`` pixels: means over the area of each.

    Returns:
      uint8 ``[N, side, side, channels]``; sides need not divide one another.
    """
    old = images.shape[1]
    edges = np.arange(side + 1) * (old / side)
    pixels = np.arange(old)
    overlap = np.minimum(edges[1:, None], pixels + 1) - np.maximum(edges[:-1, None], pixels)
    weights = np.clip(overlap, 0, None) / (old / side)
    means = np.einsum(
        "ia,jb,nabc->nijc", weights, weights, images.astype(np.float64), optimize=True
    )
    return np.round(means).astype(np.uint8)
