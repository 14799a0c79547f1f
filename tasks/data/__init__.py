"""Data sets; images through TFDS, without TensorFlow."""

from tasks.data.images import ImageData, load_images

__all__ = ["ImageData", "load_images"]
