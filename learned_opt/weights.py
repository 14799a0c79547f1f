"""A trained optimizer on disk: ``theta.safetensors``, ``config.json`` and a model card."""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from learned_opt.base import LearnedOptimizer, Theta
from learned_opt.mlp import mlp_optimizer
from learned_opt.reversible import reversible_mlp_optimizer
from learned_opt.tuned import (
    learnable_adam,
    learnable_schedule,
    learnable_sgdm,
    per_tensor_sgdm,
)

OPTIMIZERS: dict[str, Callable[..., LearnedOptimizer]] = {
    "mlp": mlp_optimizer,
    "reversible_mlp": reversible_mlp_optimizer,
    "sgdm": learnable_sgdm,
    "adam": learnable_adam,
    "schedule": learnable_schedule,
    "per_tensor_sgdm": per_tensor_sgdm,
}


def save(
    path: str | os.PathLike,
    name: str,
    arguments: Mapping[str, Any],
    theta: Theta,
    *,
    training: Mapping[str, Any] | None = None,
) -> None:
    """Writes a trained optimizer to the folder ``path``.

    Args:
      path: folder, made if missing; each file is replaced in one move.
      name: a key of ``OPTIMIZERS``.
      arguments: keyword arguments of that constructor, JSON-serializable.
      theta: meta-parameters, nested dicts of arrays.
      training: how theta came about (task, horizon, estimator, cost), for the model card.

    Raises:
      ValueError: on an unknown name, or a theta that does not fit the optimizer.
    """
    _check_theta(_build(name, arguments), theta, f"optimizer {name!r}")
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    arrays = {key: np.asarray(value) for key, value in flatten_dict(theta, sep="/").items()}
    config = {
        "format": 1,
        "name": name,
        "arguments": dict(arguments),
        "training": dict(training or {}),
    }
    save_file(arrays, path / "theta.safetensors.tmp")
    os.replace(path / "theta.safetensors.tmp", path / "theta.safetensors")
    _write(path / "config.json", json.dumps(config, indent=2) + "\n")
    _write(path / "README.md", _model_card(name, arguments, arrays, training or {}))


def load_config(path: str | os.PathLike) -> dict[str, Any]:
    """``config.json`` of a trained optimizer: its ``name``, ``arguments`` and ``training``.

    Raises:
      ValueError: if the folder holds no trained optimizer.
    """
    path = Path(path)
    missing = [name for name in ("config.json", "theta.safetensors") if not (path / name).is_file()]
    if missing:
        raise ValueError(
            f"`path` {str(path)!r} is not a trained optimizer: {' and '.join(missing)} missing. "
            "`python -m launch.train` writes one to WORKDIR/optimizer."
        )
    return json.loads((path / "config.json").read_text())


def load(path: str | os.PathLike) -> tuple[LearnedOptimizer, Theta]:
    """Reads a trained optimizer: ``optimizer, theta = load(path)``, then ``optimizer.bind``.

    Raises:
      ValueError: if the folder holds no trained optimizer, or one that does not fit its config.
    """
    config = load_config(path)
    optimizer = _build(config["name"], config["arguments"])
    try:
        arrays = load_file(Path(path) / "theta.safetensors")
    except SafetensorError as error:
        raise ValueError(f"`path` {path}: theta.safetensors is damaged ({error}).") from error
    theta = unflatten_dict({key: jnp.asarray(value) for key, value in arrays.items()}, sep="/")
    _check_theta(optimizer, theta, str(path))
    return optimizer, theta


def _build(name: str, arguments: Mapping[str, Any]) -> LearnedOptimizer:
    if name not in OPTIMIZERS:
        raise ValueError(f"`name` must be one of {sorted(OPTIMIZERS)}, got {name!r}.")
    return OPTIMIZERS[name](**arguments)


def _check_theta(optimizer: LearnedOptimizer, theta: Theta, where: str) -> None:
    expected = jax.eval_shape(optimizer.init, jax.random.key(0))
    shapes = [
        {key: tuple(value.shape) for key, value in flatten_dict(tree, sep="/").items()}
        for tree in (expected, theta)
    ]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"`theta` does not fit {where}: expected shapes {shapes[0]}, got {shapes[1]}."
        )


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def _model_card(name, arguments, arrays, training) -> str:
    size = sum(array.size for array in arrays.values())
    lines = [
        f"# Learned optimizer `{name}`",
        "",
        f"{size:,} meta-parameters; arguments `{json.dumps(dict(arguments))}`.",
        "",
        "```python",
        "import learned_opt",
        "",
        'optimizer, theta = learned_opt.load("PATH_OF_THIS_FOLDER")',
        "tx = optimizer.bind(theta, num_steps=1000)  # an optax transformation",
        "```",
        "",
        "## Training",
        "",
        *[f"- {key}: {json.dumps(value)}" for key, value in training.items()],
        "",
        "## Limits",
        "",
        "- Trained on this task at this horizon alone; elsewhere it may do badly or diverge.",
        "- Its loss on the task's test split, and beside tuned baselines, is not known until",
        "  `python -m launch.evaluate --optimizer=PATH_OF_THIS_FOLDER --workdir=DIR` has run.",
        "",
    ]
    return "\n".join(lines)
