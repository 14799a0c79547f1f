"""Python source that is always there: that of the standard library.

It is another text in each version of Python.
"""

import sysconfig
from pathlib import Path

import numpy as np

from tasks.data.symbols import VOCABULARY, TextSource, encode

__all__ = ["TEXTS", "VOCABULARY", "read", "standard_library_source"]


def _modules() -> list[Path]:
    """The top-level modules, in alphabetical order."""
    return sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))


def read() -> list[str]:
    """The source of the top-level modules, in alphabetical order."""
    return [path.read_text(encoding="utf-8", errors="replace") for path in _modules()]


def standard_library_source(num_characters: int, start: int = 0) -> np.ndarray:
    """Characters of the standard library's top-level modules, in alphabetical order.

    Returns:
      Symbols, int32 ``[num_characters]`` below ``VOCABULARY``. The text depends on the Python
      version.

    Raises:
      ValueError: if there are not so many characters.
    """
    text = ""
    for path in _modules():
        text += path.read_text(encoding="utf-8", errors="replace")
        if len(text) >= start + num_characters:
            return encode(text[start : start + num_characters])
    raise ValueError(
        f"`num_characters` + `start` must be at most {len(text)}, the size of the standard "
        f"library here, got num_characters={num_characters}, start={start}."
    )


TEXTS = {
    "source": TextSource(read, "Python source, characters", "Python's standard library", "PSF")
}
