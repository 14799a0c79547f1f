"""What a file may name to be called: things of the right kind, and nothing that is there besides.

A saved configuration or optimizer may name ``MODULE:NAME`` of an imported module. Modules such as
``os`` always are, so a name alone must not be enough for a call.
"""

import inspect
import sys
import sysconfig
import typing
from pathlib import Path
from typing import Any


def check_named(name: str, thing: Any, kinds: tuple[type, ...]) -> None:
    """Lets pass a class of these kinds, and a function that makes one of them.

    A function must say so (``-> LearnedOptimizer``), or, if it says nothing, be the user's own:
    defined in the module that is named, which is neither Python's nor of an installed package.

    Args:
      name: ``MODULE:NAME``, for messages.
      thing: what it is.
      kinds: what it must be, or make.

    Raises:
      ValueError: if it is anything else; it was not called.
    """
    if isinstance(thing, type):
        right = issubclass(thing, kinds)
    elif not inspect.isfunction(thing):
        right = False
    else:
        made = _returned(thing)
        right = isinstance(made, type) and issubclass(made, kinds)
        if made is inspect.Signature.empty:
            module = name.partition(":")[0]
            right = thing.__module__ == module and not _installed(module)
    if not right:
        words = " or ".join(kind.__name__ for kind in kinds)
        raise ValueError(
            f"is {name!r}, which a file may not name: it must be a class derived from "
            f"{kinds[-1].__name__}, or a function that says it returns one (`-> {words}`)."
        )


def _returned(function: Any) -> Any:
    try:
        return typing.get_type_hints(function).get("return", inspect.Signature.empty)
    except Exception:  # Words that mean nothing where it was defined.
        return None


def _installed(module: str) -> bool:
    """Whether it is Python's, or of a package that was installed, or not in a file at all."""
    if module == "__main__":
        return False  # A script or a notebook.
    file = getattr(sys.modules.get(module), "__file__", None)
    if not file:
        return True
    folders = {Path(sysconfig.get_path(key)).resolve() for key in ("stdlib", "purelib", "platlib")}
    return any(folder in Path(file).resolve().parents for folder in folders)
