"""Several processes for one job: which of them this is, and what is asked before JAX joins them.

JAX ends a process whose partners do not come with a C++ stack trace, and starts one whose partners
compute something else. So before it is asked to, every process says to the first one who it is and
what it runs, on the same port; the first says to each whether all is well, or what is wrong.
"""

import contextlib
import os
import platform
import re
import socket
import sys
import traceback
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from launch import command_line, stopping
from launch.choices import to_dict
from launch.config import Config, flattened

# What SLURM says in every task that `srun` starts.
_SLURM = ("SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")


class Place(NamedTuple):
    """Which of several processes this is.

    Attributes:
      host, port: where the first process is.
      size: how many processes there are.
      rank: which this is, from 0.
      local_device: the only device it may take; None: all it sees.
      elsewhere: whether the first process is known to be on another host.
    """

    host: str
    port: int
    size: int
    rank: int
    local_device: int | None = None
    elsewhere: bool = False


def join(
    config: Config, address: str | None, count: int | None, index: int | None, wait_seconds: int
) -> None:
    """Makes this process one of those that run the job, if there are several.

    Args:
      address, count, index: as the flags have them; see ``find_place``.
      wait_seconds: how long the processes wait for each other.

    Raises:
      ValueError: naming what is wrong, in every process that can hear of it.
    """
    place = find_place(os.environ, address, count, index)
    if place is None:
        return
    from launch.rendezvous import meet

    meet(place, facts(config), wait_seconds)
    from meta_train import devices, processes

    devices.configure_cpu_devices(config.num_devices)
    host = f"[{place.host}]" if ":" in place.host else place.host
    where = f"{host}:{place.port}"
    with stopping.heard_at_once():  # JAX waits where Python hears of no signal.
        processes.join(where, place.size, place.rank, wait_seconds, place.local_device)
    devices.check_equal_processes()


def facts(config: Config) -> dict[str, str]:
    """What must be the same in every process, each as it is said where it is not."""
    from launch import environment, provenance

    versions = {f"the version of {name}": v for name, v in provenance.versions().items()}
    commit = {"the commit": str(provenance.commit())}
    settings = {name: repr(value) for name, value in environment.deciding_settings().items()}
    # Of wrong ones a process dies when the others wait for it already.
    settings["XLA_FLAGS"] = repr(os.environ.get("XLA_FLAGS", ""))
    fields = {f"--cfg.{name}": repr(v) for name, v in flattened(to_dict(config)).items()}
    return versions | commit | settings | fields


def find_place(
    environ: Mapping[str, str], address: str | None, count: int | None, index: int | None
) -> Place | None:
    """From the flags, from JAX's variables, or from SLURM's; None if there is one process.

    Raises:
      ValueError: if something is missing, or does not fit.
    """
    if count == 1:
        return None
    given: dict[str, Any] = {
        "--coordinator_address": address or environ.get("JAX_COORDINATOR_ADDRESS"),
        "--num_processes": _whole(environ, "JAX_NUM_PROCESSES", count),
        "--process_id": _whole(environ, "JAX_PROCESS_ID", index),
    }
    size = given["--num_processes"]
    if size == 1:
        if given["--process_id"] not in (None, 0):
            raise ValueError(
                f"--process_id (or JAX_PROCESS_ID) must be 0 where --num_processes is 1, got "
                f"{given['--process_id']}; give --num_processes what there are."
            )
        return None
    if size is not None and size < 1:
        raise ValueError(f"--num_processes (or JAX_NUM_PROCESSES) must be at least 1, got {size}.")
    if all(value is None for value in given.values()):
        return _slurm_place(environ)
    missing = [name for name, value in given.items() if value is None]
    if missing:
        raise ValueError(
            f"{' and '.join(missing)} must be given where several processes run one job: there is "
            f"{', '.join(f'{k}={v}' for k, v in given.items() if v is not None)} only (from the "
            "flags or JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID)."
        )
    host, port = _host_and_port(str(given["--coordinator_address"]), environ)
    place = Place(host, port, int(given["--num_processes"]), int(given["--process_id"]))
    _check_index("--process_id", place)
    return place


def _slurm_place(environ: Mapping[str, str]) -> Place | None:
    """In a task of SLURM's; None outside, or where there is one task."""
    if "SLURM_JOB_ID" not in environ:
        return None
    tasks, nodes = (_whole(environ, n, None) or 1 for n in ("SLURM_NTASKS", "SLURM_NNODES"))
    if max(tasks, nodes) == 1:
        return None
    missing = [name for name in _SLURM if not environ.get(name)]
    if missing:
        raise ValueError(
            f"this is a SLURM job of {nodes} nodes and {tasks} tasks, but {', '.join(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} missing, as where a command is started "
            "without srun. Start it with srun (see launch/cluster/slurm.sbatch), or give "
            "--num_processes=1 for one process."
        )
    if tasks == 1:
        return None
    # As in `rack[1-2]node[07-09,12].cluster,big1`: of each bracket the first.
    nodes_of_first = re.split(r",(?![^\[]*\])", environ["SLURM_STEP_NODELIST"])[0]
    first = re.sub(r"\[(\w+)[^\]]*\]", r"\1", nodes_of_first)
    # JAX's own choice, so that what is said of it elsewhere holds here.
    port = _port(environ, int(_whole(environ, "SLURM_JOB_ID", None) or 0) % 2**12 + 61440)
    on_one = max(
        map(int, re.findall(r"(\d+)(?:\(x\d+\))?", environ.get("SLURM_STEP_TASKS_PER_NODE") or "1"))
    )
    here = environ.get("SLURMD_NODENAME", first)
    place = Place(
        first,
        port,
        tasks,
        int(_whole(environ, "SLURM_PROCID", None) or 0),
        _whole(environ, "SLURM_LOCALID", None) if on_one > 1 else None,
        elsewhere=here != first,
    )
    _check_index("SLURM_PROCID", place)
    return place


def _host_and_port(address: str, environ: Mapping[str, str]) -> tuple[str, int]:
    # Of IPv6 addresses only those in brackets: `::1:5` may be a host or have a port.
    found = re.fullmatch(r"(?:\[([^\[\]\s]+)\]|([^\[\]:\s]+))(?::(\d{1,9}))?", address)
    if found and found[3] and not 0 < int(found[3]) < 2**16:
        raise ValueError(
            f"--coordinator_address must have a port between 1 and 65535, got {address!r}."
        )
    if found and (found[3] or "JAX_COORDINATOR_PORT" in environ):
        port = _port(environ, int(found[3]) if found[3] else 0)
        if not found[3] or port == int(found[3]):
            return found[1] or found[2], port
        raise ValueError(
            f"--coordinator_address={address} names another port than JAX_COORDINATOR_PORT={port}; "
            "leave one of them out."
        )
    raise ValueError(
        f"--coordinator_address must be HOST:PORT, or [ADDRESS]:PORT for IPv6, got {address!r}; "
        "the port may be in JAX_COORDINATOR_PORT."
    )


def _port(environ: Mapping[str, str], otherwise: int) -> int:
    port = _whole(environ, "JAX_COORDINATOR_PORT", None)
    port = otherwise if port is None else port
    if not 0 < port < 2**16:
        raise ValueError(f"JAX_COORDINATOR_PORT must be between 1 and 65535, got {port}.")
    return port


def _whole(environ: Mapping[str, str], name: str, given: int | None) -> int | None:
    if given is not None or not environ.get(name):
        return given
    if not environ[name].isdecimal():
        raise ValueError(f"{name} must be a whole number, got {environ[name]!r}.")
    return int(environ[name])


def _check_index(name: str, place: Place) -> None:
    if not 0 <= place.rank < place.size:
        raise ValueError(
            f"{name} must be between 0 and {place.size - 1}, as there are {place.size} "
            f"processes, got {place.rank}."
        )


def this_host() -> str:
    """The name of this machine, for messages."""
    return platform.node() or socket.gethostname()


# How the messages of JAX's runtime begin when a partner is gone, whatever Python raises them as.
_STATUS = re.compile(
    r"\W*(ABORTED|CANCELLED|DEADLINE_EXCEEDED|FAILED_PRECONDITION|INTERNAL|UNAVAILABLE|UNKNOWN):"
)


@contextlib.contextmanager
def ending_together(lost: int) -> Iterator[None]:
    """Ends this process at once if another one is gone; JAX would wait for it at the exit.

    Args:
      lost: the exit code then.
    """
    try:
        yield
    except Exception as error:
        from meta_train import processes

        if not processes.several() or isinstance(error, processes.AgreedError):
            raise
        code = _say_end(error, lost)
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(code)


def _say_end(error: Exception, lost: int) -> int:
    me = f"process {_index()} on {this_host()}"
    if _STATUS.match(str(error)) and isinstance(error, RuntimeError | ValueError):
        reason = str(error).splitlines()[0][:300]
        print(
            f"error: {me} lost another one, or the network to it ({reason}). All processes end; "
            "run the same command in each again, and the job continues from its last checkpoint.",
            file=sys.stderr,
        )
        return lost
    if isinstance(error, ValueError):
        print(f"error: {me}: {error}", file=sys.stderr)
        return 2
    if isinstance(error, OSError) and (words := command_line.of_full_disk(error)):
        print(f"error: {me}: {words}", file=sys.stderr)
        return command_line.EXIT_DISK
    traceback.print_exception(error)
    return 1


def _index() -> Any:
    import jax

    return jax.process_index()
