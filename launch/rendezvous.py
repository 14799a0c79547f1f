"""Where the processes of a job meet before JAX joins them: a socket, and a line of JSON each way.

Everything waits for a limited time, and says what it waits for.
"""

import contextlib
import errno
import json
import selectors
import socket
import sys
import time
from typing import Any

from launch.hosts import Place, this_host
from meta_train import strict_json

# Seconds between two notes on what is waited for, and between two attempts to connect.
_NOTE_SECONDS, _RETRY_SECONDS = 30.0, 0.2
_LINE = 1 << 20  # Bytes that a process may say at most.
_HELLO_SECONDS = 10.0  # In which it says all of it.
_GREETING = "learned-opt"
# Facts that differ are named, up to so many.
_NAMED = 5


def meet(place: Place, facts: dict[str, str], wait_seconds: float) -> None:
    """Returns when all processes are there and run the same.

    Args:
      facts: what must be the same in all of them.
      wait_seconds: for all the others to come.

    Raises:
      ValueError: in every process that is there: who has not come, or what differs where.
    """
    hello = {"is": _GREETING, "index": place.rank, "count": place.size, "host": this_host()}
    hello |= {"facts": facts}
    limit = _Limit(wait_seconds)
    if place.rank == 0:
        _receive_all(place, hello, limit)
    else:
        _report(place, hello, limit)


class _Limit:
    """The time there is, and a note now and then on what is waited for."""

    def __init__(self, seconds: float):
        self._began = self._noted = time.monotonic()
        self._seconds = seconds

    @property
    def left(self) -> float:
        return self._began + self._seconds - time.monotonic()

    @property
    def seconds(self) -> float:
        return self._seconds

    def note(self, what: str) -> None:
        now = time.monotonic()
        if now - self._noted >= _NOTE_SECONDS:
            self._noted = now
            print(f"waiting for {what} ({now - self._began:.0f} s) ...", file=sys.stderr)


class _Visitor:
    """Who has connected: ``hello`` is what it said once it has said all of it."""

    def __init__(self, peer: socket.socket):
        self.peer, self.data, self.since = peer, b"", time.monotonic()
        self.hello: dict[str, Any] | None = None

    def hear(self) -> bool:
        """Reads what there is; whether it is still there, and makes sense."""
        try:
            block = self.peer.recv(65536)
        except BlockingIOError:
            return True
        except OSError:
            return False
        self.data += block
        if self.hello is None and self.data.endswith(b"\n"):
            self.hello = _hello(_parsed(self.data))
            return self.hello is not None
        return bool(block) and len(self.data) < _LINE


def _receive_all(place: Place, own: dict[str, Any], limit: _Limit) -> None:
    """The first process: hears everyone, answers everyone."""
    visitors: list[_Visitor] = []
    problem = ""
    with contextlib.ExitStack() as opened:
        opened.callback(_close, visitors)
        selector = opened.enter_context(selectors.DefaultSelector())
        listening = opened.enter_context(_listen(place.port))
        listening.setblocking(False)
        selector.register(listening, selectors.EVENT_READ)
        while not problem:
            # Whoever has gone, or has not said in time what it is, makes room for another.
            seconds = min(1.0, max(0.0, limit.left))
            complete = len({v.hello["index"] for v in visitors if v.hello} | {0}) == place.size
            events = [key for key, _ in selector.select(0.0 if complete else seconds)]
            gone = [key.data for key in events if key.data and not key.data.hear()]
            late = time.monotonic() - _HELLO_SECONDS
            gone += [v for v in visitors if not v.hello and v.since < late and v not in gone]
            for visitor in gone:
                selector.unregister(visitor.peer)
                visitor.peer.close()
                visitors.remove(visitor)
            if any(key.fileobj is listening for key in events):
                with contextlib.suppress(OSError):  # It has gone, or there are too many for now.
                    peer = listening.accept()[0]
                    peer.setblocking(False)
                    visitors.append(_Visitor(peer))
                    selector.register(peer, selectors.EVENT_READ, visitors[-1])
            hellos = [v.hello for v in visitors if v.hello]
            problem = _misnumbered(place, own, hellos)
            absent = sorted(set(range(1, place.size)) - {hello["index"] for hello in hellos})
            if complete and not absent and not gone:
                break
            if absent and not problem:
                names = f"process{'es' if len(absent) > 1 else ''} "
                names += ", ".join(map(str, absent[:10]))
                names += f" and {len(absent) - 10} more" if len(absent) > 10 else ""
                limit.note(f"{names} of {place.size} at port {place.port} of {this_host()}")
                if limit.left <= 0:
                    problem = (
                        f"{names} of {place.size} did not come to {place.host}:{place.port} within "
                        f"{limit.seconds:.0f} s (--wait_seconds); see what they print, and whether "
                        "they can reach this host and port."
                    )
        heard = [visitor for visitor in visitors if visitor.hello]
        problem = problem or difference([own, *(v.hello for v in heard if v.hello)])
        answer = strict_json.dumps({"problem": problem}).encode() + b"\n"
        for visitor in heard:
            with contextlib.suppress(OSError):
                visitor.peer.settimeout(5.0)
                visitor.peer.sendall(answer)
                # They close first, so that the port is free for JAX at once.
                visitor.peer.recv(1)
    if problem:
        raise ValueError(problem)


def _close(visitors: list[_Visitor]) -> None:
    for visitor in visitors:
        visitor.peer.close()


def _misnumbered(place: Place, own: dict[str, Any], hellos: list[dict[str, Any]]) -> str:
    """A process of a number that another one has, or that there is not; empty if there is none."""
    there = {0: own}
    for hello in hellos:
        before = there.get(hello["index"])
        if before is not None or not 0 < hello["index"] < place.size:
            host = (before or own)["host"]
            return (
                f"process {hello['index']} of {hello['count']} came from {hello['host']}, but "
                f"there is one from {host} already, of {place.size}; give each process a "
                "--process_id of its own, and all the same --num_processes."
            )
        there[hello["index"]] = hello
    return ""


def difference(said: list[dict[str, Any]]) -> str:
    """What the processes do not have in common; empty if nothing."""
    first, *others = sorted(said, key=lambda hello: hello["index"])
    for hello in others:
        theirs, ours = hello["facts"], first["facts"]
        differing = [n for n in ours | theirs if theirs.get(n) != ours.get(n)]
        if hello["count"] != first["count"]:
            differing = ["--num_processes"]
            theirs, ours = ({"--num_processes": h["count"]} for h in (hello, first))
        if differing:
            lines = [
                f"{n} is {theirs.get(n)} there, {ours.get(n)} in process 0"
                for n in differing[:_NAMED]
            ]
            more = len(differing) - _NAMED
            lines += [f"and {more} more"] if more > 0 else []
            return (
                f"process {hello['index']} on {hello['host']} is not the same as process 0 on "
                f"{first['host']}: {'; '.join(lines)}. All processes must run the same command "
                "with the same packages."
            )
    return ""


def _listen(port: int) -> socket.socket:
    try:
        return socket.create_server(
            ("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=4096
        )
    except (OSError, ValueError) as error:
        if getattr(error, "errno", None) in (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL):
            with contextlib.suppress(OSError):  # No IPv6 here.
                return socket.create_server(("", port), backlog=4096)
        reason = getattr(error, "strerror", None) or error
        raise ValueError(
            f"port {port} of this host ({this_host()}) must be free for the processes to meet, but "
            f"cannot be taken ({reason}), as where another job runs here, or another process of "
            "this one has --process_id=0 too; give another in --coordinator_address or "
            "JAX_COORDINATOR_PORT, the same to every process."
        ) from None


def _report(place: Place, own: dict[str, Any], limit: _Limit) -> None:
    """Every other process: says what it is, and hears what the first makes of it."""
    where = f"process 0 at {place.host}:{place.port}"
    why = ""
    while True:
        try:
            loopback = is_loopback(place.host)
            if loopback and place.elsewhere:
                raise ValueError(_LOOPBACK.format(where=where, host=place.host))
            if loopback and not why:
                why = f" ({place.host} is this machine itself: wrong if process 0 runs elsewhere)"
            seconds = min(10.0, max(0.1, limit.left))
            with socket.create_connection((place.host, place.port), timeout=seconds) as peer:
                peer.sendall(strict_json.dumps(own).encode() + b"\n")
                peer.settimeout(max(0.1, limit.left) + 10.0)
                answer = _line(peer)
            break
        except OSError as error:
            reason = error.strerror or str(error)
            if limit.left <= 0:
                raise ValueError(
                    f"{where} did not answer within {limit.seconds:.0f} s (--wait_seconds): "
                    f"{reason}{why}; start it, and check its address and its port."
                ) from None
            limit.note(f"{where}: {reason}{why}")
            time.sleep(_RETRY_SECONDS)
    if answer is None or "problem" not in answer:
        raise ValueError(
            f"{where} ended, or something else answers there, before all processes had come; see "
            "what process 0 printed."
        )
    if answer["problem"]:
        raise ValueError(answer["problem"])


_LOOPBACK = (
    "{where} is on another host, but {host} resolves to this one's loopback address here, where "
    "nobody would ever answer; mend /etc/hosts, or give --coordinator_address=HOST:PORT with an "
    "address that the other hosts know."
)


def is_loopback(host: str) -> bool:
    """Whether a name is this machine itself, by all addresses that it has here.

    Raises:
      OSError: if it has none.
    """
    found = {str(info[4][0]) for info in socket.getaddrinfo(host, None)}
    return all(address.startswith("127.") or address == "::1" for address in found)


def _hello(found: dict[str, Any] | None) -> dict[str, Any] | None:
    """What a process says it is; None if it is somebody's probe."""
    if found is None or found.get("is") != _GREETING:
        return None
    try:
        return {
            "index": int(found["index"]),
            "count": int(found["count"]),
            "host": str(found["host"]),
            "facts": {str(k): str(v) for k, v in found["facts"].items()},
        }
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
        return None


def _line(peer: socket.socket) -> dict[str, Any] | None:
    """A line of JSON; None if it is none, or the other side is gone."""
    data = b""
    try:
        while not data.endswith(b"\n") and len(data) < _LINE:
            block = peer.recv(65536)
            if not block:
                return None
            data += block
    except OSError:
        return None
    return _parsed(data)


def _parsed(data: bytes) -> dict[str, Any] | None:
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None
