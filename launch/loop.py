"""The train loop: a job from where its folder has it, to the end or to a signal."""

import contextlib
import math
import sys
import uuid
import zlib
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from launch import environment, leaves, wandb_results
from launch import workdir as workdirs
from launch.choices import to_dict
from launch.config import Config
from launch.held_arrays import digest_of_arrays
from launch.job import Job, build, say_compiling
from launch.lease import Lease, claim
from launch.pending import Finished, Pending
from launch.saves import Saves
from launch.stall import StallLimit
from launch.stopping import StopSignals
from launch.validation import Best
from launch.workdir import checkpoint_steps
from learned_opt.paths import user_path, writable_folder
from meta_train import devices, processes
from meta_train.checkpoint import Checkpoints
from meta_train.estimators.hybrid.replay import ReplayLog
from meta_train.meta_optimizers import judged
from meta_train.progress import remark
from meta_train.tracking import Tracker
from meta_train.trainer import TrainState

# A job that cannot learn, since no particle is finite: not to be tried again as it is.
EXIT_NONFINITE = 3
# Seconds to wait for W&B at the end; of a stopped job, whose scheduler waits.
WANDB_SECONDS, WANDB_SECONDS_STOPPED = 60.0, 3.0
# The share of theta's entries that no perturbation moves from which on a job says so.
UNPERTURBED = 0.1


class Outcome(NamedTuple):
    """How a run ended.

    Attributes:
      step: outer steps done.
      preempted: whether a signal stopped it.
      wandb_dir: the folder of the W&B run; None if disabled.
      diagnosis: why what was trained is of no use, and was not exported; empty if it is.
      unsaved: why the last outer steps are not in a checkpoint, as on a full disk; empty if they
        are.
    """

    step: int
    preempted: bool
    wandb_dir: str | None
    diagnosis: str = ""
    unsaved: str = ""


def run(
    config: Config, workdir: Path, data_dir: str | None = None, stall_seconds: float = 0
) -> Outcome:
    """Trains until ``config.num_steps``, until SIGTERM, SIGUSR1 or SIGINT asks to stop, or until
    no particle was finite for ``config.nonfinite_patience`` outer steps in a row.

    Args:
      config: the job.
      workdir: its folder.
      data_dir: folder of prepared data sets.
      stall_seconds: of several processes; see ``StallLimit``.

    Raises:
      ValueError: if the configuration is wrong, starts from an optimizer that does not fit, or
        contradicts the job in ``workdir``, or another
        process runs that job. Nothing is written then.
    """
    processes.first_does(partial(writable_folder, "workdir", workdir))
    workdir = user_path("workdir", workdir)
    job = processes.together(partial(build, config, data_dir))
    # Refuses sizes that do not fit theta.
    spec = processes.together(partial(jax.eval_shape, job.init))
    # And those that no memory holds, before the folder is claimed.
    like = processes.together(partial(devices.host_like, spec))
    if processes.several():
        processes.same(data=digest_of_arrays(job.trainable.systems))
    surroundings = environment.record(job.num_devices)

    def claim_folder(held: contextlib.ExitStack) -> Lease:
        workdirs.refuse_contradictions(config, surroundings, workdir)
        if not workdirs.find_start(workdir).record:
            job.trainable.start()  # Refuses to start from another optimizer.
        return held.enter_context(claim(workdir))

    with contextlib.ExitStack() as held:
        lease = processes.first_does(partial(claim_folder, held))
        with StopSignals() as stop, StallLimit(stall_seconds) as stall:
            return _run(job, spec, like, surroundings, workdir, lease, stop, stall)


def _run(
    job: Job,
    spec: TrainState,
    like: TrainState,
    surroundings: dict[str, Any],
    workdir: Path,
    lease: Lease | None,
    stop: StopSignals,
    stall: StallLimit,
) -> Outcome:
    config = job.config
    # Of several processes only the first has the files; what it reads, it tells the others.
    first = processes.is_first()
    start = processes.first_does(partial(workdirs.begin, workdir, like, surroundings))
    step, record = processes.first_says((start.step, start.record) if start else None)
    marks = record.get("files", {})
    run_id = processes.first_says(record.get("wandb_run_id") or uuid.uuid4().hex[:8])
    state = None
    if start:
        state = devices.from_host(start.host_state, spec) if record else job.begin()
    if processes.several():
        own = devices.to_host(state, None) if start else like
        state = devices.from_host(processes.first_has(own), spec)
    devices.forget_compiled()
    state = devices.place(state, job.num_devices, job.axes)
    export = job.trainable.export if first else _no_export
    if first:
        workdirs.write_config(workdir, workdirs.describe(config, surroundings, run_id))
    tracker = Tracker(
        workdir,
        config=to_dict(config) | {"environment": surroundings},
        run_id=run_id,
        start_step=step,
        num_steps=config.num_steps,
        project=config.wandb_project,
        # A finished job that is run again has nothing to tell.
        mode=config.wandb_mode if step < config.num_steps else "disabled",
        options=wandb_options(config),
        mark=marks.get("metrics.jsonl"),
    )
    replay_log = None
    if first and config.estimator.keeps_log:
        replay_log = ReplayLog(workdir / "replay.log", step, marks.get("replay.log"))
    rows = _Rows(job, tracker, replay_log, step, record.get("nonfinite_steps", 0))
    best = Best(
        lambda folder, theta, step: export(folder, job.theta_tree(theta), step),
        workdir / f"{job.trainable.name}_best",
        record.get("best_validation"),
    )

    saves = None
    if start:
        checkpoints = Checkpoints(workdir, config.keep_checkpoints)
        saves = Saves(checkpoints, [file for file in (tracker, replay_log) if file], start)
    stop.newest = lambda: max(checkpoint_steps(workdir), default=None)

    def save(step, state):
        files = {"metrics.jsonl": tracker, "replay.log": replay_log}
        host_state = devices.to_host(state, job.axes)
        if processes.several():  # Machines that round differently would drift apart unseen.
            theta = np.ascontiguousarray(host_state.theta).tobytes()
            processes.same(theta=f"{zlib.crc32(theta):08x} at outer step {step}")
        if saves and not (lease and lease.is_lost()):
            saves.save(
                step,
                host_state,
                lambda: workdirs.describe(
                    config,
                    surroundings,
                    run_id,
                    nonfinite_steps=rows.nonfinite_steps,
                    best_validation=best.loss,
                    files={name: file.mark() for name, file in files.items() if file},
                ),
            )
        return host_state

    if not record:
        name, theta = f"{job.trainable.name}_initial", devices.first_replica(state.theta)
        export(workdir / name, job.theta_tree(theta), 0)
        save(0, state)
        stall.moved(0)
        # So that there are no metrics without a checkpoint.
        if problem := processes.first_says(saves.wait() if saves else ""):
            tracker.close(0.0)
            return Outcome(0, False, None, unsaved=problem)

    # Several processes stop after the same step: the one that all of them heard of it in.
    ask = devices.anywhere(job.num_devices) if processes.several() else None

    def wants_to_stop() -> bool:
        return stop.requested or bool(lease and lease.is_lost(1.0))

    def stopping() -> bool:
        return rows.told_to_stop if ask else wants_to_stop()

    if step < config.num_steps and not stopping():
        # Ahead, so that no step's time is that of compiling it.
        say_compiling(job)
        train_step = job.step.lower(state).compile()
        devices.trim_memory()
        stall.moved(step)
    pending = Pending(devices.max_in_flight())
    evaluated = False
    while step < config.num_steps and not (stopping() or rows.hopeless):
        pending.wait_for_room()
        stall.moved(step)
        evaluates = config.eval_every > 0 and (step + 1) % config.eval_every == 0
        if evaluates:  # A copy, as a step takes its state's memory.
            before = np.array(devices.first_replica(state.theta))
        state, metrics = train_step(state)
        if ask:
            metrics = devices.in_turn(metrics) | {"stop": ask(wants_to_stop())}
        step += 1
        rows.write(pending)  # While the devices work on the next step.
        pending.add(step, metrics)
        if evaluates:
            with pending.apart():
                metrics["leaves"] = leaves.measure(
                    job.theta_tree,
                    before,
                    np.array(devices.first_replica(state.theta)),
                    np.asarray(devices.first_replica(metrics["meta_grad"])),
                )
                theta = devices.first_replica(judged(state.theta, state.meta_opt_state))
                if not evaluated:
                    remark("Compiling the evaluation of theta ...")
                evaluated = True
                metrics |= jax.block_until_ready(job.evaluate(theta))
                best.offer(step, theta, metrics)
            stall.moved(step)
        if step % config.checkpoint_every == 0:
            with pending.apart():
                # Before the checkpoint, so that no checkpoint is ahead of the metrics.
                rows.write(pending)
                save(step, state)
    preempted = stopping() and step < config.num_steps
    stop.heard()
    stall.moved(step)
    processes.first_does(lambda: lease.refuse_if_lost() if lease else None)
    with pending.apart():
        rows.write(pending)
        host_state = save(step, state)
    unsaved = processes.first_says(saves.close() if saves else "")
    if replay_log:
        replay_log.close()
    diagnosis = "" if preempted else rows.diagnosis(step, host_state.theta)
    # What a full disk has no room to save is exported when the job has been continued.
    if not (preempted or diagnosis or unsaved):
        theta = judged(host_state.theta, host_state.meta_opt_state)
        exported = workdir / job.trainable.name
        export(exported, job.theta_tree(theta), step)
        tracker.send(partial(wandb_results.send, workdir, exported))
    tracker.close(WANDB_SECONDS_STOPPED if preempted else WANDB_SECONDS)
    return Outcome(step, preempted, tracker.wandb_dir, diagnosis, unsaved)


def wandb_options(config: Config) -> dict[str, Any]:
    """What of the configuration ``wandb.init`` is told, by its own names."""
    given = to_dict(config.wandb)
    tags = [tag.strip() for tag in given.pop("tags").split(",") if tag.strip()]
    given |= {"tags": tags}
    return {name: value for name, value in given.items() if value}


def _no_export(folder: Path, theta: Any, step: int) -> None:
    """The first process's business."""


class _Rows:
    """Writes what finished steps did, and keeps an eye on whether any particle is finite.

    Attributes:
      nonfinite_steps: outer steps in a row, up to now, in which no particle was.
      told_to_stop: whether a signal asked any of several processes to stop.
    """

    def __init__(
        self,
        job: Job,
        tracker: Tracker,
        replay_log: ReplayLog | None,
        start_step: int,
        nonfinite_steps: int,
    ):
        self._job, self._tracker, self._replay_log = job, tracker, replay_log
        self._inner_steps = job.config.inner_steps()
        self._schedule = job.config.meta.rate(job.config.num_steps)
        self._last_step, self._last_seconds = start_step, 0.0
        self._warned = False
        self.nonfinite_steps = nonfinite_steps
        self.told_to_stop = False

    @property
    def hopeless(self) -> bool:
        """Whether patience is at an end."""
        return 0 < self._job.config.nonfinite_patience <= self.nonfinite_steps

    def write(self, pending: Pending) -> None:
        """Of all steps that were waited for, those that are due."""
        for finished in pending.take():
            self._write(finished)

    def _write(self, finished: Finished) -> None:
        step, config = finished.step, self._job.config
        metrics = dict(finished.metrics)
        message = metrics.pop("message", None)
        self.told_to_stop |= bool(metrics.pop("stop", False))
        if self._replay_log:
            self._replay_log.append(step, jax.device_get(message))
        metrics.pop("meta_grad")
        of_leaves = metrics.pop("leaves", {})
        row = {"step": step} | {k: float(v) for k, v in jax.device_get(metrics).items()}
        nonfinite = row.pop("nonfinite")
        self.nonfinite_steps = self.nonfinite_steps + 1 if nonfinite == 1 else 0
        self._warn_of_lost_perturbations(row)
        evaluated = any(name.startswith("eval/") for name in row)
        if step % config.log_every and step != config.num_steps and not evaluated:
            return
        # Of the particles, where the estimator does not say how many losses a step had.
        counted = row.pop("num_losses", math.nan)
        if math.isnan(counted):
            counted = config.estimator.population.size * len(config.task.parts)
        row["nonfinite_count"] = round(nonfinite * counted)
        row["total_inner_steps"] = step * self._inner_steps
        steps, seconds = step - self._last_step, finished.seconds - self._last_seconds
        row["time/inner_steps_per_second"] = steps * self._inner_steps / seconds
        row["time/wall_seconds"] = self._tracker.seconds()
        row["meta_learning_rate"] = self._rate(step)
        self._tracker.log(row | of_leaves)
        self._last_step, self._last_seconds = step, finished.seconds

    def _rate(self, step: int) -> float:
        """The learning rate of an outer step."""
        return float(self._schedule(step - 1) if callable(self._schedule) else self._schedule)

    def _warn_of_lost_perturbations(self, row: dict[str, Any]) -> None:
        """Once in each process, as theta may have grown long before."""
        shares = [x for name, x in row.items() if "unperturbed" in name.split("/")]
        share = max(shares, default=0.0)
        if self._warned or not share > UNPERTURBED:
            return
        self._warned = True
        sigma = row.get("sigma", getattr(self._job.config.estimator, "sigma", math.nan))
        print(
            f"warning: at outer step {row['step']}, {share:.0%} of theta's entries are so large "
            f"that perturbations of sigma={sigma:g} are lost in the rounding of the sum, and their "
            "gradient with them; train anew with a larger --cfg.estimator.sigma (from here with "
            "--cfg.init_from), or keep theta smaller (--cfg.meta=adamw, a lower "
            "--cfg.meta.learning_rate).",
            file=sys.stderr,
        )

    def diagnosis(self, step: int, theta: np.ndarray) -> str:
        """Why theta is of no use; empty if it may be."""
        config, without = self._job.config, self.nonfinite_steps
        if self.hopeless or (config.nonfinite_patience and without == step > 0):
            what = f"no particle was finite in the last {without} outer steps"
        elif not np.all(np.isfinite(theta)):
            what = "theta is not finite"
        else:
            return ""
        return (
            f"{what}, so there is nothing to learn from: the state is saved at outer step {step}, "
            f"and no {self._job.trainable.name} was exported. Inner training or its derivative "
            "overflows or is NaN: start anew with smaller inner steps (--cfg.optimizer), a "
            "smaller --cfg.meta.learning_rate, a shorter --cfg.inner.horizon or "
            "--cfg.estimator.truncation, --cfg.inner.loss_ceiling, or an estimator that needs no "
            "derivatives (--cfg.estimator=pes). --cfg.nonfinite_patience=0 continues "
            "regardless."
        )
