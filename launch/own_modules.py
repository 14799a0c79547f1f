"""Modules of somebody's own, imported by name: one sentence for whatever goes wrong in them."""

import contextlib
import importlib
from collections.abc import Iterator
from types import ModuleType


class UnknownModuleError(ValueError):
    """There is no module of that name."""


def imported(name: str) -> ModuleType:
    """The module of that name, as Python imports it.

    Raises:
      ValueError: that goes on a sentence which begins with the flag's name, if it raises, or (an
        ``UnknownModuleError``) there is none, or the name is not a module's.
    """
    if name.endswith(".py") and name.removesuffix(".py").isidentifier():
        raise UnknownModuleError(
            f"names the module {name!r}, which must be as Python imports it: "
            f"{name.removesuffix('.py')}, without .py."
        )
    if not all(part.isidentifier() for part in name.split(".")):
        raise UnknownModuleError(
            f"names the module {name!r}, which must be as Python imports it, mypkg.mymod, and not "
            "the path of a file."
        )
    with faults_of(f"names the module {name!r}, which cannot be imported"):
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{name}.".startswith(f"{error.name}."):
                raise  # Something that the module itself imports.
        raise UnknownModuleError(
            f"names the module {name!r}, which cannot be found; it must be a file or package in "
            "the current folder or on PYTHONPATH."
        )


@contextlib.contextmanager
def faults_of(what: str) -> Iterator[None]:
    """Turns what code of somebody's own raises, an exit too, into a ``ValueError``.

    It says ``what`` and the exception, which is its cause; a ``ValueError`` of a sentence is passed
    on.
    """
    try:
        yield
    except ValueError as error:
        if not isinstance(error, UnicodeError):
            raise
        raise ValueError(_sentence(what, error)) from error
    except (Exception, SystemExit) as error:
        raise ValueError(_sentence(what, error)) from error


def _sentence(what: str, error: BaseException) -> str:
    words = " ".join(str(error).split())[:300]
    return f"{what}: {type(error).__name__}{f': {words}' if words else ''}."
