"""Kills jobs at random moments, lets them finish, and compares with jobs that were never killed.

python -m tests.soak --workdir=DIR [--kills=500] [--cases=pes,tbptt,...] [--processes=2]

With the same flags, it continues. Each life of a job is a process of its own, or several that run
it together, forked from one that has imported everything and computed nothing. It is killed with
SIGKILL, of several one by chance, whereupon the others must end by themselves: at a random row of
metrics, in the middle of a save, or at any time from its start. A job is killed ten times and then
finishes; its state, theta, metrics and log must be those of the job that was never killed, to the
bit. Exit code 1 if any is not.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import socket
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import jax
import numpy as np

from launch import config as cfg
from launch import hosts, loop
from launch.job import build
from meta_train import devices
from meta_train.checkpoint import Checkpoints
from tasks import TaskMixture
from tests import jobs

KILLS_A_JOB = 10
STEPS = 160
# (Evaluations change nothing that is kept, and take a life half of its time to compile.)
COMMON = {"num_steps": STEPS, "checkpoint_every": 4, "eval_every": 0}
HYBRID = {
    "base": cfg.estimator("pes", num_particles=4, truncation=4),
    "num_workers": 2,
    "refresh_every": 3,
    "replay_log": True,
}
# A toy has everything but inner training, and compiles at once.
CASES = {
    "toy": jobs.changed(**COMMON),
    "pes": jobs.changed(**COMMON),
    "tbptt": jobs.changed(
        **COMMON, estimator=cfg.estimator("tbptt", num_particles=4, truncation=4)
    ),
    "hybrid_es": jobs.changed(**COMMON, estimator=cfg.estimator("hybrid_es", **HYBRID)),
    "mixture": jobs.changed(
        **COMMON, task=TaskMixture(tasks=(jobs.SMALL.task, cfg.task("quadratic", dim=2)))
    ),
    "network": jobs.changed(
        **COMMON,
        trains="network",
        inner=cfg.InnerConfig(horizon=1),
        estimator=cfg.estimator("pes", num_particles=4, truncation=1),
    ),
}
# Exit code of a process that has lost another; seconds that processes wait for each other, and
# within which the others must end.
LOST, WAIT, PATIENCE = 75, 20, 120
PLACES = ("at the start", "in a save", "between saves", "at the end")


def builder(case: str) -> Callable:
    """What makes the job."""
    return jobs.toy if case == "toy" else build


def forked(workdir: Path, work: Callable[[], int]) -> int:
    """A process that does it and ends with its code; its pid. It writes to ``WORKDIR.log``."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        log = os.open(f"{workdir}.log", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        code = work()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def life(case: str, workdir: Path, cache: Path, size: int) -> list[int]:
    """So many processes that run or continue the job together; their pids."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"

    def run(rank: int) -> int:
        # Programs of one process of several are of that one alone.
        jax.config.update("jax_compilation_cache_dir", str(cache / f"{rank}_of_{size}"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        loop.build = builder(case)
        try:
            hosts.join(CASES[case], address, size, rank, WAIT)
        except ValueError as error:  # As a command says it where another one was killed before.
            print(f"error: {error}", file=sys.stderr)
            return 2
        with hosts.ending_together(LOST):
            outcome = loop.run(CASES[case], workdir)
            if size > 1:  # As at the end of a command: the first one waits for the others.
                jax.distributed.shutdown()
            return 0 if outcome.step == STEPS and not outcome.unsaved else 1

    return [forked(workdir, partial(run, rank)) for rank in range(size)]


def ends(pids: Sequence[int], seconds: float) -> list[int]:
    """Exit codes of all (negative: a signal), which must end within so many seconds."""
    until, codes = time.monotonic() + seconds, {}
    while len(codes) < len(pids):
        codes |= {pid: code for pid in pids if pid not in codes and (code := wait(pid)) is not None}
        if time.monotonic() > until:
            for pid in (pid for pid in pids if pid not in codes):
                os.kill(pid, signal.SIGKILL)
                codes[pid] = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        time.sleep(0.001)
    return [codes[pid] for pid in pids]


def conclude(case: str, workdir: Path) -> dict | None:
    """What the job came to, found by a process of its own; None if it is no whole one."""

    def work():
        Path(f"{workdir}.came_to").write_text(json.dumps(came_to(case, workdir)))
        return 0

    code = ends([forked(workdir, work)], 300)
    return json.loads(Path(f"{workdir}.came_to").read_text()) if code == [0] else None


def came_to(case: str, workdir: Path) -> dict:
    """Digests of everything a job leaves that must not depend on when it was killed."""
    job = builder(case)(CASES[case], None)
    like = devices.host_like(jax.eval_shape(job.init))
    state = Checkpoints(workdir, read_only=True).restore(STEPS, like)
    leaves = [(x.dtype.str, x.shape, x.tobytes()) for x in map(np.asarray, jax.tree.leaves(state))]
    rows = jobs.rows(workdir)
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    of = {"state": repr(leaves), "metrics": json.dumps(rows)}
    found = {name: hashlib.sha256(text.encode()).hexdigest() for name, text in of.items()}
    files = sorted((workdir / CASES[case].trains).iterdir())
    exported = [path for path in files if path.suffix in (".safetensors", ".npz")]
    assert exported
    for path in [*exported, *workdir.glob("replay.log")]:
        found[path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
    assert not (workdir / "damaged").exists() and not list(workdir.glob("*.damaged*"))
    return found


def wait(pid: int) -> int | None:
    """Its exit code (negative: the signal), or None if it runs."""
    found, status = os.waitpid(pid, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if found else None


def in_a_save(workdir: Path) -> bool:
    """Whether a checkpoint is half-written."""
    folder = workdir / "checkpoints"
    return folder.is_dir() and any("tmp" in name for name in os.listdir(folder))


def kill(
    pids: list[int], workdir: Path, rng: random.Random, share: float, size: int, seconds: float
) -> str | None:
    """Kills one of the processes at a moment of its own; the place, or None if all were done.

    The others must end within ``PATIENCE``.

    Args:
      share: of the metrics' rows, after which to look for a moment.
      size: of all of them, bytes.
      seconds: a life takes that long, about.
    """
    kind, pid = rng.choice(("row", "save", "time")), rng.choice(pids)
    until = time.monotonic() + (rng.random() * seconds if kind == "time" else 600)
    metrics = workdir / "metrics.jsonl"
    while time.monotonic() < until:
        if (code := wait(pid)) is not None:
            codes = [code, *ends([other for other in pids if other != pid], PATIENCE)]
            assert codes == [0] * len(pids), Path(f"{workdir}.log").read_text()[-2000:]
            return None
        there = kind != "time" and metrics.exists() and metrics.stat().st_size >= share * size
        if there and (kind == "row" or in_a_save(workdir)):
            break
        time.sleep(0.0005)
    time.sleep(rng.random() * 0.01)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    codes = ends([other for other in pids if other != pid], PATIENCE)
    assert -signal.SIGKILL not in codes, "the others did not end"
    if not list(workdir.glob("checkpoints/[0-9]*")):
        return PLACES[0]
    if in_a_save(workdir):
        return PLACES[1]
    done = (workdir / "checkpoints" / str(STEPS)).exists()
    return PLACES[3] if done else PLACES[2]


def run_job(case: str, number: int, kills: int, folder: Path, size: int, reference: dict) -> dict:
    """Kills a job that often, lets it finish; where it was killed, and what differs."""
    workdir = folder / f"{case}_{number}"
    for path in folder.glob(f"{workdir.name}*"):  # Of a soak that was stopped.
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    rng = random.Random(f"{case} {number}")
    places: Counter = Counter()
    for i in range(kills):
        pids = life(case, workdir, folder / "cache", size)
        share = 0.95 * (i + rng.random()) / kills
        place = kill(pids, workdir, rng, share, reference["size"], reference["seconds"])
        if place:
            places[place] += 1
    codes = ends(life(case, workdir, folder / "cache", size), 600)
    said = Path(f"{workdir}.log").read_text()
    found = conclude(case, workdir)
    if any(codes) or not found:
        return {"kills": places, "differs": [f"exit codes {codes}: {said[-500:]}"]}
    differs = [
        name for name in reference["came_to"] if found.get(name) != reference["came_to"][name]
    ]
    if "Traceback" in said:
        differs.append("a traceback")
    if not differs:
        shutil.rmtree(workdir)
    return {"kills": places, "differs": differs}


def reference_of(case: str, folder: Path, size: int) -> dict:
    """What a job that nothing happens to comes to, its seconds, and the size of its metrics."""
    workdir = folder / f"{case}_reference"
    kept = folder / f"{case}_reference.json"
    if kept.exists():
        return json.loads(kept.read_text())
    for _ in range(2):  # The second finds the programs compiled.
        shutil.rmtree(workdir, ignore_errors=True)
        began = time.monotonic()
        codes = ends(life(case, workdir, folder / "cache", size), 600)
        seconds = time.monotonic() - began
        assert not any(codes), Path(f"{workdir}.log").read_text()
    came = conclude(case, workdir)
    assert came, Path(f"{workdir}.log").read_text()
    found = {
        "came_to": came,
        "seconds": seconds,
        "size": (workdir / "metrics.jsonl").stat().st_size,
    }
    kept.write_text(json.dumps(found))
    return found


def table(done: list[dict]) -> str:
    """What was killed where, and whether anything was lost."""
    lines = [f"| job | kills | {' | '.join(PLACES)} | jobs | differ |"]
    lines.append("|---" * (len(PLACES) + 4) + "|")
    for case in [*CASES, "all"]:
        of = [entry for entry in done if case in (entry["case"], "all")]
        if not of:
            continue
        places = sum((Counter(entry["kills"]) for entry in of), Counter())
        counts = " | ".join(str(places[place]) for place in PLACES)
        differ = sum(bool(entry["differs"]) for entry in of)
        lines.append(f"| {case} | {places.total()} | {counts} | {len(of)} | {differ} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", type=Path, required=True, help="of the jobs and the record")
    parser.add_argument("--kills", type=int, default=500, help="in all, at least")
    parser.add_argument("--cases", help="which jobs, with commas (default: all)")
    parser.add_argument("--processes", type=int, default=1, help="that run each job together")
    given = parser.parse_args()
    given.workdir.mkdir(parents=True, exist_ok=True)
    record = given.workdir / "soak.jsonl"
    lines = record.read_text().splitlines() if record.exists() else []
    done = [json.loads(line) for line in lines]
    # The toy has as many particles as one process takes.
    every = [name for name in CASES if given.processes == 1 or name != "toy"]
    cases = given.cases.split(",") if given.cases else every
    while (killed := sum(sum(entry["kills"].values()) for entry in done)) < given.kills:
        case = min(cases, key=lambda name: sum(entry["case"] == name for entry in done))
        number = sum(entry["case"] == case for entry in done)
        reference = reference_of(case, given.workdir, given.processes)
        kills = min(KILLS_A_JOB, given.kills - killed)
        entry = {"case": case} | run_job(
            case, number, kills, given.workdir, given.processes, reference
        )
        done.append(entry)
        with record.open("a") as file:
            file.write(json.dumps(entry) + "\n")
        print(f"{case} {number}: {dict(entry['kills'])} {entry['differs']}", flush=True)
    print(table(done))
    return int(any(entry["differs"] for entry in done))


if __name__ == "__main__":
    sys.exit(main())
