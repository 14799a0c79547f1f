"""The weights of a job with ``--cfg.estimator.replay_log``, rebuilt without evaluating a loss.

python -m launch.replay --workdir=DIR [--from_step=STEP]

Starts at a checkpoint (by default the newest sound one), follows ``DIR/replay.log`` to its last
whole record, and writes ``DIR/network_rebuilt`` (or ``optimizer_rebuilt``): the very weights the
job had there.
"""

import sys
from pathlib import Path

from absl import app, flags

from launch.command_line import DATA_DIR, WORKDIR, messages, parse_flags, quiet
from launch.config import read_config

_FROM_STEP = flags.DEFINE_integer(
    "from_step", -1, "Checkpoint to start at; -1 is the newest sound."
)


def replay(workdir: Path, from_step: int | None = None, data_dir: str | None = None) -> int:
    """Rebuilds and exports the weights; returns their outer step.

    Raises:
      ValueError: if there is no log, no such checkpoint or one that cannot be read, if the log
        ends before the newest checkpoint, or if JAX's settings are not those of the job.
    """
    # Here, not above: what is imported takes seconds, and wrong flags are refused before.
    import jax

    from launch import environment
    from launch.job import build
    from launch.workdir import find_start
    from meta_train import devices
    from meta_train.checkpoint import Checkpoints
    from meta_train.estimators.hybrid.replay import rebuild
    from meta_train.meta_optimizers import judged

    log = workdir / "replay.log"
    for needed in (log, workdir / "checkpoints"):
        if not needed.exists():
            raise ValueError(
                f"`workdir` {workdir} has no {needed.name}; give the folder of a job trained with "
                "--cfg.estimator.replay_log=true."
            )
    devices.configure_cpu_devices()  # Before Orbax asks JAX for its devices.
    checkpoints = Checkpoints(workdir, read_only=True)
    newest, start = checkpoints.latest_step, from_step
    if newest is None or start not in (None, *checkpoints.steps):
        raise ValueError(
            f"`from_step` must be one of the checkpoints {checkpoints.steps}, got {start}."
        )
    if start is None:
        found = find_start(workdir)
        for problem in found.unreadable.values():
            print(f"warning: {problem}; going on from {found.step}.", file=sys.stderr)
        start = found.step
    record = checkpoints.job(start)
    config = read_config(record["config"] | {"num_devices": 0})
    job = build(config, data_dir)
    differences = environment.contradictions(
        environment.record(job.num_devices), record.get("environment")
    )
    if differences:
        raise ValueError(
            f"`workdir` {workdir} holds a job under other settings, with which the weights would "
            "come out otherwise:\n  " + "\n  ".join(differences)
        )
    spec = jax.eval_shape(job.init)
    state = devices.from_host(checkpoints.restore(start, devices.host_like(spec)), spec)
    checkpoints.close()
    state = rebuild(job.one_device_estimator, job.meta_optimizer, state, log)
    step = int(state.step)
    if step < newest:
        raise ValueError(
            f"`workdir` {workdir}: replay.log is damaged, its last whole record before a gap is of "
            f"outer step {step}, but there is a checkpoint at {newest}; leave out --from_step."
        )
    theta = job.theta_tree(judged(state.theta, state.meta_opt_state))
    job.trainable.export(workdir / f"{job.trainable.name}_rebuilt", theta, step)
    return step


def main(argv) -> None:
    del argv
    quiet()
    from_step = None if _FROM_STEP.value < 0 else _FROM_STEP.value
    with messages():
        step = replay(Path(WORKDIR.value), from_step, DATA_DIR.value)
    print(f"Rebuilt the weights of outer step {step}.")


def cli() -> None:
    """The installed command."""
    flags.mark_flag_as_required("workdir")
    app.run(main, flags_parser=parse_flags)


if __name__ == "__main__":
    cli()
