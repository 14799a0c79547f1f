"""The processes of a sweep: one a run, some at once, each on processors of its own."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from meta_train import strict_json
from meta_train.progress import progress

LOG, STATUS = "log.txt", "sweep_status.json"
# Exit codes of launch.train after which a run is not started again: done; nothing to learn.
FINAL = (0, 3)


def status(folder: Path, command: Sequence[str] | None = None) -> int | None:
    """How the run in a folder ended; None if it has not, or if it was another command's."""
    import json

    try:
        found = json.loads((folder / STATUS).read_text())
        other = command is not None and found["command"] != _without_folder(command)
        return None if other else found["exit_code"]
    except (FileNotFoundError, ValueError, KeyError):
        return None


def _without_folder(command: Sequence[str]) -> list[str]:
    """The same wherever the sweep's folder is moved."""
    return [word for word in command if not word.startswith("--workdir=")]


def environment(cache: Path) -> dict[str, str]:
    """That of the runs: programs are kept in the sweep's folder, however fast they compiled."""
    return os.environ | {
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }


def run_all(
    commands: Mapping[Path, Sequence[str]], jobs: int, cache: Path
) -> tuple[dict[Path, int], bool]:
    """Runs each command with its folder for output, ``jobs`` at a time.

    SIGTERM and SIGINT are passed on, so that every run saves, and end the sweep.

    Returns:
      Folder -> exit code of those that ended, and whether a signal came.
    """
    cores = sorted(os.sched_getaffinity(0))
    shares = [cores[i::jobs] for i in range(jobs)] if jobs <= len(cores) else [cores] * jobs
    free, waiting = list(range(jobs)), list(commands.items())
    running: dict[Path, tuple[subprocess.Popen, int]] = {}
    ended: dict[Path, int] = {}
    stopped = False

    def stop(number, frame):
        nonlocal stopped
        del number, frame
        stopped = True
        for process, _ in running.values():
            process.terminate()

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    # Shown again while runs go on, so its rate is that of the whole.
    bar = progress(total=len(commands), desc="sweep", unit="run", miniters=0, smoothing=0)
    try:
        while running or (waiting and not stopped):
            while waiting and free and not stopped:
                (folder, command), share = waiting.pop(0), free.pop()
                running[folder] = (_start(command, folder, shares[share], cache), share)
            time.sleep(0.1)
            bar.update(0)
            for folder, (process, share) in list(running.items()):
                if process.poll() is None:
                    continue
                del running[folder]
                free.append(share)
                ended[folder] = process.returncode
                if process.returncode in FINAL:
                    command = _without_folder(commands[folder])
                    record = {"exit_code": process.returncode, "command": command}
                    (folder / STATUS).write_text(strict_json.dumps(record) + "\n")
                if process.returncode in FINAL or not stopped:
                    bar.update()
    finally:
        bar.close()
        for process, _ in running.values():
            process.terminate()
        for number, handler in before.items():
            signal.signal(number, handler)
    return ended, stopped


def _start(
    command: Sequence[str], folder: Path, cores: Sequence[int], cache: Path
) -> subprocess.Popen:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / STATUS).unlink(missing_ok=True)  # Of another command: what it says is over.
    # As the installed command finds packages: a `launch` or `tasks` of the user's is not ours.
    alone = ["-P"] if os.path.basename(sys.argv[0]).startswith("learned-opt-") else []
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)  # Which the new process takes over.
    try:
        with (folder / LOG).open("a") as log:
            return subprocess.Popen(
                [sys.executable, *alone, "-m", *command],
                stdout=log,
                stderr=log,
                env=environment(cache),
                # Of its own group: Ctrl-C reaches it once, by us.
                start_new_session=True,
            )
    finally:
        os.sched_setaffinity(0, before)
