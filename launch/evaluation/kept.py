"""Results on disk, each found again only under the very settings that decided it."""

import hashlib
import os
import sys
import sysconfig
import threading
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax
import jax
import numpy as np
import optax

import learned_opt
from meta_train import strict_json

PARTS = "evaluation.parts"  # The folder in the working directory.

Arrays = dict[str, np.ndarray]


def kept(folder: Path, settings: dict[str, Any], compute: Callable[[], Arrays]) -> Arrays:
    """What ``folder`` keeps under these very settings; else ``compute()``, kept there.

    Each result is a file of its own, named by a digest of its settings, and appears whole or not
    at all; one that cannot be read is computed again, and a line on stderr says so.

    Args:
      settings: everything that decides the result, as JSON.
      compute: returns arrays of numbers or strings by name.
    """
    text = strict_json.dumps(settings, sort_keys=True)
    path = folder / f"{hashlib.sha256(text.encode()).hexdigest()[:40]}.npz"
    unreadable = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error)
    try:
        with np.load(path, allow_pickle=False) as found:
            if str(found["settings"]) == text:
                return {name: found[name] for name in found.files if name != "settings"}
        raise ValueError("it is of other settings than its name says")
    except FileNotFoundError:
        pass
    except unreadable as error:
        print(f"warning: {path} is damaged ({error}); it is computed again.", file=sys.stderr)
    arrays = compute()
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".{os.getpid()}.{threading.get_ident()}.tmp.npz"
    np.savez(temporary, settings=text, **arrays)  # type: ignore[arg-type]
    temporary.replace(path)
    return arrays


# What of this library decides results; reports and figures do not.
_OURS = ("learned_opt", "meta_train", "tasks")
_RUNNING = ("runs", "baselines", "optlist", "suite", "one_task", "aggregates", "__init__")


def source() -> str:
    """A digest of the code that decides results: this library's, and modules that are of neither
    it nor an installed package, as somebody's own tasks and optimizers are.
    """
    root = Path(__file__).parent.parent.parent
    ours = [path for name in _OURS for path in (root / name).rglob("*.py")]
    ours += [Path(__file__).with_name(f"{name}.py") for name in _RUNNING]
    installed = tuple({sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")})
    names = (*_OURS, "launch")
    found = {
        Path(file)
        for name, module in list(sys.modules.items())
        if name.partition(".")[0] not in names
        and str(file := getattr(module, "__file__", None) or "").endswith(".py")
        and not str(file).startswith((*installed, str(root / "launch")))
    }
    digest = hashlib.sha256()
    for path in [*sorted(ours), *sorted(found)]:
        digest.update(path.read_bytes() if path.is_file() else b"")
    return digest.hexdigest()[:16]


def software() -> dict[str, Any]:
    """What of the process decides results besides their own settings and data."""
    return {
        "source": source(),
        "jax": jax.__version__,
        "flax": flax.__version__,
        "optax": optax.__version__,
        "x64": jax.config.values["jax_enable_x64"],
        "matmul_precision": jax.config.values["jax_default_matmul_precision"],
        "device": jax.devices()[0].device_kind,
    }


def digest_of_optimizer(path: Path) -> str:
    """Of what decides a trained optimizer's steps: its weights, name and arguments."""
    config = learned_opt.load_config(path)
    decides = strict_json.dumps([config["name"], config["arguments"]], sort_keys=True)
    return hashlib.sha256((path / "theta.safetensors").read_bytes() + decides.encode()).hexdigest()


def whole(path: Path, write: Callable[[Any], Any], **options: Any) -> None:
    """A file of text that appears when ``write(file)`` is done; ``options`` are those of open."""
    temporary = path.with_name(f"{path.name}.tmp")
    with open(temporary, "w", **options) as file:
        write(file)
    temporary.replace(path)
