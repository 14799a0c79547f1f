"""One job in several processes: the same draws, the same trajectory, one folder."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from launch.job import build
from launch.stopping import EXIT_PREEMPTED
from meta_train import devices
from meta_train.checkpoint import Checkpoints
from tests import jobs, several

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.exact


def free_port():
    with socket.socket() as found:
        found.bind(("", 0))
        return found.getsockname()[1]


def start_all(count, command, num_devices):
    """The processes of ``command(port, index)``."""
    port = free_port()
    env = os.environ | {"JAX_NUM_CPU_DEVICES": str(num_devices), "PYTHONUNBUFFERED": "1"}
    return [
        subprocess.Popen(
            [sys.executable, "-m", *command(port, index)],
            cwd=ROOT,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for index in range(count)
    ]


FAST = ("pes", "hybrid", "odd")


def run_jobs(folder, count, num_devices, names):
    """Jobs of ``several.JOBS`` in so many processes; what each printed."""
    arguments = ["tests.several", folder]
    started = start_all(
        count, lambda port, i: [*arguments, str(port), str(count), str(i), *names], num_devices
    )
    printed = [process.communicate(timeout=600)[0] for process in started]
    assert [process.returncode for process in started] == [0] * count, "\n".join(printed)
    return printed


def state_of(folder, name, step):
    job = build(several.JOBS[name], None)
    checkpoints = Checkpoints(folder / name, read_only=True)
    found = checkpoints.restore(step, devices.host_like(jax.eval_shape(job.init)))
    checkpoints.close()
    return found


def theta(folder, name):
    return np.concatenate(
        [
            x.ravel()
            for _, x in sorted(load_file(folder / name / "optimizer/theta.safetensors").items())
        ]
    )


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """The jobs in this process, on one device; PES to its end."""
    folder = tmp_path_factory.mktemp("one")
    for name in FAST[:2]:
        several.run(name, folder, 1)
    return folder


@pytest.fixture(
    scope="module",
    params=[
        (2, 2),
        pytest.param((2, 1), marks=pytest.mark.slow),
        pytest.param((4, 1), marks=pytest.mark.slow),
    ],
    ids=lambda p: f"{p[0]}x{p[1]}",
)
def many(request, tmp_path_factory):
    """The jobs in several processes of some devices each."""
    folder = tmp_path_factory.mktemp("many")
    return folder, run_jobs(folder, *request.param, FAST)


def test_the_same_draws_and_trajectory(one, many, tmp_path):
    """To the bit; then on with one process."""
    folder, _ = many
    first, same = state_of(one, "pes", 10), state_of(folder, "pes", 10)
    jax.tree.map(np.testing.assert_array_equal, same, first)
    assert [row["step"] for row in jobs.rows(folder / "pes")] == list(range(1, 11))
    assert jobs.rows(folder / "pes") == jobs.rows(one / "pes")
    alone = Path(shutil.copytree(one, tmp_path / "one"))
    for where in (alone, folder):  # Both go on in this process, on other devices.
        config = jobs.changed(several.PES, num_steps=20, num_devices=4)
        assert jobs.loop.run(config, where / "pes").step == 20
    np.testing.assert_array_equal(theta(folder, "pes"), theta(alone, "pes"))


def test_hybrid_es_to_the_bit(one, many):
    """Theta, metrics and the log of seeds and costs, from which theta can be had again."""
    folder, _ = many
    np.testing.assert_array_equal(theta(folder, "hybrid"), theta(one, "hybrid"))
    assert jobs.rows(folder / "hybrid") == jobs.rows(one / "hybrid")
    logs = [(where / "hybrid" / "replay.log").read_bytes() for where in (one, folder)]
    assert logs[0] == logs[1]


@pytest.mark.slow
def test_a_mixture_across_processes(tmp_path):
    """Its parts are programs of their own, which must not meet on the network."""
    several.run("mixture", tmp_path / "one", 1)
    run_jobs(tmp_path / "many", 2, 2, ["mixture"])
    found, alone = (theta(tmp_path / where, "mixture") for where in ("many", "one"))
    np.testing.assert_array_equal(found, alone)
    assert len(jobs.rows(tmp_path / "many" / "mixture")) == 6


def test_what_one_process_refuses_all_refuse(many):
    """And only the first has files; what goes to the others keeps its bits."""
    folder, printed = many
    for said in printed:
        assert "must be a multiple of" in said
        assert "[-0.  0.]" in said
    assert not (folder / "never_made").exists()


COMMAND = [
    "--cfg.task=quadratic",
    "--cfg.optimizer=sgdm",
    "--cfg.inner.horizon=8",
    "--cfg.estimator.num_particles=8",
    "--cfg.estimator.truncation=4",
    "--cfg.num_steps=4000",
    "--cfg.checkpoint_every=100",
    "--cfg.log_every=1",
    "--cfg.eval_every=0",
    "--cfg.num_devices=1",
    "--cfg.wandb_mode=disabled",
]


def start_train(workdir, *flags, count=2):
    def command(port, index):
        place = [f"--coordinator_address=127.0.0.1:{port}", f"--num_processes={count}"]
        place += [f"--process_id={index}", "--wait_seconds=120"]
        return ["launch.train", f"--workdir={workdir}", *COMMAND, *place, *flags]

    return start_all(count, command, 1)


def ended(started, timeout=300):
    printed = [process.communicate(timeout=timeout)[0] for process in started]
    return [process.returncode for process in started], printed


def wait_for_rows(workdir, number, started):
    deadline = time.monotonic() + 300
    path = workdir / "metrics.jsonl"
    while not path.exists() or path.read_bytes().count(b"\n") < number:
        assert time.monotonic() < deadline and all(p.poll() is None for p in started)
        time.sleep(0.05)


@pytest.mark.slow
def test_a_process_that_hangs_ends_all(tmp_path):
    """Within the limit of ``several``; each says where all are."""
    started = start_all(
        2, lambda port, i: ["tests.several", tmp_path, str(port), "2", str(i), "hangs"], 1
    )
    codes, printed = ended(started)
    assert codes == [EXIT_PREEMPTED] * 2
    limit = f"the job has stood still for {several.STALL_SECONDS} s (--stall_seconds)"
    assert any(limit in said for said in printed)
    for said in printed:  # The later one may hear first that the other has ended.
        if limit not in said:
            assert "lost another one" in said
            continue
        assert re.search(r"process 0 on \S+ is after .*, waiting for JAX\n", said)
        assert re.search(
            r"process 1 on \S+ is after outer step 3 in _run \(.*loop.py:\d+\)\n", said
        )


@pytest.mark.slow
def test_a_job_that_loses_a_process_ends_and_continues(tmp_path):
    """Killed or told to stop, whichever process: the same command goes on, to the same bits."""
    assert ended(start_train(tmp_path / "whole"))[0] == [0, 0]
    workdir = tmp_path / "job"
    started = start_train(workdir)
    wait_for_rows(workdir, 150, started)
    began = time.monotonic()
    started[1].kill()
    codes, printed = ended(started)
    assert codes[0] == EXIT_PREEMPTED and time.monotonic() - began < 60
    assert "lost another one" in printed[0] and "run the same command" in printed[0]

    started = start_train(workdir)
    wait_for_rows(workdir, 500, started)
    started[0].kill()
    # Over the network first, and ours; or by the coordination service, with JAX's own message.
    codes, printed = ended(started)
    assert codes[1] in (EXIT_PREEMPTED, -signal.SIGABRT)
    assert "lost another one" in printed[1] or "another task died" in printed[1]

    started = start_train(workdir)
    wait_for_rows(workdir, 900, started)
    started[1].send_signal(signal.SIGTERM)
    codes, printed = ended(started)
    assert codes == [EXIT_PREEMPTED] * 2
    steps = [said.rpartition("outer step ")[2].partition(";")[0] for said in printed]
    assert steps[0] == steps[1] != ""

    assert ended(start_train(workdir))[0] == [0, 0]
    np.testing.assert_array_equal(theta(tmp_path, "job"), theta(tmp_path, "whole"))
    assert jobs.rows(workdir) == jobs.rows(tmp_path / "whole")


@pytest.mark.slow
def test_processes_of_other_commands_are_refused_by_the_command(tmp_path):
    def command(port, index):
        place = [f"--coordinator_address=127.0.0.1:{port}", "--num_processes=2"]
        place += [f"--process_id={index}", f"--cfg.seed={index}"]
        return ["launch.train", f"--workdir={tmp_path / 'job'}", *COMMAND, *place]

    codes, printed = ended(start_all(2, command, 1))
    assert codes == [2, 2]
    assert all("--cfg.seed is 1 there, 0 in process 0" in said for said in printed)
    assert not (tmp_path / "job").exists()


def test_what_is_sent_in_a_step_does_not_grow_with_the_population():
    """In the compiled program: a gradient and a few numbers, once, whatever the population."""
    from launch.benchmarks.scale import bytes_exchanged

    sizes = [
        bytes_exchanged(
            build(
                jobs.changed(
                    several.PES,
                    num_devices=4,
                    estimator=several.cfg.estimator("pes", num_particles=n, truncation=4),
                ),
                None,
            )
        )
        for n in (8, 64)
    ]
    assert sizes[0] == sizes[1] > 0
