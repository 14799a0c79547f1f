"""Checkpoints of whole jobs with Orbax: asynchronous, atomic, checked, the newest few kept."""

import contextlib
import errno
import hashlib
import json
import logging
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from meta_train import processes

# Digests of a checkpoint's files, as `sha256sum --check` reads them.
DIGESTS = "SHA256SUMS"
# Entry of the record that tells a checkpoint which lost them from one that never had any.
_DIGESTED = "digests"


class UnreadableError(ValueError):
    """A checkpoint that cannot be read; says why in a few words."""


class Checkpoints:
    """The checkpoints of one job, in ``workdir/checkpoints``.

    A checkpoint holds the device-free train state and a JSON record of the job (resolved
    config, W&B run id and more). It appears in one rename when it is complete, so a job killed
    at any moment leaves only whole checkpoints behind. ``SHA256SUMS`` in it tells damage done
    later to any other of its files; the record says that there is one, and where an older
    version's does not, the checkpoint is believed.

    Attributes:
      problem: why the save that was last waited for is not on disk; empty if it is. Earlier
        checkpoints are as they were, and the next save begins anew.

    Args:
      workdir: the job's folder.
      keep: how many of the newest to keep.
      read_only: only look: change nothing, not even what a killed job left half-written,
        which may be what a living one is writing.
    """

    def __init__(self, workdir: Path, keep: int = 3, read_only: bool = False):
        self._folder = (workdir / "checkpoints").absolute()
        # Of several processes only the first is here; Orbax must not wait for the others.
        alone: dict[str, Any] = {"create": not read_only}
        if processes.several():
            only = ocp.options.MultiprocessingOptions(primary_host=0, active_processes={0})
            alone = {"create": False, "multiprocessing_options": only}
            if not read_only:
                self._folder.mkdir(parents=True, exist_ok=True)
        if read_only:
            options = ocp.CheckpointManagerOptions(**alone, save_root_metadata=False)
        else:
            options = ocp.CheckpointManagerOptions(
                **alone,
                max_to_keep=keep,
                enable_async_checkpointing=True,
                cleanup_tmp_directories=True,
                temporary_path_class=_Digested,
            )
        self._options = options
        self._manager = self._new_manager()
        self._started: int | None = None  # The save whose outcome is not known yet.
        self.problem = ""

    def _new_manager(self) -> Any:
        _say_nothing_in_threads()
        with _unlogged():
            return ocp.CheckpointManager(
                self._folder, options=self._options, item_names=("state", "job")
            )

    @property
    def latest_step(self) -> int | None:
        """The newest complete checkpoint's outer step, or None."""
        return self._manager.latest_step()

    @property
    def steps(self) -> list[int]:
        """Outer steps of all complete checkpoints."""
        return sorted(self._manager.all_steps())

    def folder(self, step: int) -> Path:
        """Where the files of a checkpoint are."""
        return self._folder / str(step)

    def save(self, step: int, host_state: Any, job: dict[str, Any]) -> None:
        """Starts writing; returns at once. ``host_state`` must not change afterwards.

        A disk that is full, or otherwise fails, raises nothing: see ``problem``.
        """
        self.wait()
        if step in self._manager.all_steps():
            return
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(_filled(host_state)),
            job=ocp.args.JsonSave(job | {_DIGESTED: DIGESTS}),
        )
        self._started = step
        with _unlogged():
            try:
                self._manager.save(step, args=args, force=True)
            except Exception as error:
                self._failed(error)

    def job(self, step: int) -> dict[str, Any]:
        """The JSON record saved with a step.

        Raises:
          UnreadableError: if the checkpoint is damaged.
        """
        self._check(step)
        args = ocp.args.Composite(job=ocp.args.JsonRestore())
        return self._restore(step, args).job

    def restore(self, step: int, like: Any) -> Any:
        """The host state saved at ``step``; ``like`` gives its structure and shapes.

        Raises:
          UnreadableError: if the checkpoint is damaged, or of another structure; before the arrays
            are read, if their shapes or dtypes are others.
        """
        self._check(step)
        filled = _filled(like)
        self._check_shapes(step, filled)
        args = ocp.args.Composite(state=ocp.args.StandardRestore(filled))
        found = self._restore(step, args).state
        return jax.tree.map(lambda x, y: x if y.size else np.zeros(y.shape, y.dtype), found, like)

    def wait(self) -> str:
        """Waits until everything is on disk; returns ``problem``."""
        if self._started is None:
            return self.problem
        with _unlogged():
            try:
                self._manager.wait_until_finished()
            except Exception as error:
                self._failed(error)
        if self._started is not None and not self.folder(self._started).is_dir():
            self._failed(FileNotFoundError(f"it is not in {self._folder}"))
        if self._started is not None:
            self._started, self.problem = None, ""
        return self.problem

    def close(self) -> str:
        """Waits until everything is on disk; returns ``problem``."""
        self.wait()
        with _unlogged(), contextlib.suppress(Exception):
            self._manager.close()
        return self.problem

    def _failed(self, error: Exception) -> None:
        """What was started is not on disk: begins anew with what is.

        Orbax remembers a step whose background write failed as if it were there.
        """
        self._started, self.problem = None, _reason(error)
        with _unlogged(), contextlib.suppress(Exception):
            self._manager.close()
        # Removes what is half-written too, which may be what the disk is full of.
        self._manager = self._new_manager()

    def _restore(self, step: int, args: Any) -> Any:
        try:
            return self._manager.restore(step, args=args)
        except Exception as error:  # Of many kinds, from Orbax, TensorStore and JSON.
            raise UnreadableError(
                f"checkpoint {step} cannot be read ({type(error).__name__}: {_reason(error)})"
            ) from error

    def _check(self, step: int) -> None:
        """Raises ``UnreadableError`` naming a file that is not as it was written."""
        self.wait()  # It may be the one that is being written.
        if not self.folder(step).is_dir():
            raise UnreadableError(f"checkpoint {step} is not there: {self.folder(step)} is missing")
        problem = _problem(self.folder(step))
        if problem:
            raise UnreadableError(f"checkpoint {step} is damaged: {problem}")

    def _check_shapes(self, step: int, like: Any) -> None:
        """Raises ``UnreadableError`` naming an array of another shape or dtype.

        Orbax would cut what is larger and fill up what is smaller.
        """
        try:
            with _unlogged(), ocp.StandardCheckpointer() as reader:
                found = reader.metadata(self.folder(step) / "state").item_metadata.tree
            arrays = {
                leaf.name: (tuple(leaf.shape), np.dtype(leaf.dtype))
                for leaf in jax.tree.leaves(found)
            }
        except Exception as error:
            raise UnreadableError(
                f"checkpoint {step} cannot be read ({type(error).__name__}: {_reason(error)})"
            ) from error
        for path, leaf in jax.tree_util.tree_leaves_with_path(like):
            name = jax.tree_util.keystr(path, simple=True, separator=".")
            shape, dtype = arrays.get(name, (None, None))
            # (What is missing altogether says Orbax.)
            if shape is not None and (shape, dtype) != (leaf.shape, leaf.dtype):
                raise UnreadableError(
                    f"checkpoint {step} is of another job: {name} is {dtype}{list(shape)}, where "
                    f"this job has {leaf.dtype}{list(leaf.shape)}"
                )


class _Digested(ocp.path.atomicity.AtomicRenameTemporaryPath):
    """Where Orbax writes a checkpoint; the rename that shows it is the last thing done to it.

    Orbax's own way changes two files of the folder after all callbacks, and no digest could be
    of them.
    """

    async def finalize(self) -> None:
        if self._checkpoint_metadata_store:
            self._checkpoint_metadata_store.wait_until_finished()
        folder = Path(self.get())
        write_digests(folder)
        folder.rename(self.get_final())


def _filled(tree: Any) -> Any:
    """With one entry along every axis that has none: Orbax saves no arrays without entries."""

    def filled(x):
        return x if x.size else np.zeros([max(1, n) for n in x.shape], x.dtype)

    return jax.tree.map(filled, tree)


def write_digests(folder: Path) -> None:
    """Of all files below, in a file of its own."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    lines = [f"{_digest(path)}  {path.relative_to(folder)}" for path in paths]
    (folder / DIGESTS).write_text("\n".join([_heading(len(lines)), *lines, ""]))


def _reason(error: BaseException) -> str:
    """In a line: what the system said, where it was the system."""
    while error.__cause__ is not None and not isinstance(error, OSError):
        error = error.__cause__
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    # TensorStore has words of its own around the system's.
    for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS):
        if os.strerror(number).lower() in str(error).lower():
            return os.strerror(number)
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


@contextlib.contextmanager
def _unlogged() -> Iterator[None]:
    """Without what Orbax logs of a damaged file, all of it, where nobody has asked for one yet."""
    logger = logging.getLogger("absl")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


def _say_nothing_in_threads() -> None:
    """Without tracebacks from Orbax's threads of a save that fails: ``wait`` says what it was.

    Its writers' futures end after its event loop, and are never asked, which Python says too.
    """
    for module, name in ((threading, "excepthook"), (sys, "unraisablehook")):
        hook = getattr(module, name)
        if getattr(hook, "__name__", "") != "_without_orbax":

            def _without_orbax(given: Any, hook: Any = hook) -> None:
                if not _of_orbax(given.exc_value, given.exc_traceback):
                    hook(given)

            setattr(module, name, _without_orbax)
    for name in ("absl", "asyncio"):
        logging.getLogger(name).addFilter(_not_of_orbax)  # (Once: it is the same each time.)


def _not_of_orbax(record: logging.LogRecord) -> bool:
    _, error, trace = record.exc_info or (None, None, None)
    theirs = f"{os.sep}orbax{os.sep}" in record.pathname and record.levelno >= logging.ERROR
    return not theirs and (error is None or not _of_orbax(error, trace))


def _of_orbax(error: Any, trace: Any) -> bool:
    """Whether it came through Orbax or TensorStore, or from an event loop that they ended."""
    seen = []
    while trace is not None:
        seen.append(trace.tb_frame.f_globals.get("__name__", ""))
        trace = trace.tb_next
    closed = str(error) == "Event loop is closed" and seen[:1] == ["asyncio.base_events"]
    return closed or "tensorstore" in str(error) or any(x.startswith("orbax.") for x in seen)


def _problem(folder: Path) -> str:
    """Which file of a checkpoint is not as it was written, and how; empty if none."""
    try:
        text = (folder / DIGESTS).read_text(errors="replace")
    except FileNotFoundError:
        return f"{DIGESTS} is missing" if _says_digested(folder) else ""
    except OSError as error:
        return f"{DIGESTS} cannot be read ({error.strerror})"
    *lines, rest = text.split("\n")
    if rest or lines[:1] != [_heading(len(lines) - 1)]:
        return f"{DIGESTS} has changed"
    for digest, _, name in (line.partition("  ") for line in lines[1:]):
        if ".." in PurePosixPath(name).parts or PurePosixPath(name).is_absolute():
            return f"{DIGESTS} names a file outside"
        try:
            if _digest(folder / name) != digest:
                return f"{name} has changed"
        except FileNotFoundError:
            return f"{name} is missing"
        except (OSError, ValueError) as error:
            return f"{name} cannot be read ({error})"
    return ""


def _says_digested(folder: Path) -> bool:
    try:
        return _DIGESTED in json.loads((folder / "job" / "metadata").read_bytes())
    except (OSError, ValueError):
        return False  # Orbax will say what is wrong with it.


def _heading(count: int) -> str:
    return f"# {count} files"


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
