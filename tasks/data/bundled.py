"""All data sets that need no download, by name."""

import functools

import jax
import jax.numpy as jnp

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
def load_text(name: str) -> Text:
    """The text of that name, about a tenth of it each for validation and test.

    Raises:
      ValueError: if there is none.
    """
    if name not in TEXTS:
        raise ValueError(f"`dataset` must be one of {', '.join(sorted(TEXTS))}, got {name!r}.")
    found = by_document(TEXTS[name].read())
    # Concrete arrays even when the first call comes from inside a trace: the result is cached.
    with jax.ensure_compile_time_eval():
        return Text({split: jnp.asarray(symbols) for split, symbols in found.items()})
