"""Text as symbols, with splits by document."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tasks.arguments import check_name
from tasks.base import SPLITS, Split

VOCABULARY = 96  # Printable ASCII in order from the space, and one symbol for all the rest.


class TextSource(NamedTuple):
    """A text that needs no download.

    Attributes:
      read: ``() -> documents``.
      what: the text, in a few words.
      origin: where it comes from.
      licence: under which it may be used.
    """

    read: Callable[[], list[str]]
    what: str
    origin: str
    licence: str


class Text(NamedTuple):
    """One text or several, one after another, on the device.

    Attributes:
      symbols: split name -> int32 ``[N]`` below ``VOCABULARY``.
      sizes: split name -> symbols of each text.
    """

    symbols: dict[Split, jax.Array]
    sizes: dict[Split, tuple[int, ...]]

    def batch(
        self, which: jax.Array | int, key: jax.Array, split: Split, size: int, length: int
    ) -> jax.Array:
        """Windows of a text that start anywhere, with replacement: int32 ``[size, length]``."""
        start, number = self._place(which, split)
        first = start + jax.random.randint(key, (size,), 0, number - length + 1)
        return self.symbols[split][first[:, None] + jnp.arange(length)]

    def windows(self, which: jax.Array | int, split: Split, length: int, most: int) -> jax.Array:
        """At most ``most`` windows spread evenly over a split: int32 ``[n, length]``."""
        check_name(SPLITS, split=split)
        count = min(most, min(self.sizes[split]) // length)
        start, number = self._place(which, split)
        first = start + (number - length) // max(1, count - 1) * jnp.arange(count)
        return self.symbols[split][first[:, None] + jnp.arange(length)]

    def _place(self, which: jax.Array | int, split: Split) -> tuple[jax.Array, jax.Array]:
        check_name(SPLITS, split=split)
        sizes = np.array(self.sizes[split], np.int32)
        starts = np.cumsum(sizes, dtype=np.int32) - sizes
        return jnp.asarray(starts)[which], jnp.asarray(sizes)[which]


def encode(text: str) -> np.ndarray:
    """Characters as symbols, int32 ``[len(text)]``."""
    codes = np.frombuffer(text.encode("utf-32-le"), "<u4")
    known = (codes >= 32) & (codes < 127)
    return np.where(known, codes.astype(np.int32) - 32, VOCABULARY - 1).astype(np.int32)


def by_document(documents: Sequence[str]) -> dict[Split, np.ndarray]:
    """Symbols of each split: about a tenth each for validation and test, in whole documents.

    Which document is in which split is fixed by their order. A paragraph of training that occurs
    again in validation or test, or one of validation in test, is left out there.
    """
    order = np.random.default_rng(0).permutation(len(documents))
    ends = np.cumsum([len(documents[index]) for index in order]) / sum(map(len, documents))
    parts = {
        "validation": order[ends <= 0.1],
        "test": order[(ends > 0.1) & (ends <= 0.2)],
        "train": order[ends > 0.2],
    }
    seen: set[str] = set()
    found = {}
    for split in SPLITS:
        paragraphs = [p for index in parts[split] for p in documents[index].split("\n\n")]
        kept = paragraphs if split == "train" else [p for p in paragraphs if p not in seen]
        seen |= set(paragraphs)
        found[split] = encode("\n\n".join(kept))
    return found
