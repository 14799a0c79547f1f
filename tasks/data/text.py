"""Python source that is always there: that of the standard library.

It is another text in each version of Python.
"""

import functools
import sysconfig
from collections.abc import Callable
from pathlib import Path

import numpy as np

from tasks.data.symbols import VOCABULARY, TextSource, encode

__all__ = ["TEXTS", "VOCABULARY", "read", "standard_library_source"]


# Of the folders of the standard library, those that are always installed and whose files are prose
# and code, not tables and tests.
PACKAGES = (
    "asyncio",
    "collections",
    "concurrent",
    "email",
    "html",
    "http",
    "importlib",
    "json",
    "logging",
    "multiprocessing",
    "unittest",
    "urllib",
    "wsgiref",
    "xml",
    "xmlrpc",
)


def _modules() -> list[Path]:
    """The top-level modules, in alphabetical order."""
    return sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))


def _in_packages() -> list[Path]:
    """The modules of ``PACKAGES``, in alphabetical order; none of them is a top-level one."""
    library = Path(sysconfig.get_path("stdlib"))
    return sorted(path for package in PACKAGES for path in (library / package).rglob("*.py"))


def read(paths: Callable[[], list[Path]]) -> list[str]:
    """The source of modules, in their order."""
    return [path.read_text(encoding="utf-8", errors="replace") for path in paths()]


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
    name: TextSource(
        functools.partial(read, paths), what, "Python's standard library, as installed", "PSF"
    )
    for name, paths, what in (
        ("source", _modules, "Python source, characters"),
        ("packages", _in_packages, "Python source of packages, characters"),
    )
}
