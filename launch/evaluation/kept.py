"""Results on disk, each found again only under the very settings that decided it."""

import contextlib
import hashlib
import io
import os
import sys
import sysconfig
import threading
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import learned_opt
from launch.choices import modules_outside
from launch.held_arrays import digest_of_arrays
from learned_opt.base import LearnedOptimizer
from meta_train import strict_json
from tasks import SPLITS, Split, Task

PARTS = "evaluation.parts"  # The folder in the working directory.

Arrays = dict[str, np.ndarray]

# NumPy reads the head of an array as a literal, whose depth Python below 3.11.8 and 3.12.2 counts
# over all threads (cpython#106905): two at once, and garbage collected in between, are a
# SystemError.
_reading = threading.Lock()


def kept(folder: Path, settings: dict[str, Any], compute: Callable[[], Arrays]) -> Arrays:
    """What ``folder`` keeps under these very settings; else ``compute()``, kept there.

    Each result is a file of its own, named by a digest of its settings, and appears whole or not
    at all; one that is damaged is computed again, and a line on stderr says so.

    Args:
      settings: everything that decides the result, as JSON.
      compute: returns arrays of numbers or strings by name.
    """
    text = strict_json.dumps(settings, sort_keys=True)
    path = folder / f"{hashlib.sha256(text.encode()).hexdigest()[:40]}.part"
    if path.is_dir():
        raise ValueError(f"{path} is a folder, where a result is to be kept; move it away.")
    try:
        written = path.read_bytes()
    except FileNotFoundError:
        written = None
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}); move it away.") from None
    if written is not None:
        # NumPy's own checks let some damage pass.
        digest, content = written[:_DIGEST], written[_DIGEST:]
        if hashlib.sha256(content).digest() == digest:
            # Whoever can make a digest can write what is no archive, or another one; what is raised
            # then is of many kinds: zip's, the decoders', NumPy's.
            with (
                _reading,
                contextlib.suppress(Exception),
                np.load(io.BytesIO(content), allow_pickle=False) as found,
            ):
                if str(found["settings"]) == text:
                    return {name: found[name] for name in found.files if name != "settings"}
        print(f"warning: {path} is damaged; it is computed again.", file=sys.stderr)
    arrays = compute()
    folder.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    np.savez(buffer, settings=text, **arrays)  # type: ignore[arg-type]
    content = buffer.getvalue()
    with replacing(path) as temporary:
        temporary.write_bytes(hashlib.sha256(content).digest() + content)
    return arrays


_DIGEST = hashlib.sha256().digest_size


# What of this library decides results; reports and figures do not.
_OURS = ("learned_opt", "meta_train", "tasks")
_RUNNING = (
    "runs",
    "baselines",
    "optlist",
    "sweep",
    "suite",
    "one_task",
    "aggregates",
    "__init__",
)


def source() -> str:
    """A digest of this library's code that decides results."""
    root = Path(__file__).parent.parent.parent
    ours = [path for name in _OURS for path in (root / name).rglob("*.py")]
    ours += [Path(__file__).with_name(f"{name}.py") for name in _RUNNING]
    digest = hashlib.sha256()
    for path in sorted(ours):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def software() -> dict[str, Any]:
    """What of the process decides results besides their own settings and data."""
    return {
        "source": source(),
        **{name: version(name) for name in ("jax", "jaxlib", "flax", "optax", "numpy")},
        **{name: jax.config.values[f"jax_{name}"] for name in _SETTINGS},
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "device": jax.devices()[0].device_kind,
    }


# Of JAX, those that change draws or numbers.
_SETTINGS = (
    "enable_x64",
    "default_matmul_precision",
    "default_prng_impl",
    "threefry_partitionable",
    "random_seed_offset",
)


def decided_by_task(
    facts: dict[str, Any], task: Task, splits: Sequence[Split] = SPLITS
) -> dict[str, Any]:
    """What of a task decides results, as JSON: what it is, its data, and of one from outside this
    package all that it computes.

    Args:
      facts: what the task is, from ``choices.to_dict``.
      splits: those that are scored.
    """
    found = {"task": facts, "data": digest_of_arrays(task)}
    return found | ({"program": digest_of_task(task, splits)} if modules_outside(facts) else {})


def digest_of_task(task: Task, splits: Sequence[Split] = SPLITS) -> str:
    """Of all that a task's functions compute, with every number in it, wherever that came from: a
    file, the environment, a variable of its module.

    Args:
      splits: those that are scored.
    """

    def everything(key):
        instance = task.sample(key)
        params, batch = task.init(instance, key), task.batch(instance, key, "train")
        found: list[Any] = [jax.value_and_grad(task.loss)(params, instance, batch, key)]
        if task.score:
            found += [task.score(params, instance, split) for split in splits]
        return [*found, task.constant_loss(instance) if task.constant_loss else None]

    return _digest_of_program(everything, jax.random.key(0))


def digest_of_steps(task: Task, optimizer: LearnedOptimizer, theta: Any, num_steps: int) -> str:
    """The same of an optimizer's first step on a task, and of theta."""

    def step(theta, key):
        params = task.init(task.sample(key), key)
        transform = optax.with_extra_args_support(optimizer.bind(theta, num_steps))
        return transform.update(params, transform.init(params), params, value=jnp.float32(1))

    return _digest_of_program(step, theta, jax.random.key(0))


def _digest_of_program(function: Callable[..., Any], *arguments: Any) -> str:
    text = jax.jit(function).lower(*arguments).as_text()
    found = hashlib.sha256(text.encode())
    found.update(digest_of_arrays(jax.tree.leaves(arguments)).encode())
    if "callback" in text:  # What it computes is not in the program.
        found.update(_source_of_others())
    return found.hexdigest()[:16]


def _source_of_others() -> bytes:
    """A digest of the modules that are of neither this library nor an installed package."""
    root = Path(__file__).parent.parent.parent
    installed = [Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib", "platlib")]
    known = [*installed, *(root / name for name in (*_OURS, "launch"))]
    digest = hashlib.sha256()
    for module in list(sys.modules.values()):
        path = Path(getattr(module, "__file__", None) or "")
        elsewhere = not any(path.is_relative_to(folder) for folder in known)
        if path.suffix == ".py" and elsewhere:
            digest.update(path.read_bytes() if path.is_file() else b"")
    return digest.digest()


def digest_of_optimizer(path: Path) -> str:
    """Of what decides a trained optimizer's steps: its weights, name and arguments."""
    config = learned_opt.load_config(path)
    decides = strict_json.dumps([config["name"], config["arguments"]], sort_keys=True)
    return hashlib.sha256((path / "theta.safetensors").read_bytes() + decides.encode()).hexdigest()


def whole(path: Path, write: Callable[[Any], Any], **options: Any) -> None:
    """A file of text that appears when ``write(file)`` is done; ``options`` are those of open."""
    with replacing(path) as temporary, open(temporary, "w", **options) as file:
        write(file)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file to write, which then takes the place of ``path``: nobody reads a half-written one, and
    several may write at once.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
