"""Reads theta of published learned optimizers, as their authors' code wrote it."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from flax.serialization import msgpack_restore
from flax.traverse_util import flatten_dict, unflatten_dict

from learned_opt.base import LearnedOptimizer, OptimizerConfig, Theta
from learned_opt.paths import user_path
from learned_opt.weights import OPTIMIZERS


class Source(NamedTuple):
    """Where an array of ours is in their file.

    Attributes:
      keys: arrays of theirs, one after the other along the last axis but one.
      transposed: whether theirs has its last two axes the other way around.
      first: whether theirs has an axis of size 1 before all others.
    """

    keys: Sequence[str]
    transposed: bool = False
    first: bool = False


Table = Mapping[str, Source | None]  # None: not in their file, and 0.


def _haiku_rule(first: bool = False) -> dict[str, Source]:
    """The network of thirty inputs, which has a kernel for every kind of input."""
    keys = {"kernel_0": [f"w0__{i}" for i in range(14)]}
    keys |= {f"kernel_{i}": [f"w{i}"] for i in (1, 2)} | {f"bias_{i}": [f"b{i}"] for i in range(3)}
    return {
        ours: Source([f"ff_mod_stack/~/{key}" for key in theirs], first=first)
        for ours, theirs in keys.items()
    }


def _haiku_controller(with_controls: bool = True) -> dict[str, Source]:
    layers = {"overwritten": "linear", "pooled": "linear_1", "own": "linear_2"}
    layers |= {"lstm": "rnn/linear", "rate": "step_size"}
    layers |= {"controls": "rnn_to_controls"} if with_controls else {}
    table = {
        f"{ours}/{array}": Source([f"rnn_params/{theirs}/{array[0].replace('k', 'w')}"])
        for ours, theirs in layers.items()
        for array in ("kernel", "bias")
    }
    start = {f"initial_state/{x}": Source([f"lstm_init_state/{x}"]) for x in ("hidden", "cell")}
    return table | start


def _under(**parts: Table) -> dict[str, Source | None]:
    return {f"{part}/{key}": x for part, table in parts.items() for key, x in table.items()}


_HAIKU_SMALL: Table = {
    **{f"network/kernel_{i}": Source([f"nn/~/w{i}"]) for i in range(3)},
    **{f"network/bias_{i}": Source([f"nn/~/b{i}"]) for i in range(3)},
    "momentum_decays": Source(["momentum_decays"]),
    "square_decays": Source(["rms_decays"]),
    "factored_decays": Source(["adafactor_decays"]),
}
_HAIKU_VELO = _under(networks=_haiku_rule(), controller=_haiku_controller())

# Of google/learned_optimization and amoudgl/celo: nested dicts in Flax's msgpack.
HAIKU: dict[str, Table] = {
    "small_fc": _HAIKU_SMALL,
    "star": _HAIKU_SMALL,
    "celo": _under(rule=_haiku_rule(first=True), scheduler=_haiku_controller()),
    "celo_adam": _haiku_controller(with_controls=False),
    "celo2": _haiku_rule(),
    "celo2_base": _haiku_rule(),
    "velo": _HAIKU_VELO,
    "velo_s": _HAIKU_VELO,
}


def _linear(ours: str, theirs: str) -> dict[str, Source]:
    """PyTorch's layer, whose kernel is ``[outputs, inputs]``."""
    return {
        f"{ours}kernel": Source([f"{theirs}.weight"], transposed=True),
        f"{ours}bias": Source([f"{theirs}.bias"]),
    }


_PYLO_SMALL: dict[str, Source | None] = {
    f"network/{array}_{i}": source
    for i, layer in enumerate(("input", "linear_0", "output"))
    for array, source in _linear("", f"network.{layer}").items()
}
_PYLO_SMALL |= dict.fromkeys(("momentum_decays", "square_decays", "factored_decays"))
_PYLO_CELO2: Table = {
    "kernel_0": Source([f"w0.{i}" for i in range(14)]),
    "bias_0": Source(["b0"]),
    **{f"kernel_{i + 1}": Source([f"dense_w.{i}"]) for i in range(2)},
    **{f"bias_{i + 1}": Source([f"dense_b.{i}"]) for i in range(2)},
}
_PYLO_LAYERS = {
    "overwritten": "mix_layer1",
    "pooled": "mix_layer2",
    "own": "final_mix_layer",
    "lstm": "lstm.linear",
    "controls": "rnn_to_controls",
    "rate": "step_size",
}
_PYLO_VELO = _under(
    controller={
        **{
            k: x
            for our, their in _PYLO_LAYERS.items()
            for k, x in _linear(f"{our}/", their).items()
        },
        "initial_state/hidden": Source(["lstm_init_state.0"]),
        "initial_state/cell": Source(["lstm_init_state.1"]),
    },
    networks={
        **{
            f"kernel_{i}": Source([key.format("weights")], transposed=True)
            for i, key in enumerate(("input_{}_", "hidden_{}_.0", "output_{}_"))
        },
        **{
            f"bias_{i}": Source([key])
            for i, key in enumerate(("input_bias_", "hidden_bias_.0", "output_bias_"))
        },
    },
)
# The network that PyLO's VeLO mixed last is in its file too.
_IGNORED = {
    f"{layer}_{array}"
    for layer in ("input", "hidden", "output")
    for array in ("weights", "bias", "weights.0", "bias.0")
}

# Of Belilovsky-Lab/pylo: flat names in safetensors.
PYLO: dict[str, Table] = {
    "small_fc": _PYLO_SMALL,
    "celo2": _PYLO_CELO2,
    "celo2_base": _PYLO_CELO2,
    "velo": _PYLO_VELO,
    "velo_s": _PYLO_VELO,
}


def load_published(
    name: str, *paths: str | os.PathLike, **arguments: Any
) -> tuple[LearnedOptimizer, Theta]:
    """Reads a published theta: ``optimizer, theta = load_published("celo", "theta.state")``.

    It reads Flax's msgpack as google/learned_optimization and amoudgl/celo write it (theta, or a
    tuple whose first is theta), and PyLO's safetensors, whose kernels are transposed, whose VeLO is
    in two files, and whose decays, being no part of the file, are those of a fresh theta.

    Args:
      name: which optimizer it is, a key of ``OPTIMIZERS``.
      paths: the file, or the files that are one theta together.
      arguments: of that optimizer, as the theta needs them.

    Raises:
      ValueError: on a name without a published format, a file that is missing, damaged, a pickle
        (reading one runs its code) or of another optimizer, numbers that are not finite, or shapes
        that do not fit the arguments.
    """
    if name not in HAIKU:
        raise ValueError(f"`name` must be one of {sorted(HAIKU)}, got {name!r}.")
    made = OPTIMIZERS[name](**arguments)
    optimizer = made.make() if isinstance(made, OptimizerConfig) else made
    files = [user_path("paths", path) for path in paths]
    tables: list[dict[str, Table]] = []
    found: dict[str, Any] = {}
    for file in files:
        table, arrays = _read(file)
        tables.append(table)
        found |= arrays
    if not files or any(table is not tables[0] for table in tables):
        raise ValueError(f"`paths` must be one or more files of one format, got {paths!r}.")
    where = " and ".join(str(file) for file in files)
    return optimizer, _theta(where, optimizer, name, tables[0], found)


def theta_of(name: str, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Theta in our names, ``a/b`` for nested dicts, of arrays in Haiku's names."""
    return _renamed(HAIKU[name], arrays)


def _renamed(table, arrays):
    return {f"params/{ours}": _joined(x, arrays) for ours, x in table.items() if x is not None}


def _joined(source, arrays):
    parts = [arrays[key] for key in source.keys]
    parts = [x[0] for x in parts] if source.first else parts
    whole = np.concatenate(parts, axis=-2) if len(parts) > 1 else parts[0]
    return np.swapaxes(whole, -1, -2) if source.transposed else whole


def _theta(where, optimizer, name, tables, arrays):
    table = tables.get(name)
    if table is None:
        raise ValueError(f"`paths` {where!r}: there is no {name!r} in that format.")
    needed = {key for source in table.values() if source is not None for key in source.keys}
    missing, odd = sorted(needed - arrays.keys()), sorted(arrays.keys() - needed - _IGNORED)
    if missing or odd:
        problem = f"{missing[0]!r} is missing" if missing else f"{odd[0]!r} is no part of it"
        _refuse(where, f"holds no whole theta of {name!r} ({problem})")
    for key in sorted(needed):
        x = arrays[key]
        if not isinstance(x, np.ndarray) or not jnp.issubdtype(x.dtype, jnp.floating):
            _refuse(where, f"is damaged ({key!r} holds no floats)")
        if not np.isfinite(x.astype(np.float64)).all():
            _refuse(where, f"is damaged ({key!r} is not finite)")
    try:
        theta = _renamed(table, arrays)
    except (ValueError, IndexError):  # Parts whose shapes do not go together.
        _refuse(where, "is damaged (its arrays do not fit each other)")
    expected = flatten_dict(jax.eval_shape(optimizer.init, jax.random.key(0)), sep="/")
    theta |= {key: np.zeros(x.shape) for key, x in expected.items() if key not in theta}
    for key, spec in expected.items():
        if theta[key].shape != spec.shape:
            raise ValueError(
                f"`arguments` of {name!r} must fit the theta in {where!r}: it has "
                f"{theta[key].shape} where they make {spec.shape} ({key.removeprefix('params/')})."
            )
    as_given = {key: jnp.asarray(theta[key], spec.dtype) for key, spec in expected.items()}
    return unflatten_dict(as_given, sep="/")


def _read(file: Path) -> tuple[dict[str, Table], dict[str, Any]]:
    """The names that a file is in, and its arrays by ``a/b`` for nested dicts."""
    try:
        contents = file.read_bytes()
    except OSError as error:
        raise ValueError(f"`paths` {str(file)!r} cannot be read ({error.strerror}).") from None
    # The second byte of a pickle is its protocol; archives are NumPy's or PyTorch's.
    is_pickle = contents[:1] == b"\x80" and contents[1:2] in (b"\2", b"\3", b"\4", b"\5")
    if is_pickle or contents[:2] == b"PK" or file.suffix in (".pkl", ".pickle", ".pt", ".pth"):
        raise ValueError(
            f"`paths` {str(file)!r} is a pickle, or an archive that may hold one, and reading it "
            "could run code of its author; save its arrays as safetensors."
        )
    if contents[8:9] == b"{":
        try:
            return PYLO, safetensors.numpy.load(contents)
        except Exception as error:  # Whatever the reader stumbled over, the file is no sound one.
            _refuse(file, f"is damaged ({_first_line(error)})")
    try:
        tree = msgpack_restore(contents)
    except Exception as error:
        _refuse(file, f"is damaged, or no msgpack or safetensors ({_first_line(error)})")
    if isinstance(tree, dict) and tree.keys() == {"0", "1", "2"}:
        tree = tree["0"]  # Theta, the name of a run, and a step.
    if not isinstance(tree, dict):
        _refuse(file, "holds no theta (it is no dictionary)")
    try:
        return HAIKU, flatten_dict(tree, sep="/")
    except (TypeError, RecursionError):
        _refuse(file, "holds no theta (its names are no words)")


def _refuse(where: Any, problem: str) -> NoReturn:
    raise ValueError(f"`paths` {str(where)!r} {problem}; download it again, or name what it is.")


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
