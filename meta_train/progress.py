"""One progress bar for everything that takes long, and remarks on what goes on; or neither."""

import re
import sys
from typing import Any

from tqdm import tqdm

# Between two lines of progress where nobody watches, seconds.
LOG_SECONDS = 30.0


# Where a bar below another one is drawn: for terminals.
_MOVES = re.compile(r"\x1b\[A")
_quiet = False


def be_quiet(quiet: bool = True) -> None:
    """Shows neither progress nor remarks from here on; warnings and errors are others' matter."""
    global _quiet
    _quiet = quiet


def remark(text: str) -> None:
    """A line on stderr on what goes on."""
    if not _quiet:
        print(text, file=sys.stderr, flush=True)


def progress(iterable: Any = None, **options: Any) -> tqdm:
    """``tqdm``; where stderr is no terminal, a line every 30 s instead of a bar.

    Args:
      iterable: what is gone through; or none, and ``total`` with calls of ``update``.
      options: those of ``tqdm``.
    """
    options |= {"disable": _quiet}
    if sys.stderr.isatty():
        return tqdm(iterable, **{"dynamic_ncols": True, "mininterval": 0.5} | options)
    options |= {
        "file": _Lines(),
        "mininterval": LOG_SECONDS,
        "maxinterval": LOG_SECONDS,
        "delay": LOG_SECONDS,  # What is over sooner says nothing.
        "dynamic_ncols": False,
        "bar_format": "{desc}: {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]",
    }
    return tqdm(iterable, **options)


class _Lines:
    """A file for ``tqdm`` that turns what it draws over and over into lines."""

    def write(self, text: str) -> None:
        line = _MOVES.sub("", text).strip()
        if line:
            sys.stderr.write(line + "\n")

    def flush(self) -> None:
        sys.stderr.flush()
