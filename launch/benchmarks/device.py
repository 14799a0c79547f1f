"""The case ``device``: one population on the device there is, from a few inner runs to thousands.

Lines for each size, and for float32 and bfloat16 products of the learned optimizer: inner steps a
second, memory, the time over that of bare forward and backward passes, and the share of the chip's
rate, where it is known. The inner tasks are the four of the suite ``celo4``, which have one shape,
so that they are one vmapped population and one program.
"""

import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import numpy as np
import optax

from launch.benchmarks.timing import in_turns
from launch.config import Config, estimator, optimizer, task
from launch.trainables import make_system
from learned_opt.base import learned_optimizer
from meta_train import devices, estimators, trainer

SIZES = (16, 64, 256, 1024, 4096, 16384)
TASKS = "digits,mnist5k_8,patches_8,textures_8"
ROUNDS, WARM_UP = 10, 2
# Dense bfloat16 products a second of one chip, as its maker says.
RATES = {"H100": 989e12, "H200": 989e12, "A100": 312e12}


def lines(
    num_devices: int, sizes: tuple[int, ...] = SIZES, rounds: int = ROUNDS
) -> Iterator[dict[str, Any]]:
    """A line a size and precision, in the order of size."""
    devices.configure_cpu_devices(num_devices)
    for size in sizes:
        for bfloat16 in (False, True):
            yield _line(_config(size, num_devices, bfloat16), rounds)


def _config(size: int, num_devices: int, bfloat16: bool) -> Config:
    return Config(
        num_devices=num_devices,
        eval_every=0,
        task=task("mlp", dataset=TASKS, hidden_sizes=(32,)),
        optimizer=optimizer("mlp", bfloat16=bfloat16),
        estimator=estimator("pes", num_particles=size, truncation=20),
    )


def _line(config: Config, rounds: int) -> dict[str, Any]:
    shards = config.estimator.shards.parts
    count = devices.choose_num_devices(config.num_devices, shards)
    made = config.optimizer.make()
    plain = learned_optimizer(made.init, lambda theta, n: optax.sgd(0.1))
    case, step, memory = _again(config, made, count)
    floor, _, _ = _again(config, plain, count)
    times = in_turns({"case": case, "floor": floor}, rounds, WARM_UP, time.perf_counter)
    seconds = float(np.median(times["case"]))
    chip = jax.local_devices()[0]
    rate = next((r for name, r in RATES.items() if name in chip.device_kind), None)
    flops = (step.cost_analysis() or {}).get("flops")
    # Of a loop, XLA counts the body once; a truncation is one.
    flops = flops * config.estimator.truncation if flops else None  # type: ignore[attr-defined]
    peak = (chip.memory_stats() or {}).get("peak_bytes_in_use")
    return {
        "device": chip.device_kind,
        "devices": count,
        "matmul_precision": jax.config.values["jax_default_matmul_precision"] or "JAX's default",
        "optimizer_products": "bfloat16" if config.optimizer.bfloat16 else "float32",  # type: ignore[attr-defined]
        "inner_runs": config.estimator.population.size * config.estimator.population.runs,
        "inner_steps_per_second": round(config.inner_steps() / seconds),
        "ms_per_outer_step": round(1e3 * seconds, 2),
        "ratio_to_floor": round(float(np.median(times["case"] / times["floor"])), 2),
        "temporary_memory_mb": round(memory.temp_size_in_bytes / 2**20, 1),
        "peak_memory_mb": round(peak / 2**20) if peak else None,
        "share_of_chip_rate": flops / seconds / rate if flops and rate else None,
    }


def _again(config: Config, made: Any, count: int) -> tuple[Any, Any, Any]:
    """``(step, state)`` for ``in_turns``, the compiled step, and its memory."""
    system = make_system(config, config.task.make(), made)
    context = estimators.Context(devices.default_chunk())
    estimate = config.estimator.make(system, config.horizons(), context)
    meta = config.meta.make(config.num_steps)
    start = partial(trainer.init_state, estimate, meta, made.init, 0)
    step = trainer.make_step(estimate, meta, devices.device_mean)
    state = devices.place(jax.jit(start)(), count, trainer.PARTICLE_AXES)
    mapped: Any = devices.population_map(step, count, trainer.PARTICLE_AXES)
    compiled = mapped.lower(state).compile()
    return (compiled, state), compiled, compiled.memory_analysis()
