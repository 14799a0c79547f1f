"""The weights of a job with ``--cfg.estimator.replay_log``, rebuilt without evaluating a loss.

python -m launch.replay --workdir=DIR [--from_step=STEP]

Starts at a checkpoint, follows ``DIR/replay.log`` to its last whole record, and writes
``DIR/network_rebuilt`` (or ``optimizer_rebuilt``): the very weights the job had there.
"""

import json
from pathlib import Path

import jax
from absl import app, flags

from launch.command_line import DATA_DIR, WORKDIR, messages, parse_flags, quiet
from launch.config import read_config
from launch.job import build
from meta_train import devices
from meta_train.checkpoint import Checkpoints
from meta_train.estimators.hybrid.replay import rebuild

_FROM_STEP = flags.DEFINE_integer("from_step", -1, "Checkpoint to start at; -1 is the newest.")


def replay(workdir: Path, from_step: int | None = None, data_dir: str | None = None) -> int:
    """Rebuilds and exports the weights; returns their outer step.

    Raises:
      ValueError: if there is no such checkpoint, or no log.
    """
    log = workdir / "replay.log"
    for needed in (log, workdir / "config.json"):
        if not needed.is_file():
            raise ValueError(
                f"`workdir` {workdir} has no {needed.name}; give the folder of a job trained with "
                "--cfg.estimator.replay_log=true."
            )
    config = read_config(json.loads((workdir / "config.json").read_text()))
    job = build(config, data_dir)  # First: it makes the devices.
    checkpoints = Checkpoints(workdir, read_only=True)
    start = checkpoints.latest_step if from_step is None else from_step
    if start is None or start not in checkpoints.steps:
        raise ValueError(
            f"`from_step` must be one of the checkpoints {checkpoints.steps}, got {start}."
        )
    spec = jax.eval_shape(job.init)
    state = devices.from_host(checkpoints.restore(start, devices.host_like(spec)), spec)
    checkpoints.close()
    state = rebuild(job.alone, job.meta_optimizer, state, log)
    step = int(state.step)
    job.subject.export(workdir / f"{job.subject.name}_rebuilt", job.unravel(state.theta), step)
    return step


def main(argv) -> None:
    del argv
    quiet()
    from_step = None if _FROM_STEP.value < 0 else _FROM_STEP.value
    with messages():
        step = replay(Path(str(WORKDIR.value)), from_step, DATA_DIR.value)
    print(f"Rebuilt the weights of outer step {step}.")


if __name__ == "__main__":
    flags.mark_flag_as_required("workdir")
    app.run(main, flags_parser=parse_flags)
