"""Published theta files."""

from collections.abc import Mapping

import numpy as np

# Of every array of ours the arrays of theirs that it is, one after the other.
_THIRTY_INPUTS = {
    "kernel_0": [f"ff_mod_stack/~/w0__{i}" for i in range(14)],
    **{f"kernel_{i}": [f"ff_mod_stack/~/w{i}"] for i in (1, 2)},
    **{f"bias_{i}": [f"ff_mod_stack/~/b{i}"] for i in (0, 1, 2)},
}
_SMALL_NETWORK = {
    **{f"params/network/kernel_{i}": [f"nn/~/w{i}"] for i in range(3)},
    **{f"params/network/bias_{i}": [f"nn/~/b{i}"] for i in range(3)},
    "params/momentum_decays": ["momentum_decays"],
    "params/square_decays": ["rms_decays"],
    "params/factored_decays": ["adafactor_decays"],
}
NAMES: dict[str, Mapping[str, list[str]]] = {
    "small_fc": _SMALL_NETWORK,
    "star": _SMALL_NETWORK,
    "celo2": {f"params/{ours}": theirs for ours, theirs in _THIRTY_INPUTS.items()},
}
NAMES["celo2_base"] = NAMES["celo2"]


def renamed(name: str, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {
        ours: np.concatenate([arrays[key] for key in theirs], axis=-2 if len(theirs) > 1 else 0)
        for ours, theirs in NAMES[name].items()
    }
