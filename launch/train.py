"""Meta-trains a learned optimizer (or trains a network). With the same flags, it continues.

python -m launch.train --workdir=DIR [--preset=NAME] [--cfg.a.b=value ...]
"""

import collections
import contextlib
import fcntl
import json
import signal
import sys
import time
import uuid
from pathlib import Path
from typing import Any, NamedTuple

import jax
from absl import flags

from launch import command_line
from launch import config as cfg
from launch.choices import to_dict
from launch.command_line import DATA_DIR, WORKDIR
from launch.job import Job, build, describe
from meta_train import devices
from meta_train.checkpoint import Checkpoints
from meta_train.estimators.hybrid.replay import ReplayLog
from meta_train.tracking import Tracker
from meta_train.trainer import TrainState

# A job that a signal stopped after saving; EX_TEMPFAIL, "try again", for schedulers that requeue.
EXIT_PREEMPTED = 75


class Outcome(NamedTuple):
    """How a run ended: outer steps done, whether a signal stopped it, and the W&B folder."""

    step: int
    preempted: bool
    wandb_dir: str | None


def run(config: cfg.Config, workdir: Path, data_dir: str | None = None) -> Outcome:
    """Trains until ``config.num_steps``, or until SIGTERM or SIGINT asks to stop.

    Raises:
      ValueError: if the configuration is wrong or contradicts the job in ``workdir``, or another
        process runs that job. Nothing is written then.
    """
    job = build(config, data_dir)
    spec = jax.eval_shape(job.init)  # Refuses sizes that do not fit theta.
    _refuse_contradictions(config, workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    with _claim(workdir):
        return _run(job, spec, config, workdir)


def _run(job: Job, spec: TrainState, config: cfg.Config, workdir: Path) -> Outcome:
    checkpoints = Checkpoints(workdir, config.keep_checkpoints)
    start = checkpoints.latest_step
    if start is None:
        start, run_id = 0, uuid.uuid4().hex[:8]
        state = jax.jit(job.init)()
    else:
        run_id = checkpoints.job(start)["wandb_run_id"]
        host_state = checkpoints.restore(start, devices.host_like(spec))
        state = devices.from_host(host_state, spec)
        print(f"Continuing {workdir} at outer step {start}.", file=sys.stderr)
    devices.forget_compiled()
    state = devices.place(state, job.num_devices, job.axes)

    description: dict[str, Any] = {"config": to_dict(config), "wandb_run_id": run_id}
    (workdir / "config.json").write_text(json.dumps(description["config"], indent=2) + "\n")

    def save(step, state):
        host_state = devices.to_host(state, job.axes)
        checkpoints.save(step, host_state, description)
        return host_state

    if start == 0:
        host_state = save(0, state)
        name = job.subject.name
        job.subject.export(workdir / f"{name}_initial", job.unravel(host_state.theta), 0)
    tracker = Tracker(
        workdir,
        config=description["config"],
        run_id=run_id,
        start_step=start,
        num_steps=config.num_steps,
        project=config.wandb_project,
        mode=config.wandb_mode,
    )
    replay_log = ReplayLog(workdir / "replay.log", start) if config.estimator.keeps_log else None

    inner_steps = config.inner_steps()
    num_particles = config.estimator.population.size
    max_in_flight = devices.max_in_flight()
    last = time.perf_counter()
    started = last - tracker.wall_seconds  # The job's, not this process's.
    in_flight: collections.deque = collections.deque()

    def log_oldest():
        nonlocal last
        step, metrics = in_flight.popleft()
        message = metrics.pop("message", None)
        if replay_log:
            replay_log.append(step, jax.device_get(message))
        row = {"step": step} | {k: float(v) for k, v in jax.device_get(metrics).items()}
        now = time.perf_counter()
        evaluated = any(name.startswith("eval/") for name in row)
        if step % config.log_every and step != config.num_steps and not evaluated:
            last = now
            return
        # Of the particles; in a step of Hybrid-ES without a gradient, of the costs exchanged.
        counted = num_particles
        if message is not None and not message.refreshed:
            counted = sum(leaf.size for leaf in jax.tree.leaves(message.costs.costs))
        row["nonfinite_count"] = round(row.pop("nonfinite") * counted)
        row["total_inner_steps"] = step * inner_steps
        row["time/inner_steps_per_second"] = inner_steps / (now - last)
        row["time/wall_seconds"] = now - started
        tracker.log(row)
        last = now

    step, preempted = start, False
    with _StopSignals() as stop:
        while step < config.num_steps and not preempted:
            waited = len(in_flight) > max_in_flight
            if waited:
                jax.block_until_ready(in_flight[0])
            state, metrics = job.step(state)
            step += 1
            if step == start + 1:
                devices.trim_memory()  # Of compiling the step.
            if config.eval_every and step % config.eval_every == 0:
                metrics = metrics | job.evaluate(devices.first_replica(state.theta))
            if waited:  # The host writes this row while the devices work on the next step.
                log_oldest()
            in_flight.append((step, metrics))
            preempted = stop.requested
            if step % config.checkpoint_every == 0 or preempted:
                while in_flight:
                    log_oldest()
                # Before the checkpoint, so that no checkpoint is ahead of the metrics.
                tracker.flush()
                save(step, state)
    while in_flight:
        log_oldest()
    tracker.flush()
    host_state = save(step, state)
    checkpoints.close()
    tracker.close()
    if replay_log:
        replay_log.close()
    if not preempted:
        job.subject.export(workdir / job.subject.name, job.unravel(host_state.theta), step)
    return Outcome(step, preempted, tracker.wandb_dir)


def _refuse_contradictions(config: cfg.Config, workdir: Path) -> None:
    if not (workdir / "checkpoints").is_dir():
        return
    checkpoints = Checkpoints(workdir, read_only=True)
    start = checkpoints.latest_step
    if start is None:
        return
    saved = checkpoints.job(start)["config"]
    checkpoints.close()
    if start > config.num_steps:
        raise ValueError(
            f"`workdir` {workdir} is at outer step {start}, past --cfg.num_steps="
            f"{config.num_steps}. Ask for more steps, or give another --workdir."
        )
    differences = cfg.contradictions(config, saved)
    if differences:
        raise ValueError(
            f"`workdir` {workdir} holds a job with another configuration:\n  "
            + "\n  ".join(differences)
            + "\nGive the same flags to continue it, or another --workdir to start afresh."
        )


@contextlib.contextmanager
def _claim(workdir: Path):
    """Keeps a second process out of the job; the system lets go when this one ends, however."""
    with open(workdir / "lock", "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"`workdir` {workdir} is in use by another process, which would write to the same "
                "files. Wait until it ends, or give another --workdir."
            ) from None
        except OSError:
            pass  # A file system without locks.
        yield


class _StopSignals:
    """Turns SIGTERM and SIGINT into a request to stop after the running step.

    A second SIGINT interrupts at once.
    """

    def __enter__(self):
        self.requested = False
        self._previous = {
            number: signal.signal(number, self._request)
            for number in (signal.SIGTERM, signal.SIGINT)
        }
        return self

    def _request(self, number, frame):
        del frame
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True

    def __exit__(self, *exc):
        for number, handler in self._previous.items():
            signal.signal(number, handler)


_DRY_RUN = flags.DEFINE_bool("dry_run", False, "Print the resolved plan and exit.")


def main(config: cfg.Config) -> int:
    if _DRY_RUN.value:
        print(describe(build(config, DATA_DIR.value)))
        return 0
    if not WORKDIR.value:
        raise ValueError("--workdir is required: the folder where the job lives.")
    workdir = Path(WORKDIR.value)
    outcome = run(config, workdir, DATA_DIR.value)
    if outcome.preempted:
        print(f"Stopped and saved at outer step {outcome.step}; run again to continue.")
        return EXIT_PREEMPTED
    print(f"{config.trains:<13}{workdir / config.trains}")
    print(f"metrics      {workdir / 'metrics.jsonl'}")
    print(f"checkpoints  {workdir / 'checkpoints'}")
    print(f"W&B run      {outcome.wandb_dir}")
    return 0


if __name__ == "__main__":
    command_line.run(main)
