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
    **{f"network/kernel_{i}": [f"nn/~/w{i}"] for i in range(3)},
    **{f"network/bias_{i}": [f"nn/~/b{i}"] for i in range(3)},
    "momentum_decays": ["momentum_decays"],
    "square_decays": ["rms_decays"],
    "factored_decays": ["adafactor_decays"],
}
_SCHEDULER = {
    "initial_state/hidden": ["lstm_init_state/hidden"],
    "initial_state/cell": ["lstm_init_state/cell"],
    **{
        f"{ours}/{our_array}": [f"rnn_params/{theirs}/{their_array}"]
        for ours, theirs in {
            "overwritten": "linear",
            "pooled": "linear_1",
            "own": "linear_2",
            "lstm": "rnn/linear",
            "rate": "step_size",
        }.items()
        for our_array, their_array in (("kernel", "w"), ("bias", "b"))
    },
}
_CONTROLLER = _SCHEDULER | {
    "controls/kernel": ["rnn_params/rnn_to_controls/w"],
    "controls/bias": ["rnn_params/rnn_to_controls/b"],
}


def _under(**parts: Mapping[str, list[str]]) -> dict[str, list[str]]:
    return {f"{part}/{key}": x for part, table in parts.items() for key, x in table.items()}


NAMES: dict[str, Mapping[str, list[str]]] = {
    "small_fc": _SMALL_NETWORK,
    "star": _SMALL_NETWORK,
    "celo": _under(rule=_THIRTY_INPUTS, scheduler=_CONTROLLER),
    "celo_adam": _SCHEDULER,
    "celo2": _THIRTY_INPUTS,
    "celo2_base": _THIRTY_INPUTS,
    "velo": _under(networks=_THIRTY_INPUTS, controller=_CONTROLLER),
    "velo_s": _under(networks=_THIRTY_INPUTS, controller=_CONTROLLER),
}


def renamed(name: str, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    found = {}
    for ours, theirs in NAMES[name].items():
        parts = [arrays[key] for key in theirs]
        x = np.concatenate(parts, axis=-2) if len(parts) > 1 else parts[0]
        found[f"params/{ours}"] = x[0] if name == "celo" and ours.startswith("rule/") else x
    return found
