"""What a job's numbers follow from besides its configuration: JAX's settings and the machine.

Saved with every checkpoint. What decides the numbers must be the same when the job continues;
what only rounds differently is said.
"""

import enum
import os
from typing import Any

import jax

# Settings that change what is drawn, or computed beyond rounding, and JAX's defaults: what
# checkpoints without a record are taken to have had. The variable of the environment that sets
# one is its name in capitals.
DECIDING: dict[str, Any] = {
    "jax_enable_x64": False,
    "jax_explicit_x64_dtypes": "warn",
    "jax_default_prng_impl": "threefry2x32",
    "jax_threefry_partitionable": True,
    "jax_random_seed_offset": 0,
    "jax_high_dynamic_range_gumbel": False,
    "jax_default_matmul_precision": None,
    "jax_numpy_dtype_promotion": "standard",
    "jax_softmax_custom_jvp": False,
}
# Settings that only round differently.
ROUNDING: tuple[str, ...] = (
    "jax_disable_jit",
    "jax_disable_most_optimizations",
    "jax_optimization_level",
    "jax_exec_time_optimization_effort",
    "jax_allow_f16_reductions",
    "jax_use_direct_linearize",
)


def record(num_devices: int) -> dict[str, Any]:
    """What this process computes with, as JSON; ``num_devices`` as the job uses of each process."""
    return {
        "decides": deciding_settings() | {"backend": jax.default_backend()},
        "rounds": {name: _setting(name) for name in ROUNDING}
        | {
            "jax": jax.__version__,
            "device": jax.local_devices()[0].device_kind,
            "devices": num_devices * jax.process_count(),
            "XLA_FLAGS": os.environ.get("XLA_FLAGS", ""),
            "NVIDIA_TF32_OVERRIDE": os.environ.get("NVIDIA_TF32_OVERRIDE", ""),
        },
    }


def deciding_settings() -> dict[str, Any]:
    """Those of ``DECIDING`` as they are here; asks no device."""
    return {name: _setting(name) for name in DECIDING}


def contradictions(now: dict[str, Any], then: dict[str, Any] | None) -> list[str]:
    """What decides the numbers and differs from the checkpoint's, and how to set it back.

    Args:
      now: what ``record`` says here.
      then: what it said when the checkpoint was saved; None if that is older than records.
    """
    saved = DECIDING | ((then or {}).get("decides") or {})
    return [
        f"{name}: the checkpoint has {saved[name]!r}, this process {value!r}; "
        + _how_to_set(name, saved[name])
        for name, value in now["decides"].items()
        if name in saved and value != saved[name]
    ]


def remarks(now: dict[str, Any], then: dict[str, Any] | None) -> list[str]:
    """What only rounds differently from the checkpoint's."""
    saved = (then or {}).get("rounds") or {}
    return [
        f"{name} was {saved[name]!r}, is {value!r}"
        for name, value in now["rounds"].items()
        if name in saved and value != saved[name]
    ]


def _setting(name: str) -> Any:
    # As this thread has it, which `values` does not know.
    value = getattr(jax.config, name, jax.config.values.get(name, DECIDING.get(name)))
    return value.name.lower() if isinstance(value, enum.Enum) else value


def _how_to_set(name: str, value: Any) -> str:
    if name == "backend":
        return f"set JAX_PLATFORMS={'cuda' if value == 'gpu' else value}."
    if value is None:
        return f"unset {name.upper()}."
    return f"set {name.upper()}={int(value) if isinstance(value, bool) else value}."
