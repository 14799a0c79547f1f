"""Where a result came from: what it takes to run the job again."""

import importlib.metadata
import subprocess
import sys
from pathlib import Path
from typing import Any

from launch.choices import to_dict
from launch.config import Config
from learned_opt.version import __version__

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "orbax-checkpoint")


def provenance(config: Config) -> dict[str, Any]:
    """The command, the whole configuration, the commit and the versions of the packages, as JSON.

    The commit is that of the checkout the library runs from, with ``-dirty`` if files in it were
    changed; None for an installed package.
    """
    return {
        "command": _command(),
        "config": to_dict(config),
        "commit": commit(),
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """Of Python, this library and the packages that numbers come from."""
    return {
        "python": sys.version.split()[0],
        "learned-opt": __version__,
        **{name: importlib.metadata.version(name) for name in _PACKAGES},
    }


def _command() -> list[str]:
    """The words that started this process, as they would be typed again."""
    started = Path(sys.argv[0])
    # `python -m launch.train` has put the module's file there.
    if started.suffix == ".py" and started.resolve().parent == Path(__file__).resolve().parent:
        return ["python", "-m", f"launch.{started.stem}", *sys.argv[1:]]
    return [started.name, *sys.argv[1:]]


def commit() -> str | None:
    """Of the checkout the library runs from; None for an installed package."""
    root = Path(__file__).parent.parent
    if not (root / ".git").exists():
        return None
    describe = ["describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *describe],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
