"""Compiled programs, kept on disk: a job that continues, or shares a task, starts at once."""

import hashlib
import os
import platform
from pathlib import Path

import jax

from learned_opt.paths import writable_folder

# Bytes; beyond it what was used longest ago is deleted.
MAX_SIZE = 2 * 1024**3


def keep_compiled_programs() -> None:
    """Has JAX keep what takes a second or more to compile in ``~/.cache/learned-opt``.

    A mixture of tasks compiles a program a task, each kept on its own. No effect where JAX's own
    settings say where to keep them (``JAX_COMPILATION_CACHE_DIR``), or not to
    (``JAX_ENABLE_COMPILATION_CACHE=0``), nor where the folder cannot be written.
    """
    if jax.config.values["jax_compilation_cache_dir"] is not None:
        return
    try:
        folder = writable_folder("XDG_CACHE_HOME", _cache_home() / "learned-opt")
    except ValueError:
        return
    jax.config.update("jax_compilation_cache_dir", str(folder / f"xla-{_processor()}"))
    jax.config.update("jax_compilation_cache_max_size", MAX_SIZE)


def _cache_home() -> Path:
    """As the XDG base directory specification has it."""
    given = os.environ.get("XDG_CACHE_HOME", "")
    return Path(given if os.path.isabs(given) else "~/.cache")


def _processor() -> str:
    """What distinguishes processors: machines of several kinds may share a home folder.

    JAX's key does not have it, and XLA runs code of another processor until it crashes.
    """
    kinds = [platform.machine(), platform.processor()]
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        named = ("model name", "flags", "Features")
        kinds += [line for line in dict.fromkeys(lines) if line.startswith(named)]
    except OSError:
        pass  # No Linux.
    return hashlib.sha256("\n".join(kinds).encode()).hexdigest()[:12]
