"""Labelled examples of one data set, or of several of equal shape, one of which an instance has."""

from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from tasks.arguments import check_name, check_names
from tasks.base import SPLITS, Split
from tasks.data.bundled import TABLES
from tasks.data.images import ImageData, load_images


class Pool(NamedTuple):
    """Data sets one after another, on the device.

    Attributes:
      inputs: split name -> uint8 or float32 ``[N, ...]``; uint8 stands for 0..1.
      targets: split name -> int32 or float32 ``[N]``.
      sizes: split name -> how many examples each data set has.
      num_classes: number of labels, of the data set with most; 0: targets are numbers.
    """

    inputs: dict[Split, jax.Array]
    targets: dict[Split, jax.Array]
    sizes: dict[Split, tuple[int, ...]]
    num_classes: int

    def batch(
        self, which: jax.Array | int, key: jax.Array, split: Split, size: int
    ) -> tuple[jax.Array, jax.Array]:
        """``size`` examples of a data set, drawn with replacement: float32 inputs, targets."""
        start, number = self._place(which, split)
        # One draw of bits where `randint` takes three; the modulo's bias is below 1e-4.
        index = start + jax.random.bits(key, (size,), jnp.uint32) % number
        return as_float(self.inputs[split][index]), self.targets[split][index]

    def whole(
        self, which: jax.Array | int, split: Split
    ) -> tuple[jax.Array, jax.Array, jax.Array | None]:
        """All examples of a data set, and the weight of each in a mean; None: all alike.

        Where data sets differ in size, the smaller are filled up with examples of weight 0.
        """
        check_name(SPLITS, split=split)
        sizes = self.sizes[split]
        if len(sizes) == 1:
            return as_float(self.inputs[split]), self.targets[split], None
        start, number = self._place(which, split)
        rows = jnp.arange(max(sizes), dtype=jnp.uint32)
        index = start + rows % number
        weights = (rows < number) / number
        return as_float(self.inputs[split][index]), self.targets[split][index], weights

    def _place(self, which: jax.Array | int, split: Split) -> tuple[jax.Array, jax.Array]:
        check_name(SPLITS, split=split)
        sizes = np.array(self.sizes[split], np.uint32)
        starts = np.cumsum(sizes, dtype=np.uint32) - sizes
        return jnp.asarray(starts)[which], jnp.asarray(sizes)[which]

    def of_each(self, split: Split) -> list[tuple[np.ndarray, np.ndarray]]:
        """Inputs, as they are stored, and targets of each data set, on the host."""
        ends = np.cumsum(self.sizes[split])[:-1]
        parts = (np.split(np.asarray(x[split]), ends) for x in (self.inputs, self.targets))
        return list(zip(*parts, strict=True))


Array = TypeVar("Array", jax.Array, np.ndarray)


def as_float(inputs: Array) -> Array:
    """uint8 as float32 in 0..1; floats as they are."""
    return inputs.astype(np.float32) / 255 if inputs.dtype == np.uint8 else inputs


def load_pool(dataset: str | ImageData, data_dir: str | None = None) -> Pool:
    """The data sets named, with commas between, as one pool.

    Args:
      dataset: names of ``tasks.data.load_images`` or of ``tasks.data.bundled.TABLES``; or images.
      data_dir: TFDS data folder.

    Raises:
      ValueError: on a name that is not known or occurs twice, or data sets that differ in shape.
    """
    if isinstance(dataset, ImageData):
        return _joined([dataset], ["the images given"])
    check_names(None, dataset=dataset)
    names = dataset.split(",")
    return _joined([_load(name, data_dir) for name in names], names)


def _load(name: str, data_dir: str | None) -> ImageData:
    if name not in TABLES:
        return load_images(name, data_dir)
    raw, num_classes = TABLES[name].read()
    with jax.ensure_compile_time_eval():
        inputs, targets = ({split: jnp.asarray(raw[split][i]) for split in SPLITS} for i in (0, 1))
    return ImageData(inputs, targets, num_classes)


def _joined(found: Sequence[ImageData], names: Sequence[str]) -> Pool:
    shapes = [data.images["train"].shape[1:] for data in found]
    numbers = [data.num_classes == 0 for data in found]
    if len(set(shapes)) > 1 or len(set(numbers)) > 1:
        described = ", ".join(
            f"{name} ({'x'.join(map(str, shape))}, {data.num_classes or 'no'} classes)"
            for name, shape, data in zip(names, shapes, found, strict=True)
        )
        raise ValueError(
            f"`dataset` must name data sets of one shape, got {described}; for several shapes at "
            "once use tasks.TaskMixture."
        )
    sizes: dict[Split, tuple[int, ...]] = {
        split: tuple(len(data.labels[split]) for data in found) for split in SPLITS
    }
    classes = max(data.num_classes for data in found)
    if len(found) == 1:
        return Pool(found[0].images, found[0].labels, sizes, classes)
    with jax.ensure_compile_time_eval():
        inputs, targets = (
            {split: jnp.concatenate([part(data)[split] for data in found]) for split in SPLITS}
            for part in (lambda data: data.images, lambda data: data.labels)
        )
    return Pool(inputs, targets, sizes, classes)
