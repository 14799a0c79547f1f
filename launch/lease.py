"""Who may write to the folder of a job: one process, also where a file system has no locks."""

import contextlib
import errno
import fcntl
import json
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from meta_train import strict_json

# Between two signs of life, and how long to look for one, seconds.
BEAT_SECONDS = 5.0
WATCH_SECONDS = 25.0
# Of what is in the file, so that a later sign of life takes no more of a full disk.
_BYTES = 512


class Lease:
    """A job's folder is this process's as long as ``lost`` is empty.

    ``WORKDIR/lock`` is locked, and has a line of JSON that says whose it is (host and pid) and
    changes every few seconds. The lock alone decides between processes of one machine; where there
    are no locks, or locks that other machines do not see, the line does.

    Attributes:
      lost: what happened to the folder: who took it over, which happens to a process that was
        suspended for long, or that it was removed or renamed; empty if nothing.
    """

    def __init__(self, path: Path, file: Any):
        self._path, self._file = path, file
        self._owner = _this_process() | {"token": secrets.token_hex(8)}
        self._beats, self._looked = 0, 0.0
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)
        self.lost = ""

    def begin(self) -> None:
        """Writes whose it is from now on, and keeps on writing."""
        self._write(released=False)
        self._thread.start()

    def release(self) -> None:
        """Says that nobody has it; the next process need not look for signs of life."""
        self._end.set()
        self._thread.join()
        self._check()
        if not self.lost:
            self._write(released=True)

    def is_lost(self, seconds: float = 0.0) -> bool:
        """Whether it is lost, as was found out at most so many seconds ago."""
        if time.monotonic() - self._looked >= seconds:
            self._check()
        return bool(self.lost)

    def refuse_if_lost(self) -> None:
        """Raises ``ValueError`` if it is lost."""
        if self.is_lost():
            raise ValueError(
                f"`workdir` {self._path.parent} was {self.lost}; this process ends, and has saved "
                "nothing since."
            )

    def _beat(self) -> None:
        while not self._end.wait(BEAT_SECONDS):
            self._check()
            if self.lost:
                return
            self._write(released=False)

    def _check(self) -> None:
        self._looked = time.monotonic()
        if not self._path.parent.is_dir():
            self.lost = "removed or renamed while this process wrote to it"
            return
        found = _read(self._path)
        if found and found.get("token") != self._owner["token"]:
            self.lost = (
                f"taken over by {_name(found)} while this process was suspended, or its lock was "
                "removed; let the other finish"
            )
        elif not found and not self._path.exists():
            self._lock_again()

    def _lock_again(self) -> None:
        """Somebody removed the file: it is written again, unless another process was faster."""
        with contextlib.suppress(OSError):
            number = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
            with contextlib.suppress(OSError):  # A file system without locks.
                fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.dup2(number, self._file.fileno())
            os.close(number)
            self._write(released=False)

    def _write(self, released: bool) -> None:
        self._beats += 1
        line = strict_json.dumps(self._owner | {"beats": self._beats, "released": released})
        with contextlib.suppress(OSError):
            os.pwrite(self._file.fileno(), line.encode().ljust(_BYTES - 1) + b"\n", 0)


@contextlib.contextmanager
def claim(workdir: Path) -> Iterator[Lease]:
    """Keeps a second process out of the job; the system lets go when this one ends, however.

    After a process on another machine that was killed, and after any that was killed where there
    are no locks, ``WATCH_SECONDS`` are spent looking for a sign of life.

    Raises:
      ValueError: if another process has it, or the folder cannot be written.
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        path = workdir / "lock"
        file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b", 0)
    except OSError as error:
        raise ValueError(
            f"`workdir` {workdir} must be a folder that can be written, but {error.filename} "
            f"cannot ({error.strerror}); give another folder, or mend this one."
        ) from None
    with file:
        locked = True
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(_in_use(workdir, _read(path))) from None
        except OSError:
            locked = False  # A file system without locks.
        _refuse_living(path, locked)
        lease = Lease(path, file)
        lease.begin()
        try:
            yield lease
        finally:
            lease.release()


def _refuse_living(path: Path, locked: bool) -> None:
    """Raises ``ValueError`` if whoever the file names shows a sign of life."""
    found = _read(path)
    if not found or found.get("released"):
        return
    # Here its lock would still be held; without locks the system knows its processes.
    if _same_machine(found) and (locked or not _runs(found)):
        return
    print(
        f"{path.parent} may still be in use by {_name(found)}; looking for {WATCH_SECONDS:.0f} s "
        "whether it is ...",
        file=sys.stderr,
        flush=True,
    )
    deadline = time.monotonic() + WATCH_SECONDS
    while time.monotonic() < deadline:
        time.sleep(min(0.2, BEAT_SECONDS))
        now = _read(path)
        if now and now.get("released"):
            return
        if now and now != found:
            raise ValueError(_in_use(path.parent, now))


def _in_use(workdir: Path, found: dict[str, Any]) -> str:
    by = _name(found) if found else "another process"
    return (
        f"`workdir` {workdir} is in use by {by}, which would write to the same files. Wait until "
        "it ends, or give another --workdir."
    )


def _name(found: dict[str, Any]) -> str:
    return f"another process ({found.get('pid')} on {found.get('host')})"


def _read(path: Path) -> dict[str, Any]:
    """What the file says; empty if that is nothing, or was written by an older version.

    Opened anew, or a network file system would say what it said before.
    """
    try:
        with path.open("rb") as file:
            found = json.loads(file.read(_BYTES))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _this_process() -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "machine": _machine(),
        "started": _started(os.getpid()),
    }


def _same_machine(found: dict[str, Any]) -> bool:
    return found.get("machine") == _machine()


def _machine() -> str:
    """Where a pid means the same process: a boot of a machine, and what has pids of its own."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(parts)


def _runs(found: dict[str, Any]) -> bool:
    """Whether that very process is still there, on this machine."""
    pid = found.get("pid")
    if not isinstance(pid, int) or pid <= 0:
        return False
    try:
        os.kill(pid, 0)
    except OSError as error:
        if error.errno == errno.ESRCH:
            return False
    except OverflowError:
        return False
    return _started(pid) == found.get("started")


def _started(pid: int) -> str:
    """When the process began, in the system's own count; empty where it does not say."""
    with contextlib.suppress(OSError, IndexError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()[19]
    return ""
