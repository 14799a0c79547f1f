"""Which of several processes this is, and what they ask of each other before JAX joins them."""

import json
import math
import socket
import threading
import time

import jax
import pytest

from launch import config as cfg
from launch import hosts, rendezvous
from launch.held_arrays import digest_of_arrays
from launch.hosts import Place, find_place
from meta_train import devices, processes
from tests.test_processes import free_port

SLURM = {
    "SLURM_JOB_ID": "4100",
    "SLURM_STEP_NODELIST": "gpu[007-009,012],big1",
    "SLURM_NNODES": "4",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "2",
    "SLURM_LOCALID": "0",
    "SLURM_STEP_TASKS_PER_NODE": "1(x4)",
    "SLURMD_NODENAME": "gpu009",
}
JAX = {"JAX_COORDINATOR_ADDRESS": "h:1", "JAX_NUM_PROCESSES": "3", "JAX_PROCESS_ID": "2"}


@pytest.mark.parametrize(
    ("environ", "flags", "place"),
    [
        ({}, (None, None, None), None),
        ({}, ("h:1", 2, 1), Place("h", 1, 2, 1)),
        ({}, ("[::1]:9", 2, 0), Place("::1", 9, 2, 0)),
        (JAX, (None, None, None), Place("h", 1, 3, 2)),
        (JAX, (None, None, 0), Place("h", 1, 3, 0)),  # A flag counts more.
        (
            JAX | {"JAX_COORDINATOR_ADDRESS": "h", "JAX_COORDINATOR_PORT": "7"},
            (None,) * 3,
            Place("h", 7, 3, 2),
        ),
        (JAX | SLURM, (None, 1, None), None),
        (SLURM, (None,) * 3, Place("gpu007", 61440 + 4, 4, 2, None, True)),
        (SLURM | {"JAX_COORDINATOR_PORT": "5"}, (None,) * 3, Place("gpu007", 5, 4, 2, None, True)),
        (
            SLURM
            | {
                "SLURM_STEP_NODELIST": "n1,n2",
                "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
                "SLURM_LOCALID": "1",
                "SLURMD_NODENAME": "n1",
            },
            (None,) * 3,
            Place("n1", 61440 + 4, 4, 2, 1, False),
        ),
        (
            SLURM | {"SLURM_STEP_NODELIST": "rack[2-3]n[07-09,12].a,b[1-2]"},
            (None,) * 3,
            Place("rack2n07.a", 61440 + 4, 4, 2, None, True),
        ),
        ({}, ("[fe80::1%eth0]:9", 2, 0), Place("fe80::1%eth0", 9, 2, 0)),
        ({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "1"}, (None,) * 3, None),  # As in `srun --pty`.
        ({"SLURM_JOB_ID": "1"}, (None,) * 3, None),
    ],
)
def test_the_place_of_a_process(environ, flags, place):
    assert find_place(environ, *flags) == place


@pytest.mark.parametrize(
    ("environ", "flags", "words"),
    [
        ({}, ("h:1", None, 0), "--num_processes must be given"),
        ({"JAX_PROCESS_ID": "1"}, (None,) * 3, "--coordinator_address and --num_processes must"),
        *[
            ({}, (address, 2, 0), "must be HOST:PORT, or .* got ")
            for address in ("h", "h:5:6", "::1:5", "[::1", "h:", ":5", "a b:5", "h:x")
        ],
        ({}, ("h:0", 2, 0), "a port between 1 and 65535, got 'h:0'"),
        ({}, ("h:70000", 2, 0), "a port between 1 and 65535, got 'h:70000'"),
        ({"JAX_COORDINATOR_PORT": "2"}, ("h:1", 2, 0), "another port than JAX_COORDINATOR_PORT=2"),
        ({"JAX_COORDINATOR_PORT": "x"}, ("h", 2, 0), "JAX_COORDINATOR_PORT must be a whole number"),
        ({"JAX_COORDINATOR_PORT": "70000"}, ("h", 2, 0), "between 1 and 65535, got 70000"),
        ({}, ("h:1", 2, 2), "--process_id must be between 0 and 1, .* got 2"),
        ({}, ("h:1", -2, 0), "--num_processes .* must be at least 1, got -2"),
        ({}, ("h:1", 0, 0), "--num_processes .* must be at least 1, got 0"),
        (
            {"JAX_NUM_PROCESSES": "0"},
            ("h:1", None, 0),
            "JAX_NUM_PROCESSES. must be at least 1, .* 0",
        ),
        *(
            (SLURM | {name: "x"}, (None,) * 3, f"{name} must be a whole number, got 'x'")
            for name in ("SLURM_JOB_ID", "SLURM_NTASKS", "SLURM_PROCID")
        ),
        *(
            ({k: v for k, v in SLURM.items() if k != name}, (None,) * 3, f"{name} is missing.*srun")
            for name in ("SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")
        ),
    ],
)
def test_a_place_that_is_not_clear_is_refused(environ, flags, words):
    with pytest.raises(ValueError, match=words):
        find_place(environ, *flags)


def meet(places, facts, seconds=20.0):
    """What each of the processes, threads here, ends with: None or a message."""
    ended: dict[int, str | None] = {}

    def one(number):
        try:
            rendezvous.meet(places[number], facts[number], seconds)
            ended[number] = None
        except ValueError as error:
            ended[number] = str(error)

    threads = [threading.Thread(target=one, args=(n,)) for n in range(len(places))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [ended[n] for n in range(len(places))]


def places(count, *indices):
    port = free_port()
    return [Place("127.0.0.1", port, count, index) for index in indices or range(count)]


def test_processes_that_run_the_same_meet_and_leave_the_port_free():
    found = places(3)
    assert meet(found, [{"x": "1"}] * 3) == [None] * 3
    with socket.create_server(("127.0.0.1", found[0].port)):
        pass


def test_processes_that_differ_are_told_in_what():
    ours = hosts.facts(cfg.Config())
    theirs = hosts.facts(cfg.Config(seed=1)) | {"the version of jax": "0.0"}
    for said in meet(places(3), [ours, ours, theirs]):
        assert "process 2 on" in said
        assert f"the version of jax is 0.0 there, {jax.__version__} in process 0" in said
        assert "--cfg.seed is 1 there, 0 in process 0" in said


def test_flags_of_xla_are_compared(monkeypatch):
    ours = hosts.facts(cfg.Config())
    monkeypatch.setenv("XLA_FLAGS", "--xla_nonsense=1")
    for said in meet(places(2), [ours, hosts.facts(cfg.Config())]):
        assert "XLA_FLAGS is '--xla_nonsense=1' there" in said


def test_everyone_hears_who_did_not_come():
    for said in meet(places(4, 0, 2), [{}] * 2, seconds=0.6):
        assert "processes 1, 3 of 4 did not come" in said
        assert "within 1 s (--wait_seconds)" in said
    (alone,) = meet(places(2, 1), [{}], seconds=0.3)
    assert "did not answer within 0 s" in alone and "this machine itself" in alone


def test_two_with_one_number_and_other_counts_are_refused():
    for said in meet(places(3, 0, 1, 1), [{}] * 3):
        assert "process 1 of 3 came from" in said
    found = places(2)
    for said in meet([found[0], found[1]._replace(size=2, rank=1)], [{"a": "1"}, {}]):
        assert "a is None there, 1 in process 0" in said


def test_a_port_that_is_taken_is_named():
    (first,) = places(2, 0)
    with socket.create_server(("", first.port), family=socket.AF_INET6, dualstack_ipv6=True):
        (said,) = meet([first], [{}])
    assert f"port {first.port} of this host" in said and "JAX_COORDINATOR_PORT" in said


def test_what_is_no_process_of_ours_is_not_counted():
    """A probe at the first process's port; another program where the first should be."""
    found = places(2)
    probe = threading.Timer(
        0.1, lambda: socket.create_connection(("127.0.0.1", found[0].port)).close()
    )
    probe.start()
    assert meet(found[:1], [{}], seconds=1.0)[0].startswith("process 1 of 2 did not come")
    (second,) = places(2, 1)
    with socket.create_server(("127.0.0.1", second.port)) as other:
        threading.Thread(target=lambda: other.accept()[0].sendall(b"HTTP/1.1 400\n")).start()
        (said,) = meet([second], [{}])
    assert "something else answers there" in said


def connected(place):
    """A connection to the first process, as soon as it listens."""
    for _ in range(300):
        try:
            return socket.create_connection((place.host, place.port), timeout=5)
        except ConnectionRefusedError:
            time.sleep(0.01)
    raise ConnectionRefusedError


def hello(index, count):
    said = {"is": "learned-opt", "index": index, "count": count, "host": "far", "facts": {}}
    return json.dumps(said).encode() + b"\n"


def test_strangers_at_the_port_keep_nobody_waiting():
    """Silent ones, half a word, deep and endless JSON, numbers that are none, probes."""
    found, ended = places(2), []
    first = threading.Thread(target=lambda: ended.extend(meet(found[:1], [{}], seconds=20.0)))
    first.start()
    strangers = [connected(found[0]) for _ in range(20)]
    said = (
        b"[" * 300_000 + b"\n",
        hello(math.inf, 2),
        hello(math.inf, 2).replace(b"Infinity", b"1e999"),
        b"GET / HTTP/1.1\r\n\r\n",
        b'{"is": ',
    )
    for peer, words in zip(strangers, said, strict=False):
        peer.sendall(words)
    for _ in range(200):
        connected(found[0]).close()
    began = time.monotonic()
    assert meet(found[1:], [{}]) == [None]
    assert time.monotonic() - began < 8
    first.join()
    assert ended == [None]
    for peer in strangers:
        peer.close()


def test_a_process_that_went_away_is_missed_and_may_come_again():
    """As one that was stopped and started anew while the others wait."""
    found = places(3)
    first = threading.Thread(target=lambda: ended.extend(meet(found[:1], [{}], seconds=20.0)))
    ended: list[str | None] = []
    first.start()
    with connected(found[0]) as gone:
        gone.sendall(hello(1, 3))
        time.sleep(0.2)
    assert meet(found[1:], [{}] * 2) == [None] * 2
    first.join()
    assert ended == [None]

    found = places(3)
    first = threading.Thread(target=lambda: ended.extend(meet(found[:1], [{}], seconds=1.5)))
    first.start()
    with connected(found[0]) as gone:
        gone.sendall(hello(1, 3))
        time.sleep(0.2)
    (said,) = meet(found[2:], [{}])
    first.join()
    assert said == ended[-1] and said.startswith("process 1 of 3 did not come")


def test_a_first_process_elsewhere_that_resolves_to_this_machine():
    place = Place("localhost", 1, 2, 1, elsewhere=True)
    (said,) = meet([place], [{}])
    assert "resolves to this one's loopback address" in said
    assert not rendezvous.is_loopback("192.0.2.1")


def test_the_digest_sees_every_array_that_functions_hold():
    def held(array):
        return [(lambda x, part={"deep": (array,)}: x + part["deep"][0]).__call__]

    one, same, other = (digest_of_arrays(held(jax.numpy.arange(n))) for n in (3, 3, 4))
    assert one == same != other
    # Those of a task, which its functions close over.
    tables = [
        cfg.task("mlp", dataset=name).make(None) for name in ("wine", "wine", "breast_cancer")
    ]
    one, same, other = map(digest_of_arrays, tables)
    assert one == same != other


def test_processes_with_unequal_devices_are_refused(monkeypatch):
    monkeypatch.setattr(devices.jax, "process_count", lambda: 2)
    monkeypatch.setattr(devices.jax, "local_devices", lambda index=0: [None] * (2 + index))
    with pytest.raises(ValueError, match=r"as many devices as the others, got \[2, 3\]"):
        devices.check_equal_processes()


def test_a_population_that_does_not_divide_over_processes(monkeypatch):
    monkeypatch.setattr(devices.jax, "process_count", lambda: 3)
    with pytest.raises(
        ValueError, match=r"over 6 devices \(3 processes with 2 each\).* 12, got 16\. .*: 12 and 24"
    ):
        devices.choose_num_devices(2, 8, "num_particles", 2)
    with pytest.raises(ValueError, match=r"over 3 devices .*or number of processes"):
        devices.choose_num_devices(0, 8)
    assert devices.choose_num_devices(0, 24) == 4
    assert devices.choose_num_devices(0, 9) == 3


def test_one_process_does_not_ask_jax_how_many_there_are(monkeypatch):
    """Its answer would start the backend, and so fix the number of CPU devices."""

    def started():
        raise AssertionError("JAX was asked")

    monkeypatch.setattr("jax.process_count", started)
    monkeypatch.setattr("jax.process_index", started)
    assert processes.count() == 1 and processes.is_first() and not processes.several()
    assert processes.first_does(lambda: 3) == 3 and processes.first_says({"a": 1}) == {"a": 1}
    with pytest.raises(ValueError, match="no"):
        processes.together(lambda: int("no"))
