"""Meta-trains a learned optimizer (or trains a network or a policy). The same flags continue it.

python -m launch.train --workdir=DIR [--preset=NAME] [--cfg.a.b=value ...]
"""

import math
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from absl import flags

from launch import command_line, hosts
from launch.choices import modules_outside, to_dict
from launch.command_line import DATA_DIR, WORKDIR, command, required_workdir
from launch.config import Config

if TYPE_CHECKING:
    from launch.loop import Outcome

_DRY_RUN = flags.DEFINE_bool("dry_run", False, "Print the resolved plan and exit.")
_MEMORY = flags.DEFINE_bool(
    "measure_memory",
    False,
    "With --dry_run: compile the step, and print the memory it needs; minutes for many tasks.",
)
_HOSTS = flags.DEFINE_integer(
    "num_hosts", 1, "With --dry_run: plan for so many hosts like this one.", lower_bound=1
)

_ADDRESS = flags.DEFINE_string(
    "coordinator_address",
    None,
    "Of several processes: HOST:PORT of the first one (default: JAX_COORDINATOR_ADDRESS, SLURM's).",
)
_COUNT = flags.DEFINE_integer(
    "num_processes", None, "How many processes run this job (default: JAX_NUM_PROCESSES, SLURM's)."
)
_INDEX = flags.DEFINE_integer(
    "process_id", None, "Which of them this is, from 0 (default: JAX_PROCESS_ID, SLURM's)."
)
_WAIT = flags.DEFINE_integer(
    "wait_seconds", 300, "How long the processes wait for each other at the start.", lower_bound=1
)
# The default is far beyond a step, an evaluation or a checkpoint, compiling included.
_STALL = flags.DEFINE_integer(
    "stall_seconds",
    1800,
    "Of several processes: how long a step may take before all end, as one hangs; 0: for ever.",
    lower_bound=0,
)


def main(config: Config) -> int:
    if _MEMORY.value and not _DRY_RUN.value:
        raise ValueError("--measure_memory is for --dry_run, which was not given; give it too.")
    if _HOSTS.value > 1 and not _DRY_RUN.value:
        raise ValueError(
            "--num_hosts plans with --dry_run, which was not given; to run on several, give "
            "--num_processes and the like to each."
        )
    # A dry run needs none, but one may stand in the words of a job.
    given = required_workdir() if WORKDIR.value or not _DRY_RUN.value else ""
    # Here, not above: what is imported takes seconds, and wrong flags are refused before.
    from launch.compiled_programs import keep_compiled_programs

    keep_compiled_programs()  # Those of a dry run too: the job need not compile them again.
    if _DRY_RUN.value:
        from launch.job import build, describe

        job = build(config, DATA_DIR.value, _HOSTS.value)
        print(describe(job, _MEMORY.value, _HOSTS.value))
        return 0
    from launch.loop import run
    from launch.stopping import EXIT_PREEMPTED
    from learned_opt.paths import user_path, writable_folder
    from meta_train import processes

    hosts.join(config, _ADDRESS.value, _COUNT.value, _INDEX.value, _WAIT.value)
    with hosts.ending_together(lost=EXIT_PREEMPTED):
        processes.first_does(lambda: writable_folder("--workdir", given))
        workdir = user_path("--workdir", given)
        outcome = run(config, workdir, DATA_DIR.value, _STALL.value)
    if code := exit_code(outcome):
        return code
    if processes.is_first():
        print(ending(config, workdir, outcome))
    return 0


def ending(config: Config, workdir: Path, outcome: "Outcome") -> str:
    """How a finished job went, where everything is, and what to do next."""
    from meta_train.tracking import read_rows

    exported = workdir / config.trains
    rows = read_rows(workdir / "metrics.jsonl")
    lines = []
    if rows:
        last = rows[-1]
        # In a file, what is not finite is null.
        losses = [math.nan if x is None else x for x in (row.get("meta_loss") for row in rows)]
        late = [x for x, row in zip(losses, rows, strict=True) if row["step"] > 0.9 * outcome.step]
        lines += [
            f"meta-loss    {losses[-1]:.4g} at outer step {last['step']:,}; "
            f"{sum(late) / max(1, len(late)):.4g} is the mean of the logged ones in the last tenth",
            f"took         {last.get('time/wall_seconds') or 0:.0f} s, compiling included",
        ]
    lines.append(f"{config.trains:<13}{exported}")
    best = workdir / f"{config.trains}_best"
    if best.exists():
        judged = [
            (row["eval/validation"], row["step"]) for row in rows if row.get("eval/validation")
        ]
        loss, step = min(judged, default=(math.nan, 0))
        lines.append(
            f"best         {best} (of outer step {step:,}: {loss:.4g} on {config.validation}, the "
            f"lowest of {len(judged)})"
        )
    lines += [
        f"metrics      {workdir / 'metrics.jsonl'}",
        f"checkpoints  {workdir / 'checkpoints'}",
    ]
    if outcome.wandb_dir:
        lines.append(f"W&B run      {outcome.wandb_dir}")
    return "\n".join([*lines, *next_steps(config, workdir)])


def next_steps(config: Config, workdir: Path) -> list[str]:
    """Commands that go on from a finished job, each under a word on it."""
    from launch.workdir import checkpoint_steps

    lines = []
    if config.trains == "optimizer":
        best = workdir / "optimizer_best"
        # A mixture is no task that an evaluation could take over, and what chose tells nothing.
        apart = "heldout" if config.validation == "validation" else "validation"
        alone = len(config.task.parts) == 1 and not config.validation
        on = [] if alone else [f"--suite={apart}"]
        given = [
            *on,
            f"--optimizer={best if best.exists() else workdir / 'optimizer'}",
            f"--workdir={workdir / 'evaluation'}",
            *(f"--import={name}" for name in modules_outside(to_dict(config))),
        ]
        if DATA_DIR.value:
            given.append(f"--data_dir={DATA_DIR.value}")
        lines += [
            "compare it with Adam and others:",
            f"  {command('evaluate')} {shlex.join(given)}",
        ]
    if config.trains == "policy":
        given = [f"--policy={workdir / 'policy'}"]
        lines += ["roll it out in Gymnasium:", f"  {command('rollout')} {shlex.join(given)}"]
    if config.estimator.keeps_log:
        oldest = checkpoint_steps(workdir)[0]
        given = [f"--workdir={workdir}", f"--from_step={oldest}"]
        lines += ["rebuild it from its log:", f"  {command('replay')} {shlex.join(given)}"]
    return ["", *lines] if lines else []


def exit_code(outcome: "Outcome") -> int:
    """0 if the job is done; else says why it is not."""
    from launch.loop import EXIT_NONFINITE
    from launch.stopping import EXIT_PREEMPTED

    if outcome.unsaved:
        print(
            f"error: the state of outer step {outcome.step} could not be saved ({outcome.unsaved})."
            " Make room, and run the same command again: it goes on from the newest checkpoint.",
            file=sys.stderr,
        )
        return command_line.EXIT_DISK
    if outcome.preempted:
        print(f"Stopped and saved at outer step {outcome.step}; run again to continue.")
        return EXIT_PREEMPTED
    if outcome.diagnosis:
        print(f"error: {outcome.diagnosis}", file=sys.stderr)
        return EXIT_NONFINITE
    return 0


def cli() -> None:
    """The installed command."""
    command_line.run(main, doc=__doc__)


if __name__ == "__main__":
    cli()
