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
PRODUCTS = ("float32", "bfloat16")
ROUNDS, WARM_UP = 10, 2
# Dense bfloat16 products a second of one chip, as its maker says.
RATES = {"H100": 989e12, "H200": 989e12, "A100": 312e12}


def lines(
    num_devices: int, sizes: tuple[int, ...] = SIZES, rounds: int = ROUNDS
) -> Iterator[dict[str, Any]]:
    """A line a size and precision, in the order of size."""
    devices.configure_cpu_devices(num_devices)
    for size in sizes:
        yield from _lines(size, num_devices, rounds)


def _config(size: int, num_devices: int, bfloat16: bool) -> Config:
    return Config(
        num_devices=num_devices,
        eval_every=0,
        task=task("mlp", dataset=TASKS, hidden_sizes=(32,)),
        optimizer=optimizer("mlp", bfloat16=bfloat16),
        estimator=estimator("pes", num_particles=size, truncation=20),
    )


def _lines(size: int, num_devices: int, rounds: int) -> Iterator[dict[str, Any]]:
    """Both precisions beside one floor, in turns."""
    configs = {dtype: _config(size, num_devices, dtype == "bfloat16") for dtype in PRODUCTS}
    first = configs[PRODUCTS[0]]
    count = devices.choose_num_devices(num_devices, first.estimator.shards.parts)
    plain = learned_optimizer(first.optimizer.make().init, lambda theta, n: optax.sgd(0.1))
    cases = {dtype: _again(each, each.optimizer.make(), count) for dtype, each in configs.items()}
    cases["floor"] = _again(first, plain, count)
    times = in_turns(cases, rounds, WARM_UP, time.perf_counter)
    chip = jax.local_devices()[0]
    rate = next((r for name, r in RATES.items() if name in chip.device_kind), None)
    for dtype, config in configs.items():
        step = cases[dtype][0]
        seconds, memory = float(np.median(times[dtype])), step.memory_analysis()
        flops = (step.cost_analysis() or {}).get("flops")
        # Of a loop, XLA counts the body once; a truncation is one.
        flops = flops * config.estimator.truncation if flops else None  # type: ignore[attr-defined]
        yield {
            "device": chip.device_kind,
            "devices": count,
            "matmul_precision": jax.config.values["jax_default_matmul_precision"]
            or "JAX's default",
            "optimizer_products": dtype,
            "inner_runs": config.estimator.population.size * config.estimator.population.runs,
            "inner_steps_per_second": round(config.inner_steps() / seconds),
            "ms_per_outer_step": round(1e3 * seconds, 2),
            "ratio_to_floor": round(float(np.median(times[dtype] / times["floor"])), 2),
            "state_mb": round(memory.argument_size_in_bytes / 2**20, 1),
            "temporary_memory_mb": round(memory.temp_size_in_bytes / 2**20, 1),
            "share_of_chip_rate": flops / seconds / rate if flops and rate else None,
        }


def _again(config: Config, made: Any, count: int) -> tuple[Any, Any]:
    """The compiled step, and its first state."""
    system = make_system(config, config.task.make(), made)
    context = estimators.Context(devices.default_chunk())
    estimate = config.estimator.make(system, config.horizons(), context)
    meta = config.meta.make(config.num_steps)
    start = partial(trainer.init_state, estimate, meta, made.init, 0)
    step = trainer.make_step(estimate, meta, devices.device_mean)
    state = devices.place(jax.jit(start)(), count, trainer.PARTICLE_AXES)
    mapped: Any = devices.population_map(step, count, trainer.PARTICLE_AXES)
    return mapped.lower(state).compile(), state
