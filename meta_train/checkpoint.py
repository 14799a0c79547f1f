"""Checkpoints of whole jobs with Orbax: asynchronous, atomic, checked, the newest few kept."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp

# Digests of a checkpoint's files, as `sha256sum --check` reads them.
DIGESTS = "SHA256SUMS"


class UnreadableError(ValueError):
    """A checkpoint that cannot be read; says why in a few words."""


class Checkpoints:
    """The checkpoints of one job, in ``workdir/checkpoints``.

    A checkpoint holds the device-free train state and a JSON record of the job (resolved
    config, W&B run id and more). It appears in one rename when it is complete, so a job killed
    at any moment leaves only whole checkpoints behind. ``SHA256SUMS`` in it tells damage done
    later; checkpoints older than that file are believed.

    Args:
      workdir: the job's folder.
      keep: how many of the newest to keep.
      read_only: only look: change nothing, not even what a killed job left half-written,
        which may be what a living one is writing.
    """

    def __init__(self, workdir: Path, keep: int = 3, read_only: bool = False):
        self._folder = (workdir / "checkpoints").absolute()
        self._saving: int | None = None
        if read_only:
            options = ocp.CheckpointManagerOptions(create=False, save_root_metadata=False)
        else:
            options = ocp.CheckpointManagerOptions(
                max_to_keep=keep,
                enable_async_checkpointing=True,
                cleanup_tmp_directories=True,
                async_options=ocp.AsyncOptions(post_finalization_callback=self._write_digests),
            )
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
        self._manager.wait_until_finished()  # So that there is one at a time to digest.
        self._saving = step
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(host_state), job=ocp.args.JsonSave(job)
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

    def _write_digests(self) -> None:
        """Called when the files are written, and just before the rename that shows them."""
        for folder in self._folder.glob(f"{self._saving}.*"):
            paths = list(_files(folder))
            lines = [f"{_digest(path)}  {path.relative_to(folder)}" for path in paths]
            (folder / DIGESTS).write_text("\n".join([_heading(len(lines)), *lines, ""]))

    def _check(self, step: int) -> None:
        """Raises ``UnreadableError`` naming a file that is not as it was written."""
        folder = self.folder(step)
        try:
            heading, *lines = (folder / DIGESTS).read_text(errors="replace").split("\n")[:-1] or [
                ""
            ]
            if heading != _heading(len(lines)):
                raise UnreadableError(f"checkpoint {step} is damaged: {DIGESTS} has changed")
        except FileNotFoundError:
            lines = []  # Older than digests.
        for digest, _, name in (line.partition("  ") for line in lines):
            try:
                problem = "has changed" if _digest(folder / name) != digest else ""
            except FileNotFoundError:
                problem = "is missing"
            except (OSError, ValueError) as error:
                problem = f"cannot be read ({error})"
            if problem:
                raise UnreadableError(f"checkpoint {step} is damaged: {name} {problem}")
        metadata = folder / "_CHECKPOINT_METADATA"
        if metadata.is_file():  # Orbax reads it, and complains, but does not need it.
            try:
                json.loads(metadata.read_bytes())
            except ValueError:
                raise UnreadableError(
                    f"checkpoint {step} is damaged: {metadata.name} has changed"
                ) from None


def _heading(count: int) -> str:
    return f"# {count} files"


def _files(folder: Path) -> Iterator[Path]:
    """Those below the folder's own: the items. Orbax still writes to its own at the end."""
    return (path for path in sorted(folder.glob("*/**/*")) if path.is_file())


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
