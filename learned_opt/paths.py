"""Paths that a user gives: one function reads them, another asks whether they can be written."""

import os
import tempfile
import unicodedata
from pathlib import Path


def user_path(argument_name: str, path: str | os.PathLike) -> Path:
    """The path a user gave, with ``~`` expanded; nothing is looked up or made.

    Args:
      argument_name: for messages: ``"path"``, or a flag as it is typed (``"--workdir"``).
      path: what was given.

    Raises:
      ValueError: if it is no path, is empty, cannot be printed, or names the home of an unknown
        user.
    """
    given = path if isinstance(path, bytes) or not isinstance(path, os.PathLike) else str(path)
    if not isinstance(given, str) or not given.strip() or "\0" in given:
        raise ValueError(f"{_quoted(argument_name)} must be the name of a path, got {path!r}.")
    # Line breaks and the like, and bytes that are no UTF-8: no table or JSON could hold them.
    if any(unicodedata.category(x) in ("Cc", "Cs") for x in given):
        raise ValueError(
            f"{_quoted(argument_name)} must be of characters that can be printed, got {given!r}; "
            "rename the folder."
        )
    try:
        return Path(given).expanduser()
    except RuntimeError:
        raise ValueError(
            f"{_quoted(argument_name)} must begin with the home of a user there is, got {given!r}; "
            "give the folder in full."
        ) from None


def writable_folder(argument_name: str, path: str | os.PathLike) -> Path:
    """The folder a user gave, made or not, after a look whether files can be written to it.

    Nothing is left behind: the test is a nameless file in the folder, or in the nearest one above
    it that exists. (Permissions alone say too little: the superuser has all of them, also on a
    read-only disk.)

    Args:
      argument_name, path: as for ``user_path``.

    Raises:
      ValueError: as ``user_path``, and if the path or one above it is a file, is not writable or
        cannot be read.
    """
    folder = user_path(argument_name, path)
    if problem := _unwritable(folder):
        raise ValueError(
            f"{_quoted(argument_name)} must be a folder that can be written, got {str(path)!r}: "
            f"{problem}; give another folder."
        )
    return folder


def writable_file(argument_name: str, path: str | os.PathLike) -> Path:
    """The same for a file, in a folder that is there or not.

    Raises:
      ValueError: as ``user_path``, and if the path is a folder, or its folder is none that can be
        written.
    """
    file = user_path(argument_name, path)
    problem = "it is a folder" if file.is_dir() else _unwritable(file.parent)
    if problem:
        raise ValueError(
            f"{_quoted(argument_name)} must be a file that can be written, got {str(path)!r}: "
            f"{problem}; give another file."
        )
    return file


def _unwritable(folder: Path) -> str:
    """Why nothing can be written to a folder, made or not; empty if something can."""
    above = folder.absolute()
    try:
        while not _is_there(above):
            above = above.parent
        with tempfile.TemporaryFile(dir=above):
            return ""
    except OSError as error:
        return f"nothing can be made in {str(above)!r} ({error.strerror or error})"


def _is_there(path: Path) -> bool:
    try:
        os.lstat(path)
    except FileNotFoundError:
        return False
    return True


def _quoted(argument_name: str) -> str:
    return argument_name if argument_name.startswith("-") else f"`{argument_name}`"
