"""A trained optimizer on disk: ``theta.safetensors``, ``config.json`` and a model card.

``config.json`` of format 2 holds the SHA-256 of the weights and of itself. Format 1 has none.
The card is for people, who may write on in it: nothing reads it, and no digest is of it.
A save takes effect in one move, that of ``config.json``: until its weights have taken their place
too, they are found under a second name.
"""

import hashlib
import json
import math
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from flax.traverse_util import flatten_dict, unflatten_dict

from learned_opt.adam import learnable_adam, learnable_nadamw
from learned_opt.adam_controller import adam_controller
from learned_opt.base import LearnedOptimizer, OptimizerConfig, Theta
from learned_opt.celo import celo_optimizer
from learned_opt.celo2 import celo2_base_optimizer, celo2_optimizer
from learned_opt.celo_adam import celo_adam_optimizer
from learned_opt.l3rs import l3rs_optimizer
from learned_opt.lion import learnable_lion
from learned_opt.mlp import mlp_optimizer
from learned_opt.model_card import model_card
from learned_opt.muon import learnable_muon
from learned_opt.named import check_named
from learned_opt.nn_adam import nn_adam
from learned_opt.paths import writable_folder
from learned_opt.pretrained import available, trained_folder
from learned_opt.reversible import reversible_mlp_optimizer
from learned_opt.rnn_mlp import rnn_mlp_optimizer
from learned_opt.small_fc import small_fc_optimizer
from learned_opt.star import star_optimizer
from learned_opt.tuned import learnable_schedule, learnable_sgdm, per_tensor_sgdm
from learned_opt.velo import velo_optimizer, velo_s_optimizer

OPTIMIZERS: dict[str, Callable[..., LearnedOptimizer | OptimizerConfig]] = {
    "adam_controller": adam_controller,
    "mlp": mlp_optimizer,
    "reversible_mlp": reversible_mlp_optimizer,
    "small_fc": small_fc_optimizer,
    "star": star_optimizer,
    "celo": celo_optimizer,
    "celo_adam": celo_adam_optimizer,
    "velo": velo_optimizer,
    "velo_s": velo_s_optimizer,
    "celo2": celo2_optimizer,
    "celo2_base": celo2_base_optimizer,
    "sgdm": learnable_sgdm,
    "adam": learnable_adam,
    "nadamw": learnable_nadamw,
    "lion": learnable_lion,
    "muon": learnable_muon,
    "l3rs": l3rs_optimizer,
    "nn_adam": nn_adam,
    "rnn_mlp": rnn_mlp_optimizer,
    "schedule": learnable_schedule,
    "per_tensor_sgdm": per_tensor_sgdm,
}


FORMAT = 2
_CONFIG, _THETA, _CARD = "config.json", "theta.safetensors", "README.md"
_STAGED = ".new"
_KEYS = {1: {"format", "name", "arguments", "training"}}
_KEYS[2] = _KEYS[1] | {"sha256"}


def save(
    path: str | os.PathLike,
    name: str,
    arguments: Mapping[str, Any],
    theta: Theta,
    *,
    training: Mapping[str, Any] | None = None,
) -> None:
    """Writes a trained optimizer to the folder ``path``, all of it or nothing.

    Args:
      path: folder, made if missing; ``~`` is the home folder.
      name: a key of ``OPTIMIZERS``, or ``MODULE:NAME`` of an imported module.
      arguments: keyword arguments of that constructor, JSON values.
      theta: meta-parameters, nested dicts of finite float arrays.
      training: how theta came about (task, horizon, estimator, seed, cost), for the model card;
        JSON values, of which numbers that are not finite are written as null.

    Raises:
      ValueError: before anything is written, if ``path`` cannot be written or holds something
        else, on an unknown name,
        arguments that are not the optimizer's or no JSON, or a theta that does not fit it or is
        not finite.
    """
    folder = writable_folder("path", path)
    if _is_of_something_else(folder / _CONFIG):
        raise ValueError(
            f"`path` must be a folder of its own, got {str(path)!r}, which has a {_CONFIG} of "
            "something else (a job's, perhaps); give another one."
        )
    arguments = _json_values("arguments", arguments)
    training = _json_values("training", _without_infinities(training or {}))
    where = f"optimizer {name!r}"
    optimizer = _build(name, arguments, where)
    if not isinstance(theta, Mapping):
        raise ValueError(f"`theta` must be nested dicts of arrays, got {type(theta).__name__}.")
    arrays = {key: np.asarray(value) for key, value in flatten_dict(theta, sep="/").items()}
    _check_arrays(optimizer, arrays, where)
    # Half precision is written wider: NumPy has no bfloat16.
    wide = {key: np.float64 if x.dtype == np.float64 else np.float32 for key, x in arrays.items()}
    arrays = {key: x.astype(wide[key], order="C") for key, x in arrays.items()}

    weights = safetensors.numpy.save(arrays)
    digests = {_THETA: hashlib.sha256(weights).hexdigest()}
    config = {"format": FORMAT, "name": name, "arguments": arguments, "training": training}
    config["sha256"] = digests | {_CONFIG: _config_digest({**config, "sha256": digests})}
    size = sum(x.size for x in arrays.values())
    card = model_card(name, arguments, size, training, optimizer.moves_without_gradient)
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder, _rendered(config).encode(), weights, card.encode())


def _is_of_something_else(config: Path) -> bool:
    """Whether it is a sound file that no export wrote, a job's perhaps."""
    try:
        found = json.loads(config.read_text())
    except (OSError, ValueError):
        return False
    return isinstance(found, dict) and "format" not in found


def load_config(path: str | os.PathLike) -> dict[str, Any]:
    """``config.json`` of a trained optimizer: its ``name``, ``arguments`` and ``training``.

    Args:
      path: its folder, or the name of one that comes with the package (see ``available``).

    Raises:
      ValueError: if the folder holds no trained optimizer, a damaged one, or one of a newer
        version.
    """
    return _read(trained_folder(path))[0]


def load(path: str | os.PathLike) -> tuple[LearnedOptimizer, Theta]:
    """Reads a trained optimizer: ``optimizer, theta = load(path)``, then ``optimizer.bind``.

    Args:
      path: its folder, or the name of one that comes with the package (see ``available``).

    Raises:
      ValueError: as ``load_config``, and if the weights do not fit ``config.json`` or are not
        finite.
    """
    folder = trained_folder(path)
    config, weights = _read(folder)
    where = f"{str(folder)!r}"
    optimizer = _build(config["name"], config["arguments"], where)
    try:
        # As they will be used: a number that only float64 holds is infinite in float32.
        arrays = {
            key: np.asarray(jnp.asarray(x)) for key, x in safetensors.numpy.load(weights).items()
        }
    except Exception as error:  # Whatever the reader stumbled over, the file is no sound one.
        _refuse(folder, f"{_THETA} is damaged ({_first_line(error)})")
    _check_arrays(optimizer, arrays, where)
    theta = unflatten_dict({key: jnp.asarray(value) for key, value in arrays.items()}, sep="/")
    return optimizer, theta


def _read(folder: Path) -> tuple[dict[str, Any], bytes]:
    """A config whose keys, types and digests are right, and the weights it speaks of."""
    found = {name: _contents(folder, name) for name in (_CONFIG, _THETA, _THETA + _STAGED)}
    text, candidates = found[_CONFIG], [x for x in list(found.values())[1:] if x is not None]
    missing = [name for name, x in ((_CONFIG, text), (_THETA, candidates or None)) if x is None]
    if text is None or missing:
        raise ValueError(
            f"`path` {str(folder)!r} is not a trained optimizer: {' and '.join(missing)} missing. "
            "`python -m launch.train` writes one to WORKDIR/optimizer; with the package come "
            f"{', '.join(available())}."
        )
    config = _parsed(folder, text)
    if config["format"] == 1:
        return config, candidates[0]
    for weights in candidates:
        if hashlib.sha256(weights).hexdigest() == config["sha256"][_THETA]:
            return config, weights
    _refuse(folder, f"{_THETA} is damaged, or not the one {_CONFIG} was written with")


def _contents(folder: Path, name: str) -> bytes | None:
    if not os.path.isfile(folder / name):
        return None
    try:
        return (folder / name).read_bytes()
    except OSError as error:
        raise ValueError(
            f"`path` {str(folder)!r}: {name} cannot be read ({error.strerror})."
        ) from None


def _parsed(folder: Path, contents: bytes) -> dict[str, Any]:
    try:
        text = contents.decode().replace("\r\n", "\n")  # As some version control makes it.
        config = json.loads(text, parse_constant=_not_json)
    except (ValueError, RecursionError) as error:
        _refuse(folder, f"{_CONFIG} is damaged ({_first_line(error)})")
    version = config.get("format") if isinstance(config, dict) else None
    if type(version) is not int or version < 1:
        raise ValueError(
            f"`path` {str(folder)!r} is not a trained optimizer: its {_CONFIG} has no `format`. "
            "`python -m launch.train` writes one to WORKDIR/optimizer."
        )
    if version > FORMAT:
        raise ValueError(
            f"`path` {str(folder)!r} was written by a newer version, got format {version} where "
            f"this one reads up to {FORMAT}; install the newer version."
        )
    if set(config) != _KEYS[version]:
        odd = sorted(set(config) ^ _KEYS[version])
        _refuse(folder, f"{_CONFIG} is damaged (missing or unknown: {', '.join(odd)})")
    for key, kind in (("name", str), ("arguments", dict), ("training", dict), ("sha256", dict)):
        if not isinstance(config.get(key, kind()), kind):
            _refuse(folder, f"{_CONFIG} is damaged (`{key}` is no {kind.__name__})")
    if version == 2:
        digests = config["sha256"]
        sound = set(digests) == {_THETA, _CONFIG} and digests[_CONFIG] == _config_digest(config)
        # The text too: 1e-05 and 1E-05 are one number, and one bit apart.
        if not sound or _rendered(config) != text:
            _refuse(folder, f"{_CONFIG} is damaged or was edited (its own SHA-256 does not fit)")
    return config


def _refuse(folder: Path, problem: str) -> NoReturn:
    raise ValueError(f"`path` {str(folder)!r}: {problem}; copy or export the folder again.")


def _not_json(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no JSON")


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def _rendered(config: Mapping[str, Any]) -> str:
    return json.dumps(config, indent=2, allow_nan=False) + "\n"


def _config_digest(config: Mapping[str, Any]) -> str:
    """SHA-256 of the config without this very number."""
    others = {key: value for key, value in config["sha256"].items() if key != _CONFIG}
    return hashlib.sha256(_rendered({**config, "sha256": others}).encode()).hexdigest()


def _json_values(argument: str, value: Any) -> dict[str, Any]:
    """``value`` as it will be read back."""
    if not isinstance(value, Mapping):
        raise ValueError(f"`{argument}` must be a dict, got {value!r}.")
    try:
        return json.loads(json.dumps(dict(value), allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(
            f"`{argument}` must be JSON values (numbers that are finite, strings, lists, dicts), "
            f"got {value!r}: {error}."
        ) from None


def _without_infinities(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_infinities(x) for key, x in value.items()}
    if isinstance(value, list | tuple):
        return [_without_infinities(x) for x in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _build(name: str, arguments: Mapping[str, Any], where: str) -> LearnedOptimizer:
    thing = _named(name)
    try:
        made = thing(**arguments)
        return made.make() if isinstance(made, OptimizerConfig) else made
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"`arguments` of {where} must be those of `{name}`, got {dict(arguments)}: {error}"
        ) from None


def _named(name: Any) -> Callable[..., LearnedOptimizer | OptimizerConfig]:
    """What a file may name: an optimizer of ours, or one of a module that is imported already."""
    if isinstance(name, str) and name in OPTIMIZERS:
        return OPTIMIZERS[name]
    module, colon, attribute = name.partition(":") if isinstance(name, str) else ("", "", "")
    if not colon:
        raise ValueError(
            f"`name` must be one of {sorted(OPTIMIZERS)}, or MODULE:NAME, got {name!r}."
        )
    if module not in sys.modules:
        raise ValueError(
            f"`name` is {name!r}, an optimizer from outside this library. Loading runs no code "
            f"that a file names: import {module} first (on the command line: --import={module})."
        )
    if not hasattr(sys.modules[module], attribute):
        raise ValueError(f"`name` is {name!r}, but {module} has no {attribute!r}.")
    thing = getattr(sys.modules[module], attribute)
    try:
        check_named(name, thing, (LearnedOptimizer, OptimizerConfig))
    except ValueError as error:
        raise ValueError(f"`name` {error}") from None
    return thing


def _check_arrays(
    optimizer: LearnedOptimizer, arrays: Mapping[str, np.ndarray], where: str
) -> None:
    try:
        expected = flatten_dict(jax.eval_shape(optimizer.init, jax.random.key(0)), sep="/")
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(
            f"`arguments` of {where} make no optimizer: {_first_line(error)}."
        ) from None
    shapes = [{key: tuple(x.shape) for key, x in found.items()} for found in (expected, arrays)]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"`theta` does not fit {where}: expected shapes {shapes[0]}, got {shapes[1]}."
        )
    for key, x in arrays.items():
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(f"`theta` of {where} must be real floats, got {x.dtype} in {key}.")
        if not np.isfinite(x.astype(np.float64)).all():
            raise ValueError(
                f"`theta` of {where} must be finite, got NaN or infinity in {key}; it diverged in "
                "meta-training: take an earlier checkpoint, or train with a smaller step."
            )


def _write(folder: Path, config: bytes, weights: bytes, card: bytes) -> None:
    """The three files, in the order that keeps the folder readable whenever it stops."""
    _finish_interrupted(folder)
    contents = {_CONFIG: config, _THETA: weights, _CARD: card}
    staged = {name: folder / (name + _STAGED) for name in contents}
    try:
        for name, path in staged.items():
            path.unlink(missing_ok=True)
            with open(path, "xb") as file:  # Its mode is that of any new file.
                file.write(contents[name])
                file.flush()
                os.fsync(file.fileno())
        for name, path in staged.items():
            os.replace(path, folder / name)  # With the first one the new optimizer holds.
    except BaseException:
        if staged[_CONFIG].exists():  # Else the staged weights are the ones that hold.
            for path in reversed(staged.values()):
                path.unlink(missing_ok=True)
        raise


def _finish_interrupted(folder: Path) -> None:
    """Puts the weights of a save that was killed after its first move into their place."""
    staged = folder / (_THETA + _STAGED)
    try:
        if staged.exists() and staged.read_bytes() == _read(folder)[1]:
            os.replace(staged, folder / _THETA)
    except ValueError:
        pass  # Nothing sound is there that could be lost.
