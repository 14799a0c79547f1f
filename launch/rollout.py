"""Rolls a trained policy out in Gymnasium's own simulation, and prints its returns.

python -m launch.rollout --policy=WORKDIR/policy [--num_rollouts=50] [--seed=0]
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags

from launch import command_line
from launch.path_flags import define_path

if TYPE_CHECKING:
    from tasks.dynamics.control import Control

_POLICY = define_path("policy", "Folder of a policy that launch.train wrote.")
_ROLLOUTS = flags.DEFINE_integer("num_rollouts", 50, "Episodes.", lower_bound=1)
_SEED = flags.DEFINE_integer("seed", 0, "Of the first start; the next has the next one.", 0)


def load_policy(folder: str | Path) -> tuple["Control", Any]:
    """What ``launch.train`` wrote: the environment with the kind of policy, and theta.

    Raises:
      ValueError: if there is none, or it cannot be read.
    """
    import jax
    import jax.numpy as jnp
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    from launch import leaves
    from launch.choices import thing_from_dict
    from tasks.dynamics.control import Control

    folder = Path(folder)
    try:
        document = json.loads((folder / "config.json").read_text())
        arrays = load_file(folder / "weights.safetensors")
        control = thing_from_dict("TaskConfig", document["policy"], str(folder / "config.json"))
    except (OSError, KeyError, TypeError, json.JSONDecodeError, SafetensorError) as error:
        raise ValueError(
            f"--policy={folder} is no trained policy ({error!r}); give the folder that "
            "launch.train wrote with trains=policy, WORKDIR/policy."
        ) from None
    if not isinstance(control, Control):
        raise ValueError(f"--policy={folder} is of {control}, which Gymnasium does not simulate.")
    spec = jax.eval_shape(control.acting()[1], jax.random.key(0))
    wanted = {name: leaf.shape for name, leaf in leaves.named(spec)}
    found = {name: array.shape for name, array in arrays.items()}
    if found != wanted:
        raise ValueError(
            f"--policy={folder} must have weights of the shapes {wanted}, as its config.json says, "
            f"got {found}; export it again."
        )
    theta = [jnp.asarray(arrays[name]) for name in wanted]
    return control, jax.tree.unflatten(jax.tree.structure(spec), theta)


def main(argv: list[str]) -> None:
    if argv:
        raise ValueError(f"Unexpected arguments {argv}; every option is --name=value.")
    if not _POLICY.value:
        raise ValueError("--policy=FOLDER is missing: a policy that launch.train wrote.")
    control, theta = load_policy(_POLICY.value)
    import jax
    import jax.numpy as jnp
    import numpy as np

    from tasks.dynamics.gymnasium_rollouts import gymnasium_returns
    from tasks.dynamics.mujoco_physics import ENVIRONMENTS

    run = jax.jit(gymnasium_returns(control, _ROLLOUTS.value))
    found = run(jax.tree.map(lambda x: x[None], theta), jnp.int32(_SEED.value))
    total, length = np.asarray(found.total)[0], np.asarray(found.length)[0]
    environment = ENVIRONMENTS[control.environment]
    print(
        f"{environment.id}: return {total.mean():.1f} (standard deviation {total.std():.1f}, "
        f"{total.min():.1f} to {total.max():.1f}) over {len(total)} rollouts of "
        f"{length.mean():.0f} steps on average; solved from {environment.threshold:g} on"
    )


def cli() -> None:
    """The installed command."""
    command_line.run_plain(main, __doc__)


if __name__ == "__main__":
    cli()
