"""Checkpoints of whole jobs with Orbax: asynchronous, atomic, the newest few kept."""

from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp


class Checkpoints:
    """The checkpoints of one job, in ``workdir/checkpoints``.

    A checkpoint holds the device-free train state and a JSON description of the job
    (resolved config, W&B run id). It appears in one rename when it is complete, so a job
    killed at any moment leaves only whole checkpoints behind.

    Args:
      workdir: the job's folder.
      keep: how many of the newest to keep.
      read_only: only look: change nothing, not even what a killed job left half-written,
        which may be what a living one is writing.
    """

    def __init__(self, workdir: Path, keep: int = 3, read_only: bool = False):
        if read_only:
            options = ocp.CheckpointManagerOptions(create=False, save_root_metadata=False)
        else:
            options = ocp.CheckpointManagerOptions(
                max_to_keep=keep, enable_async_checkpointing=True, cleanup_tmp_directories=True
            )
        self._manager = ocp.CheckpointManager(
            (workdir / "checkpoints").absolute(),
            options=options,
            item_names=("state", "job"),
        )

    @property
    def latest_step(self) -> int | None:
        """The newest complete checkpoint's outer step, or None."""
        return self._manager.latest_step()

    @property
    def steps(self) -> list[int]:
        """Outer steps of all complete checkpoints."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, host_state: Any, job: dict[str, Any]) -> None:
        """Starts writing; returns at once. ``host_state`` must not change afterwards."""
        if step in self._manager.all_steps():
            return
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(host_state), job=ocp.args.JsonSave(job)
            ),
            force=True,
        )

    def job(self, step: int) -> dict[str, Any]:
        """The JSON description saved with a step."""
        return self._manager.restore(step, args=ocp.args.Composite(job=ocp.args.JsonRestore())).job

    def restore(self, step: int, like: Any) -> Any:
        """The host state saved at ``step``; ``like`` gives its structure and shapes."""
        args = ocp.args.Composite(state=ocp.args.StandardRestore(like))
        return self._manager.restore(step, args=args).state

    def close(self) -> None:
        """Waits until everything is on disk."""
        self._manager.wait_until_finished()
        self._manager.close()
