"""The weights of a job with ``--cfg.estimator.replay_log``, rebuilt without evaluating a loss.

python -m launch.replay --workdir=DIR [--from_step=STEP]

Starts at a checkpoint (by default the newest sound one), follows ``DIR/replay.log`` to its last
whole record, and writes ``DIR/network_rebuilt`` (or ``optimizer_rebuilt``): the very weights the
job had there. Where the job left its own weights of that step, they are compared bit by bit; if
they differ, the command says so and exits with 3.
"""

import contextlib
import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags

from launch import command_line
from launch.command_line import DATA_DIR, required_workdir
from launch.config import read_config

DIFFERS = 3  # wrong usage is 2

_FROM_STEP = flags.DEFINE_integer(
    "from_step", -1, "Checkpoint to start at; -1 is the newest sound."
)


class Replayed(NamedTuple):
    """What was rebuilt.

    Attributes:
      step: its outer step.
      start: outer step of the checkpoint it started at.
      folder: where it was written.
      equal: by what the job itself left of that step (a folder it exported, a checkpoint): whether
        its weights are the same, bit for bit.
    """

    step: int
    start: int
    folder: Path
    equal: dict[str, bool]


def replay(workdir: Path, from_step: int | None = None, data_dir: str | None = None) -> Replayed:
    """Rebuilds and exports the weights, and compares them with those that the job left.

    Raises:
      ValueError: if there is no log, no such checkpoint or one that cannot be read, if the log
        ends before the newest checkpoint, or if JAX's settings are not those of the job.
    """
    # Here, not above: what is imported takes seconds, and wrong flags are refused before.
    import jax
    import numpy as np

    from launch import environment
    from launch.job import build
    from launch.workdir import find_start
    from meta_train import devices
    from meta_train.checkpoint import Checkpoints, UnreadableError
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
    state = rebuild(job.one_device_estimator, job.meta_optimizer, state, log)
    step = int(state.step)
    if step < newest:
        raise ValueError(
            f"`workdir` {workdir}: replay.log is damaged, its last whole record before a gap is of "
            f"outer step {step}, but there is a checkpoint at {newest}; leave out --from_step."
        )
    equal: dict[str, bool] = {}
    if start < step and step in checkpoints.steps:
        # One that cannot be read, which may be why it was passed over, is nothing to compare with.
        with contextlib.suppress(UnreadableError):
            saved = checkpoints.restore(step, devices.host_like(spec)).theta
            equal[f"checkpoint {step}"] = _same_bits(saved, np.asarray(state.theta))
    checkpoints.close()
    folder, exported = (workdir / (job.trainable.name + end) for end in ("_rebuilt", ""))
    job.trainable.export(folder, job.theta_tree(judged(state.theta, state.meta_opt_state)), step)
    if _step_of(exported) == step:
        equal[str(exported)] = _same_weights(folder, exported)
    return Replayed(step, start, folder, equal)


def _same_bits(a: Any, b: Any) -> bool:
    """Of two arrays."""
    return (a.shape, a.dtype, a.tobytes()) == (b.shape, b.dtype, b.tobytes())


def _same_weights(a: Path, b: Path) -> bool:
    """Of two exported folders, the first of which is sound."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        mine, theirs = (load_file(next(f.glob("*.safetensors"))) for f in (a, b))
    except (OSError, SafetensorError, StopIteration):
        return False
    return mine.keys() == theirs.keys() and all(_same_bits(mine[n], theirs[n]) for n in mine)


def _step_of(folder: Path) -> int | None:
    """The outer step that an exported thing is of; None where there is none that can be read."""
    try:
        return json.loads((folder / "config.json").read_text())["training"]["outer_steps"]
    except (OSError, ValueError, LookupError, TypeError):
        return None


def main(argv: list[str]) -> int:
    if argv:
        raise ValueError(f"Unexpected arguments {argv}; every option is --name=value.")
    from_step = None if _FROM_STEP.value < 0 else _FROM_STEP.value
    found = replay(Path(required_workdir()), from_step, DATA_DIR.value)
    print(
        f"Rebuilt the weights of outer step {found.step} from checkpoint {found.start} and "
        f"{found.step - found.start} records of the log; wrote {found.folder}."
    )
    for what, equal in found.equal.items():
        said = "equal, bit for bit, those of" if equal else "DIFFER from those of"
        print(f"They {said} {what}.")
    if found.start == found.step:
        print("Nothing was left to rebuild; give --from_step, an earlier checkpoint, to try it.")
    if not found.equal:
        print("The job left no weights of that step to compare with.")
    return 0 if all(found.equal.values()) else DIFFERS


def cli() -> None:
    """The installed command."""
    command_line.run_plain(main, __doc__)


if __name__ == "__main__":
    cli()
