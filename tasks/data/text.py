"""Real text that is always there: the source of the Python standard library."""

import sysconfig
from pathlib import Path

import numpy as np

VOCABULARY = 96  # Printable ASCII in order from the space, and one symbol for all the rest.


def standard_library_source(num_characters: int, start: int = 0) -> np.ndarray:
    """Characters of the standard library's top-level modules, in alphabetical order.

    Returns:
      Symbols, int32 ``[num_characters]`` below ``VOCABULARY``. The text depends on the Python
      version.

    Raises:
      ValueError: if there are not so many characters.
    """
    text = ""
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        text += path.read_text(encoding="utf-8", errors="replace")
        if len(text) >= start + num_characters:
            codes = np.frombuffer(text[start : start + num_characters].encode("utf-32-le"), "<u4")
            known = (codes >= 32) & (codes < 127)
            return np.where(known, codes.astype(np.int32) - 32, VOCABULARY - 1).astype(np.int32)
    raise ValueError(
        f"`num_characters` + `start` must be at most {len(text)}, the size of the standard "
        f"library here, got num_characters={num_characters}, start={start}."
    )
