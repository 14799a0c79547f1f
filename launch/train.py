"""Meta-trains a learned optimizer (or trains a network). With the same flags, it continues.

python -m launch.train --workdir=DIR [--preset=NAME] [--cfg.a.b=value ...]
"""

import sys
from typing import TYPE_CHECKING

from absl import flags

from launch import command_line
from launch.command_line import DATA_DIR, WORKDIR
from launch.config import Config

if TYPE_CHECKING:
    from launch.loop import Outcome

_DRY_RUN = flags.DEFINE_bool("dry_run", False, "Print the resolved plan and exit.")


def main(config: Config) -> int:
    # Here, not above: what is imported takes seconds, and wrong flags are refused before.
    from launch.compiled_programs import keep_compiled_programs
    from launch.job import build, describe
    from launch.loop import run
    from learned_opt.paths import writable_folder

    if _DRY_RUN.value:
        print(describe(build(config, DATA_DIR.value)))
        return 0
    if not WORKDIR.value:
        raise ValueError("--workdir is required: the folder where the job lives.")
    workdir = writable_folder("--workdir", WORKDIR.value)
    keep_compiled_programs()
    outcome = run(config, workdir, DATA_DIR.value)
    if code := exit_code(outcome):
        return code
    print(f"{config.trains:<13}{workdir / config.trains}")
    print(f"metrics      {workdir / 'metrics.jsonl'}")
    print(f"checkpoints  {workdir / 'checkpoints'}")
    if outcome.wandb_dir:
        print(f"W&B run      {outcome.wandb_dir}")
    return 0


def exit_code(outcome: "Outcome") -> int:
    """0 if the job is done; else says why it is not."""
    from launch.loop import EXIT_NONFINITE, EXIT_PREEMPTED

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
