"""All data sets that need no download, by name."""

import functools

import jax
import jax.numpy as jnp

from tasks.base import SPLITS
from tasks.data import faces, mnist5k, photographs, prose, tables, text, textures
from tasks.data.splits import Source
from tasks.data.symbols import Text, TextSource, by_document

IMAGES: dict[str, Source] = {
    **mnist5k.DATASETS,
    **photographs.DATASETS,
    **textures.DATASETS,
    **faces.DATASETS,
}
TABLES: dict[str, Source] = tables.DATASETS
TEXTS: dict[str, TextSource] = {**prose.TEXTS, **text.TEXTS}


@functools.cache
def load_texts(names: tuple[str, ...]) -> Text:
    """The texts of those names, about a tenth of each for validation and for test.

    Raises:
      ValueError: on a name that is not known, or occurs twice.
    """
    if not set(names) <= set(TEXTS) or len(set(names)) < len(names):
        raise ValueError(
            f"`dataset` must be one of {', '.join(sorted(TEXTS))}, or several different ones with "
            f"commas between, got {','.join(names)!r}."
        )
    found = [by_document(TEXTS[name].read()) for name in names]
    # Concrete arrays even when the first call comes from inside a trace: the result is cached.
    with jax.ensure_compile_time_eval():
        return Text(
            {s: jnp.concatenate([jnp.asarray(text[s]) for text in found]) for s in SPLITS},
            {s: tuple(len(text[s]) for text in found) for s in SPLITS},
        )
