"""Jobs that cannot be lost: full disks, signals, dead helpers, stolen folders, malformed files."""

import errno
import fcntl
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import learned_opt
from launch import choices, command_line, hosts, lease, loop, workdir
from launch import config as cfg
from launch.command_line import EXIT_DISK
from launch.stopping import EXIT_PREEMPTED
from launch.train import exit_code
from learned_opt import LearnedOptimizer, OptimizerConfig
from learned_opt.named import check_named
from meta_train import devices, estimators, journal, tracking, wandb_run
from meta_train.checkpoint import Checkpoints, UnreadableError
from tests import fuzz, jobs, systems

ROOT = Path(__file__).parent.parent


@pytest.fixture
def toys(monkeypatch):
    """Jobs of this process are toys: with everything but inner training."""
    monkeypatch.setattr(loop, "build", jobs.toy)


def script(text, *words, command=(sys.executable,)):
    """A Python program, which has ``jobs``, ``loop`` and ``sys`` and runs toys."""
    head = """
        import os, sys, time
        from pathlib import Path
        from launch import loop, stopping
        from meta_train import devices
        from tests import jobs
        loop.build = jobs.toy
    """
    source = textwrap.dedent(head) + textwrap.dedent(text)
    return subprocess.Popen(
        [*command, "-c", source, *map(str, words)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


# Signals.


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_stops_after_the_running_step(number, tmp_path, monkeypatch, capfd):
    def build(config, data_dir=None):
        job = jobs.toy(config)

        def evaluate(theta):
            os.kill(os.getpid(), number)
            return job.evaluate(theta)

        return job._replace(evaluate=evaluate)

    monkeypatch.setattr(loop, "build", build)
    before = signal.getsignal(number)
    outcome = jobs.run(tmp_path, num_steps=50, eval_every=7)
    assert (outcome.step, outcome.preempted) == (7, True)
    assert exit_code(outcome) == EXIT_PREEMPTED
    assert (tmp_path / "checkpoints" / "7").is_dir() and len(jobs.rows(tmp_path)) == 7
    assert signal.getsignal(number) is before
    said = capfd.readouterr().err
    assert (
        f"{signal.Signals(number).name}: the running step is finished, then all is saved." in said
    )


def test_a_signal_is_heard_while_a_program_compiles(tmp_path):
    """Python hears of no signal meanwhile; here it is in a step that takes a minute."""
    process = script(
        """
        stopping.GRACE_SECONDS = 0.5
        def build(config, data_dir=None):
            return jobs.toy(config)._replace(evaluate=lambda theta: hang())
        def hang():  # Outside of the interpreter, as compiling is.
            print("busy", flush=True)
            import ctypes
            ctypes.CDLL(None).sleep(60) and ctypes.CDLL(None).sleep(60)
        loop.build = build
        jobs.run(Path(sys.argv[1]), num_steps=50, eval_every=6)
        """,
        tmp_path / "job",
    )
    assert process.stdout.readline() == "busy\n", process.communicate()[1]
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=30)[1]
    assert process.returncode == EXIT_PREEMPTED and time.monotonic() - began < 20
    assert "still compiling or in one step. Saved is outer step 4; run again to continue." in said
    assert "Traceback" not in said


def test_a_signal_while_importing(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-m", "launch.train", f"--workdir={tmp_path / 'job'}"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    maps = Path(f"/proc/{process.pid}/maps")
    while process.poll() is None and "jaxlib" not in maps.read_text():
        time.sleep(0.005)
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == EXIT_PREEMPTED and not (tmp_path / "job").exists()
    assert said == "\nSIGTERM: stopped; run again to continue.\n"


# A full disk.


def test_a_journal_waits_for_room(tmp_path):
    """With the system's limit on the size of a file: a part of an entry fits, and is taken back."""
    path = tmp_path / "log"
    log = journal.Journal(path, None, lambda data: journal.Salvage(b"", True))
    log.append(b"one\n")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (6, hard))
        for entry in (b"two\n", b"3\n"):
            log.append(entry)  # The second would fit, but comes after the first.
            assert path.read_bytes() == b"one\n" and log.mark()["bytes"] == 4
            assert log.problem == f"{path}: {os.strerror(log_error(log))}"
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert log.flush() == "" and path.read_bytes() == b"one\ntwo\n3\n"
    log.close()


def log_error(log):
    """Of a file that is too large; where a part could be written first, as of a full disk."""
    found = [number for number in (errno.EFBIG, errno.ENOSPC) if os.strerror(number) in log.problem]
    assert found, log.problem
    return found[0]


SMALL_DISK = """
    from launch.saves import Saves

    disk, full, free = Path(sys.argv[1]), *map(int, sys.argv[2:])
    calls, save = 0, Saves.save

    def counted(self, *given):
        global calls
        calls += 1
        self.wait()  # What a save that is under way has taken is not room for the next one.
        if calls == full:
            with open(disk / "filler", "wb", buffering=0) as file:
                try:
                    while file.write(bytes(4096)):
                        pass
                except OSError:
                    pass
        if calls == free:
            (disk / "filler").unlink()
        return save(self, *given)

    Saves.save = counted
    outcome = jobs.run(disk / "job", num_steps=60)
    from launch.train import exit_code
    names = [p.name for p in (disk / "job" / "checkpoints").iterdir()]
    steps = sorted(int(name) for name in names if name.isdigit())
    print(exit_code(outcome), outcome.step, len(jobs.rows(disk / "job")), *steps)
"""


def on_a_small_disk(folder, full, free):
    """A job on a disk of a megabyte that is full from one save, and has room again from another."""
    mounted = f'mount -t tmpfs -o size=1m tmpfs "{folder}" && exec "$0" "$@"'
    unshare = ["unshare", "-m"] if os.geteuid() == 0 else ["unshare", "-Urm"]
    command = (*unshare, "sh", "-c", mounted, sys.executable)
    if subprocess.run([*command[:-1], "true"], capture_output=True).returncode:
        pytest.skip("no disk can be mounted here: neither the superuser's nor a user's own")
    process = script(SMALL_DISK, folder, full, free, command=command)
    out, said = process.communicate(timeout=300)
    assert process.returncode == 0 and "Traceback" not in said, said
    return out.split(), said


def test_a_full_disk_stops_no_job(tmp_path):
    (*ended, a, b, c), said = on_a_small_disk(tmp_path, 4, 7)
    assert ended == ["0", "60", "60"] and [a, b, c] == ["52", "56", "60"]
    (line,) = [line for line in said.splitlines() if line.startswith("warning: ")]
    assert line.startswith("warning: outer step 12 could not be saved (No space left on device).")
    assert [line for line in said.splitlines() if line.startswith("note: saved")] == [
        "note: saved again, at outer step 24."
    ]


def test_a_disk_that_stays_full_is_an_exit_code(tmp_path):
    (*ended, last), said = on_a_small_disk(tmp_path, 4, 0)
    assert ended[:2] == [str(EXIT_DISK), "60"] and last == "8"
    assert int(last) <= int(ended[2]) <= 60  # Some rows may have found no room.
    assert "error: the state of outer step 60 could not be saved (No space left on device)" in said


def test_messages_on_a_full_disk_are_lost_not_fatal(capsys):
    full = command_line._Forgiving(open("/dev/full", "w", buffering=1))  # noqa: SIM115
    assert full.write("a line\n") == 7 and not full.isatty()
    full.flush()
    broken = types.SimpleNamespace(write=lambda text: os.write(-1, b""))
    with pytest.raises(OSError, match="Bad file descriptor"):
        command_line._Forgiving(broken).write("")
    with pytest.raises(SystemExit) as stopped, command_line.messages():
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "runs/mine/config.json")
    assert stopped.value.code == EXIT_DISK
    assert "cannot be written at runs/mine/config.json (No space left" in capsys.readouterr().err
    with pytest.raises(PermissionError), command_line.messages():
        raise PermissionError(errno.EACCES, "x")


# Weights & Biases.


def tracked(folder, mode="offline"):
    return tracking.Tracker(
        folder, config={}, run_id="abcd1234", start_step=0, num_steps=9, project="p", mode=mode
    )


# What others do to the folder while a job runs.


def test_a_journal_that_is_removed_or_replaced_is_written_again(tmp_path, capfd):
    path = tmp_path / "log"
    log = journal.Journal(path, None, lambda data: journal.Salvage(b"", True))
    log.append(b"one\n")
    path.unlink()
    log.append(b"two\n")
    assert path.read_bytes() == b"one\ntwo\n" and log.mark()["bytes"] == 8
    path.rename(tmp_path / "elsewhere")
    path.write_bytes(b"of somebody else")
    log.append(b"three\n")
    assert path.read_bytes() == b"one\ntwo\nthree\n"
    assert (tmp_path / "log.damaged").read_bytes() == b"of somebody else"
    assert capfd.readouterr().err.count("was removed or replaced; it is written again.") == 2
    shutil.rmtree(tmp_path)
    log.append(b"four\n")
    assert log.problem == f"{path}: No such file or directory"
    log.close()


def test_a_lock_that_is_removed_is_made_again_and_a_folder_that_is_gone_is_lost(tmp_path):
    with lease.claim(tmp_path / "job") as mine:
        (tmp_path / "job" / "lock").unlink()
        assert not mine.is_lost() and (tmp_path / "job" / "lock").exists()
        with (
            pytest.raises(ValueError, match="is in use by another process"),
            lease.claim(tmp_path / "job"),
        ):
            pass
        assert not mine.is_lost()
        (tmp_path / "job").rename(tmp_path / "moved")
        assert mine.is_lost()
        with pytest.raises(ValueError, match="was removed or renamed while this process wrote"):
            mine.refuse_if_lost()


def test_a_job_whose_folder_is_removed_ends_and_leaves_nothing(tmp_path):
    """Nor does it write into the folder of a job that begins there."""
    process = script(
        """
        add = loop.Pending.add

        def counted(self, step, metrics):
            if step == 30:
                while list(Path(sys.argv[1]).glob("checkpoints/*tmp*")):
                    time.sleep(0.01)  # What is half-written would go on where it was.
                Path(sys.argv[1]).rename(sys.argv[2])
            add(self, step, metrics)

        loop.Pending.add = counted
        jobs.run(Path(sys.argv[1]), num_steps=200)
        """,
        tmp_path / "job",
        tmp_path / "moved",
    )
    _, said = process.communicate(timeout=300)
    assert process.returncode == 1 and "was removed or renamed while this process wrote" in said
    assert not (tmp_path / "job").exists() and jobs.rows(tmp_path / "moved")


def test_a_checkpoint_under_another_name_is_set_aside(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(loop, "build", jobs.toy)
    jobs.run(tmp_path / "whole", num_steps=20)
    jobs.run(tmp_path / "job", num_steps=12)
    (tmp_path / "job/checkpoints/12").rename(tmp_path / "job/checkpoints/19")
    jobs.run(tmp_path / "job", num_steps=20)
    said = capfd.readouterr().err
    assert "checkpoint 19 holds outer step 12: its folder was renamed or copied" in said
    assert jobs.rows(tmp_path / "job") == jobs.rows(tmp_path / "whole")
    assert (tmp_path / "job/damaged/19").is_dir()


def test_a_full_disk_is_said_by_every_process(capsys):
    error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "runs/mine/config.json")
    assert hosts._say_end(error, 75) == EXIT_DISK
    assert "cannot be written at runs/mine/config.json (No space left" in capsys.readouterr().err


@pytest.mark.parametrize("fault", ["killed", "deleted"])
def test_wandb_is_lost_and_the_job_is_not(fault, tmp_path, capfd):
    tracker = tracked(tmp_path)
    deadline = time.monotonic() + 120
    while not tracker.wandb_dir:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    if fault == "killed":
        helpers = wandb_run._children("wandb-core")
        assert helpers
        for helper in helpers:
            os.kill(helper, signal.SIGKILL)
        time.sleep(0.5)
    else:
        shutil.rmtree(tmp_path / "wandb")
    for step in range(1, 10):
        tracker.log({"step": step, "meta_loss": 0.5})
        time.sleep(0.02)
    tracker.close(30.0)
    assert [row["step"] for row in jobs.rows(tmp_path)] == list(range(1, 10))
    said = capfd.readouterr().err
    assert said.count("warning: W&B: ") == 1 and "metrics.jsonl has every row" in said
    assert "Traceback" not in said


class Wandb(types.SimpleNamespace):
    """As much of W&B as a run needs, with a fault."""

    def __init__(self, folder, fault):
        super().__init__(fault=fault, folder=folder, modes=[], rows=[], over=threading.Event())

    Settings = staticmethod(lambda **options: options)

    def init(self, mode, **options):
        self.modes.append(mode)
        if mode == "online" and self.fault == "unreachable":
            raise ConnectionError("no route to host\nmore of it")
        (self.folder / "run" / "files").mkdir(parents=True)
        nothing = lambda *a, **k: None  # noqa: E731
        return types.SimpleNamespace(
            dir=str(self.folder / "run" / "files"),
            disabled=False,
            define_metric=nothing,
            log=self._log,
            finish=nothing,
        )

    def _log(self, row, step):
        if self.fault == "hanging":
            self.over.wait(60)
        self.rows.append((row["step"], step))

    def teardown(self):
        pass


@pytest.mark.parametrize("fault", ["unreachable", "hanging"])
def test_wandb_that_does_not_answer_delays_nothing(fault, tmp_path, monkeypatch, capsys):
    fake = Wandb(tmp_path, fault)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    tracker = tracked(tmp_path, "online")
    began = time.monotonic()
    for step in range(1, 10):
        tracker.log({"step": step, "meta_loss": 0.5})
    if fault == "hanging":
        threading.Timer(0.6, fake.over.set).start()
    tracker.close(0.2 if fault == "hanging" else 30.0)
    assert time.monotonic() - began < 10 and len(jobs.rows(tmp_path)) == 9
    said = capsys.readouterr().err
    assert said.count("warning: W&B") == 1
    if fault == "unreachable":
        assert fake.modes == ["online", "offline"] and fake.rows == [(i, i) for i in range(1, 10)]
        assert "cannot be reached (no route to host). Training goes on, tracked offline" in said
    else:
        assert "it was not done after 0 s. Training goes on" in said
        assert fake.rows in ([], [(1, 1)])  # The one it hung at; no other after it.


# Whose folder it is.


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(lease, "BEAT_SECONDS", 0.02)
    monkeypatch.setattr(lease, "WATCH_SECONDS", 0.5)


def no_locks(monkeypatch):
    def flock(file, kind):
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr(fcntl, "flock", flock)


def of_another_machine(lock, **changes):
    found = {"host": "far", "pid": 7, "machine": "far 1", "started": "1", "token": "x", "beats": 1}
    lock.write_text(json.dumps(found | changes))


def test_the_lock_says_whose_it_is(quick, tmp_path):
    lock = tmp_path / "lock"
    with lease.claim(tmp_path):
        first = json.loads(lock.read_text())
        assert first["pid"] == os.getpid() and first["host"] and not first["released"]
        with pytest.raises(ValueError, match=rf"in use by another process \({os.getpid()} on "):
            lease.claim(tmp_path).__enter__()
        deadline = time.monotonic() + 10
        while json.loads(lock.read_text())["beats"] == first["beats"]:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    assert json.loads(lock.read_text())["released"]


@pytest.mark.parametrize("locks", [True, False])
def test_a_living_process_of_another_machine_is_noticed(
    locks, quick, tmp_path, monkeypatch, capsys
):
    """Where there are no locks, or locks of this machine only."""
    if not locks:
        no_locks(monkeypatch)
    lock = tmp_path / "lock"
    of_another_machine(lock)
    threading.Timer(0.2, of_another_machine, (lock,), {"beats": 2}).start()
    with pytest.raises(ValueError, match=r"is in use by another process \(7 on far\)"):
        lease.claim(tmp_path).__enter__()
    assert "looking for 0 s whether it is" in capsys.readouterr().err.replace("0.5", "0")
    with lease.claim(tmp_path) as held:  # No sign of life in all the time: it was killed.
        assert not held.lost
    of_another_machine(lock, released=True)
    began = time.monotonic()
    with lease.claim(tmp_path):
        assert time.monotonic() - began < 0.4


def test_without_locks_the_processes_of_this_machine_are_known(quick, tmp_path, monkeypatch):
    no_locks(monkeypatch)
    with lease.claim(tmp_path), pytest.raises(ValueError, match=f"{os.getpid()} on "):
        lease.claim(tmp_path).__enter__()
    dead = subprocess.Popen(["true"])
    dead.wait()
    found = lease._this_process() | {"pid": dead.pid, "token": "x"}
    (tmp_path / "lock").write_text(json.dumps(found))
    began = time.monotonic()
    with lease.claim(tmp_path):
        assert time.monotonic() - began < 0.4


def test_a_process_whose_folder_was_taken_over_ends(quick, tmp_path, monkeypatch):
    """It was suspended, and another began meanwhile; what that one does stays as it is."""

    def build(config, data_dir=None):
        job = jobs.toy(config)

        def evaluate(theta):
            for _ in range(5):  # It shows signs of life too; one may be written over.
                of_another_machine(tmp_path / "lock")
                time.sleep(0.04)
            return job.evaluate(theta)

        return job._replace(evaluate=evaluate)

    monkeypatch.setattr(loop, "build", build)
    with pytest.raises(ValueError, match=r"was taken over by another process \(7 on far\)"):
        jobs.run(tmp_path, num_steps=50, eval_every=6)
    assert json.loads((tmp_path / "lock").read_text())["host"] == "far"
    assert workdir.find_start(tmp_path).step == 4


# Files are data.


class Ours(OptimizerConfig):
    pass


def says(rate: float = 0.1) -> LearnedOptimizer:
    raise AssertionError(rate)


def says_nothing(rate=0.1):
    raise AssertionError(rate)


def says_another(rate=0.1) -> int:
    raise AssertionError(rate)


def test_what_a_file_may_name():
    kinds = (LearnedOptimizer, OptimizerConfig)
    for thing in (Ours, says, says_nothing):
        check_named(f"{__name__}:{thing.__name__}", thing, kinds)
    for name, thing in {
        "os:abort": os.abort,
        "os:getcwd": os.getcwd,
        "shutil:rmtree": shutil.rmtree,
        "jax:jit": jax.jit,
        "builtins:exec": exec,
        "subprocess:Popen": subprocess.Popen,
        "os:environ": os.environ,
        "numpy:save": np.save,
        f"{__name__}:says_another": says_another,
        "elsewhere:says_nothing": says_nothing,
    }.items():
        with pytest.raises(ValueError, match=f"is '{name}', which a file may not name: it must be"):
            check_named(name, thing, kinds)


@pytest.mark.parametrize("name", ["os:abort", "os:getcwd", "subprocess:Popen", "sys:exit"])
def test_no_file_makes_anything_run(name, tmp_path):
    for kind in ("task", "optimizer", "estimator", "meta"):
        tree = choices.to_dict(jobs.SMALL) | {kind: {"name": name}}
        with pytest.raises(ValueError, match=name):
            cfg.read_config(tree)
    theta = learned_opt.OPTIMIZERS["sgdm"]().init(jax.random.key(0))
    learned_opt.save(tmp_path, "sgdm", {}, theta)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text()) | {"name": name}
    config["sha256"]["config.json"] = learned_opt.weights._config_digest(config)
    path.write_text(learned_opt.weights._rendered(config))
    with pytest.raises(ValueError, match=f"`name` is '{name}', which a file may not name"):
        learned_opt.load(tmp_path)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "build", jobs.toy)
        jobs.run(folder, num_steps=4, eval_every=0)
    return folder


def test_reading_a_job_runs_and_unpickles_nothing(saved):
    like = devices.host_like(jax.eval_shape(jobs.toy(jobs.SMALL).init))
    with fuzz.watched():
        assert workdir.find_start(saved, like).step == 4
        learned_opt.load("controller")
        with pytest.raises(AssertionError, match=r"ran os\.system"):
            os.system("true")


def test_arrays_of_other_shapes_are_refused_before_they_are_read(saved):
    like = devices.host_like(jax.eval_shape(jobs.toy(jobs.SMALL).init))
    checkpoints = Checkpoints(saved, read_only=True)
    assert checkpoints.restore(4, like).theta.shape == (3,)
    for theta in (np.zeros(5, np.float32), np.zeros(3, np.float64), np.zeros((3, 1), np.float32)):
        with pytest.raises(UnreadableError, match=r"another job: theta is float32\[3\], where"):
            checkpoints.restore(4, like._replace(theta=theta))


def test_digests_of_files_outside_are_not_asked(saved, tmp_path):
    copy = shutil.copytree(saved, tmp_path / "job")
    digests = copy / "checkpoints" / "4" / "SHA256SUMS"
    lines = digests.read_text().splitlines()
    for outside in ("../../metrics.jsonl", "/dev/zero"):
        found = [*lines[:-1], lines[-1].split("  ")[0] + f"  {outside}"]
        digests.write_text("\n".join([*found, ""]))
        assert workdir.find_start(copy).unreadable[4].endswith("SHA256SUMS names a file outside")


@pytest.mark.parametrize("kind", fuzz.KINDS)
def test_malformed_input(kind, tmp_path):
    """A thousand, over all kinds."""
    assert not fuzz.fuzz(kind, round(1_000 * fuzz.KINDS[kind].share), tmp_path, seed=1)


@pytest.mark.slow
@pytest.mark.parametrize("kind", fuzz.KINDS)
def test_much_malformed_input(kind, tmp_path):
    assert not fuzz.fuzz(kind, round(100_000 * fuzz.KINDS[kind].share), tmp_path)


# Kills.


def soak(folder, kills, *flags):
    return subprocess.run(
        [sys.executable, "-m", "tests.soak", f"--workdir={folder}", f"--kills={kills}", *flags],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )


def test_killed_four_times(tmp_path):
    done = soak(tmp_path, 4, "--cases=toy")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "| all | 4 | " in done.stdout


@pytest.mark.slow
def test_killed_five_hundred_times(tmp_path):
    done = soak(tmp_path, 500)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_one_of_two_processes_killed_ten_times(tmp_path):
    done = soak(tmp_path, 10, "--cases=tbptt", "--processes=2")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "| all | 10 | " in done.stdout


# Particles.


@pytest.mark.parametrize("fault", [np.nan, 1e38])
@pytest.mark.parametrize("name", ["pes", "tbptt"])
def test_a_particle_that_diverges_takes_nothing_from_the_others(name, fault):
    """Without it and with it alone, the meta-gradients add up to that of all."""
    system, theta = systems.nonlinear(0)
    size = {"pes": {"num_pairs": 8, "sigma": 0.1}, "tbptt": {"num_particles": 8}}[name]
    estimator = getattr(estimators, name)(
        system, truncation=3, horizons=estimators.fixed_horizon(6), **size
    )
    estimate = jax.jit(estimator.estimate)
    state = jax.jit(estimator.init)(theta, jax.random.key(0))
    state, key = estimate(theta, state, jax.random.key(1))[1], jax.random.key(2)
    spoiled = int(np.argmax(state.position < 6))  # In the middle of its episode.
    others = np.delete(np.arange(8), spoiled)

    def with_fault(particles):
        def spoil(x):
            if not jnp.issubdtype(x.dtype, jnp.floating):
                return x
            return x.at[jnp.asarray(particles)].set(fault)

        return estimate(theta, jax.tree.map(spoil, state), key)

    whole, after, _ = estimate(theta, state, key)
    without, after_without, metrics = with_fault([spoiled])
    alone, *_ = with_fault(others)
    neither, *_ = with_fault(range(8))  # Those that begin an episode here are as they were.
    found = (without, alone, neither, whole)
    without, alone, neither, whole = (ravel_pytree(tree)[0] for tree in found)
    assert np.isfinite(without).all() and metrics["finite"] < 1
    np.testing.assert_allclose(without + alone - neither, whole, rtol=1e-5, atol=1e-6)
    for a, b in zip(jax.tree.leaves(after), jax.tree.leaves(after_without), strict=True):
        if not jax.dtypes.issubdtype(a.dtype, jax.dtypes.prng_key):
            np.testing.assert_array_equal(np.asarray(a)[others], np.asarray(b)[others])
