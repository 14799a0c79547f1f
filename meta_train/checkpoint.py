"""Checkpoints of whole jobs with Orbax: asynchronous, atomic, checked, the newest few kept."""

import contextlib
import hashlib
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

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
        with _unlogged():
            self._manager = ocp.CheckpointManager(
                self._folder, options=options, item_names=("state", "job")
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
        """Starts writing; returns at once. ``host_state`` must not change afterwards."""
        if step in self._manager.all_steps():
            return
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(host_state),
                job=ocp.args.JsonSave(job | {_DIGESTED: DIGESTS}),
            ),
            force=True,
        )

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
          UnreadableError: if the checkpoint is damaged, or of another structure.
        """
        self._check(step)
        args = ocp.args.Composite(state=ocp.args.StandardRestore(like))
        return self._restore(step, args).state

    def wait(self) -> None:
        """Waits until everything is on disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits until everything is on disk."""
        self._manager.wait_until_finished()
        self._manager.close()

    def _restore(self, step: int, args: Any) -> Any:
        try:
            return self._manager.restore(step, args=args)
        except Exception as error:  # Of many kinds, from Orbax, TensorStore and JSON.
            reason = (str(error).splitlines() or [""])[0][:200]
            raise UnreadableError(
                f"checkpoint {step} cannot be read ({type(error).__name__}: {reason})"
            ) from error

    def _check(self, step: int) -> None:
        """Raises ``UnreadableError`` naming a file that is not as it was written."""
        problem = _problem(self.folder(step))
        if problem:
            raise UnreadableError(f"checkpoint {step} is damaged: {problem}")


class _Digested(ocp.path.atomicity.AtomicRenameTemporaryPath):
    """Where Orbax writes a checkpoint; the rename that shows it is the last thing done to it.

    Orbax's own way changes two files of the folder after all callbacks, and no digest could be
    of them.
    """

    async def finalize(self) -> None:
        if self._checkpoint_metadata_store:
            self._checkpoint_metadata_store.wait_until_finished()
        folder = Path(self.get())
        paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        lines = [f"{_digest(path)}  {path.relative_to(folder)}" for path in paths]
        (folder / DIGESTS).write_text("\n".join([_heading(len(lines)), *lines, ""]))
        folder.rename(self.get_final())


@contextlib.contextmanager
def _unlogged() -> Iterator[None]:
    """Without what Orbax logs of a damaged file, all of it, where nobody has asked for one yet."""
    logger = logging.getLogger("absl")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


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
