"""Files that only grow, every entry on disk at once, and that a checkpoint pins to the byte."""

import collections
import contextlib
import errno
import os
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

_BLOCK = 1 << 20


class Salvage(NamedTuple):
    """What can be kept of a file that no mark vouches for."""

    kept: bytes
    sound: bool  # nothing was lost but a torn end and what came after the resumed step


class Journal:
    """Appends to ``path``; what was written after ``mark`` is cut off first.

    If the file is not what the mark says (missing, shorter, changed), it is set aside as
    ``NAME.damaged``, one sentence on stderr says so, and what ``salvage`` finds in it goes on.

    Entries that cannot be written, as on a full disk, are kept in memory, and are tried again
    before the next one: the file never has half an entry, nor one without those before it.

    Attributes:
      problem: why entries are still in memory only; empty if all are in the file.

    Args:
      path: the file.
      mark: what ``mark()`` returned when the checkpoint was saved that the job continues from;
        None if there is none, or it is older than marks.
      salvage: the whole entries of a file's bytes, for where there is no mark, or it disagrees.
    """

    def __init__(self, path: Path, mark: dict[str, int] | None, salvage: Callable[..., Salvage]):
        size, self._crc = (mark["bytes"], mark["crc32"]) if mark else (0, 0)
        if mark and _crc_of(path, size) == self._crc:
            if size or path.exists():
                os.truncate(path, size)
        else:
            size, self._crc = self._salvage(path, mark, salvage)
        self._size = size
        self._waiting: collections.deque[bytes] = collections.deque()
        self.problem = ""
        # Unbuffered: an entry is in the hands of the system when `append` returns.
        self._file = self._open(path)

    @staticmethod
    def _open(path):
        return path.open("a+b", buffering=0)

    def _write_again(self, path: Path) -> None:
        """Somebody removed the file, or put another in its place: all of it is written anew."""
        os.lseek(self._file.fileno(), 0, os.SEEK_SET)
        temporary = path.with_name(path.name + ".tmp")
        with open(temporary, "wb") as file:
            while block := self._file.read(_BLOCK):
                file.write(block)
        if path.exists():
            path.rename(unused(path.with_name(path.name + ".damaged")))
        os.replace(temporary, path)
        self._file.close()
        self._file = self._open(path)
        print(f"warning: {path} was removed or replaced; it is written again.", file=sys.stderr)

    @staticmethod
    def _salvage(path, mark, salvage) -> tuple[int, int]:
        found = path.read_bytes() if path.exists() else None
        kept, sound = salvage(found or b"")
        if mark or not sound:
            aside = "it is missing"
            if found is not None:
                where = unused(path.with_name(path.name + ".damaged"))
                path.rename(where)
                aside = f"it is kept as {where.name}, with its whole entries in a new file"
            print(f"warning: {path} is damaged; {aside}.", file=sys.stderr)
        temporary = path.with_name(path.name + ".tmp")
        temporary.write_bytes(kept)
        os.replace(temporary, path)
        return len(kept), zlib.crc32(kept)

    def append(self, entry: bytes) -> None:
        """Writes one entry, in one system call."""
        self._waiting.append(entry)
        self.flush()

    def flush(self) -> str:
        """Writes what could not be written before; returns ``problem``."""
        self.problem = ""
        path = Path(self._file.name)
        try:
            if not path.exists() or not os.path.samestat(
                path.stat(), os.fstat(self._file.fileno())
            ):
                self._write_again(path)
        except OSError as error:
            self.problem = f"{path}: {error.strerror}"
        while self._waiting and not self.problem:
            entry = self._waiting[0]
            try:
                if self._file.write(entry) < len(entry):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError as error:
                self.problem = f"{self._file.name}: {error.strerror}"
                with contextlib.suppress(OSError):
                    self._file.truncate(self._size)
            else:
                self._waiting.popleft()
                self._size += len(entry)
                self._crc = zlib.crc32(entry, self._crc)
        return self.problem

    def mark(self) -> dict[str, int]:
        """What is in the file, for a checkpoint: its ``bytes`` and their ``crc32``."""
        return {"bytes": self._size, "crc32": self._crc}

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def unused(path: Path) -> Path:
    """``path``, or the first of ``path.2``, ``path.3``, ... that is not there."""
    number, free = 1, path
    while os.path.lexists(free):
        number += 1
        free = path.with_name(f"{path.name}.{number}")
    return free


def _crc_of(path: Path, size: int) -> int | None:
    """Of the first ``size`` bytes; None if there are fewer."""
    crc = 0
    if not size:
        return crc
    try:
        with path.open("rb") as file:
            while size and (block := file.read(min(size, _BLOCK))):
                crc, size = zlib.crc32(block, crc), size - len(block)
    except FileNotFoundError:
        return None
    return None if size else crc
