"""A Weights & Biases run that can neither stop nor delay a job."""

import contextlib
import os
import queue
import signal
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

# Rows that may wait for W&B; of a job of 10 rows a second, those of three hours.
_MOST_ROWS = 100_000
# What the helper process must not die of before the job that it serves. (Of SIGTERM it does, if
# it gets one of its own: its handler is its own.)
_NOT_FOR_HELPERS = {signal.SIGTERM, signal.SIGINT, signal.SIGUSR1}


class WandbRun:
    """Rows to W&B, in a thread of its own: it may be unreachable, hang, or be killed.

    What goes wrong is said once, on stderr, and from then on nothing is sent: ``metrics.jsonl``
    has every row. What cannot be reached at the start is tracked offline.

    Attributes:
      folder: of the run's files; None before it began.
    """

    def __init__(self, workdir: Path, mode: str, **options: Any):
        """Args:
        workdir: the job's folder, which gives the run its name and holds its files.
        mode: ``auto``, ``online`` or ``offline``.
        options: of ``wandb.init``.
        """
        self.folder: str | None = None
        self._due: queue.Queue[Callable[[Any, Any], None] | None] = queue.Queue(_MOST_ROWS)
        self._problem = ""
        # A service of the job's own: one inherited from whoever started it outlives a killed
        # job, whose run id is then still in use when the job is started again.
        os.environ.pop("WANDB_SERVICE", None)
        options = {"name": workdir.absolute().name, "dir": str(workdir.absolute())} | options
        self._thread = threading.Thread(target=self._work, args=(mode, options), daemon=True)
        self._thread.start()

    def log(self, row: Mapping[str, Any]) -> None:
        """One row, which has ``step``, scalars and ``NAME_histogram``."""

        def log(wandb, run):
            shown = {name: _for_wandb(wandb, name, value) for name, value in row.items()}
            run.log(shown, step=int(row["step"]))

        self.send(log)

    def send(self, what: Callable[[Any, Any], None]) -> None:
        """Has ``what(wandb, run)`` done in the thread, after all before it."""
        if self._problem:
            return
        try:
            self._due.put_nowait(what)
        except queue.Full:
            self._give_up("it takes no more rows")

    def finish(self, seconds: float) -> None:
        """Ends the run; waits that long for what is still to be sent."""
        with contextlib.suppress(queue.Full):
            self._due.put_nowait(None)
        self._thread.join(seconds)
        if self._thread.is_alive():
            self._give_up(f"it was not done after {seconds:.0f} s")
            # Else Python would wait for it when it ends.
            for helper in _children("wandb-core"):
                with contextlib.suppress(OSError):
                    os.kill(helper, signal.SIGKILL)
            self._thread.join(5.0)

    def _give_up(self, problem: str) -> None:
        """Says once why there will be no more."""
        if self._problem:
            return
        self._problem = problem
        rest = ""
        if self.folder and os.path.isdir(self.folder):
            rest = f"; `wandb sync {self.folder}` sends what it has"
        line = f"warning: W&B: {problem}. Training goes on, metrics.jsonl has every row{rest}."
        with contextlib.suppress(OSError):  # Where stderr is on a full disk.
            print(line, file=sys.stderr, flush=True)

    def _work(self, mode: str, options: dict[str, Any]) -> None:
        # What is started here inherits what is blocked here.
        signal.pthread_sigmask(signal.SIG_BLOCK, _NOT_FOR_HELPERS)
        import wandb  # In this thread, for it takes a second.

        try:
            run = self._begin(wandb, mode, options)
            while (what := self._due.get()) is not None:
                if self._problem:
                    continue
                if not os.path.isdir(run.dir):
                    self._give_up(f"its folder {self.folder} was deleted")
                    continue
                what(wandb, run)
            run.finish()
        except Exception as error:  # Of many kinds, from its client, the network and the system.
            self._give_up(_said(error))
        finally:
            # Or it would be done when Python ends, with a traceback if the helper has died.
            with contextlib.suppress(Exception):
                wandb.teardown()

    def _begin(self, wandb: Any, mode: str, options: dict[str, Any]) -> Any:
        settings = wandb.Settings(silent=True)
        resolved = wandb_mode(mode)
        try:
            run = wandb.init(mode=resolved, resume="allow", settings=settings, **options)
        except Exception as error:
            if resolved != "online":
                raise
            run = wandb.init(mode="offline", resume="allow", settings=settings, **options)
            print(
                f"warning: W&B cannot be reached ({_said(error)}). Training goes on, tracked "
                f"offline: `wandb sync {Path(run.dir).parent}` sends it.",
                file=sys.stderr,
                flush=True,
            )
        run.define_metric("step")
        run.define_metric("*", step_metric="step")
        self.folder = None if run.disabled else str(Path(run.dir).parent)
        return run


def wandb_mode(requested: str) -> Any:
    """``online``, ``offline`` or ``disabled``; ``auto`` is online only for who is logged in."""
    if requested != "auto":
        return requested
    if os.environ.get("WANDB_MODE"):
        return os.environ["WANDB_MODE"]
    import wandb

    return "online" if wandb.login(prompt=False) else "offline"


def _for_wandb(wandb: Any, name: str, value: Any) -> Any:
    if value is None or not name.endswith("_histogram"):
        return value
    edges = np.linspace(value["low"], value["high"], len(value["counts"]) + 1)
    return wandb.Histogram(np_histogram=(value["counts"], edges))


def _said(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def _children(name: str) -> list[int]:
    """Processes of that name that this one started; none where there is no ``/proc``."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            command, _, fields = path.read_text(errors="replace").rpartition(") ")
            if command.partition("(")[2] == name and int(fields.split()[1]) == os.getpid():
                found.append(int(path.parent.name))
    return found
