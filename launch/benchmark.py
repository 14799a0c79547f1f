"""Speed, memory and compile time on fixed cases, as JSON lines.

  python -m launch.benchmark [--cases=pes,tbptt,loop,reversible,optimizers] [--cores=1,2]

Every case of ``CASES`` (but ``control``, which is run where it is named: it needs the extra of that
name) runs in a process of its own, pinned to its cores. Those of a train
step are timed in turns with their *floor*: the same population with the same batches, the
learned optimizer replaced by plain SGD, so bare forward and backward passes. Times are
medians; compare ratios, not machines. ``reversible`` prints each of its methods, then each of
its gates; ``optimizers`` each learned optimizer beside Adam (all, or those of ``--optimizers`` and
``--runs``; ``--into`` keeps the lines in a file, and leaves out those it has); ``scale`` and
``device``, only where they are asked for, devices, processes and populations. If a line says that
a limit was not kept, the command exits non-zero in the end.
"""

import dataclasses
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
from absl import flags, logging

from launch import command_line
from launch.choices import suggest
from launch.path_flags import define_path

_CORES = flags.DEFINE_list("cores", None, "Numbers of cores to pin to (default: 1 and all).")
_CHILD = flags.DEFINE_bool("child", False, "Internal: run one case in this process.")
_DEVICES = flags.DEFINE_integer("num_devices", 0, "Devices per case; 0: one per core.")
_OPTIMIZERS = flags.DEFINE_list("optimizers", None, "Of the case of that name (default: all).")
_RUNS = flags.DEFINE_list("runs", None, "What is trained in the case `optimizers` (default: all).")
_INTO = define_path("into", "File for the lines of the case `optimizers`.")


_STEPS = 30
_LOOP_STEPS = 300


def case_config(name: str, num_devices: int):
    """Digits MLP 64-32-10 with ReLU, batch 64, float32; horizon 100, truncation 20."""
    from launch.config import Config, estimator

    particles = 16 if name == "tbptt" else 32
    return Config(
        estimator=estimator(
            "pes" if name == "loop" else name, num_particles=particles, truncation=20
        ),
        num_steps=_LOOP_STEPS,
        num_devices=num_devices,
        eval_every=0,
        wandb_mode="offline",
    )


def train_step(name: str, num_devices: int) -> list[dict]:
    """A train step with the estimator of that name, or the whole train loop."""
    import jax
    import optax

    from launch.config import estimator as choose_estimator
    from launch.job import build
    from launch.trainables import make_system
    from learned_opt.base import learned_optimizer
    from meta_train import devices, estimators, trainer

    config = case_config(name, num_devices)
    job = build(config, None)
    state = jax.block_until_ready(jax.jit(job.init)())
    devices.forget_compiled()
    state = devices.place(state, job.num_devices, job.axes)
    began = time.perf_counter()
    step = job.step.lower(state).compile()
    compile_seconds = time.perf_counter() - began
    devices.trim_memory()
    state, metrics = job.step(state)
    jax.block_until_ready(metrics)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    inner_steps = config.inner_steps()
    row = {
        "devices": job.num_devices,
        "compile_seconds": round(compile_seconds, 2),
        "peak_memory_mb": round(peak),
        "temporary_memory_mb": round(step.memory_analysis().temp_size_in_bytes / 2**20),
    }
    if name == "loop":
        return [row | _loop(config, job, state, inner_steps)]

    optimizer = config.optimizer.make()
    floor_optimizer = learned_optimizer(optimizer.init, lambda theta, n: optax.sgd(0.1))
    system = make_system(config, config.task.make(), floor_optimizer)
    # A gradient with respect to an unused theta would be dead code: the floor of TBPTT is
    # the forward unroll of inner training too.
    floor_config = config
    if name == "tbptt":
        floor_config = dataclasses.replace(
            config, estimator=choose_estimator("pes", num_particles=16, truncation=20)
        )
    context = estimators.Context(devices.default_chunk())
    estimator = floor_config.estimator.make(system, config.horizons(), context)
    meta_optimizer = config.meta.make(config.num_steps)
    floor_step = devices.population_map(
        trainer.make_step(estimator, meta_optimizer, devices.device_mean),
        job.num_devices,
        trainer.PARTICLE_AXES,
    )
    floor_state = devices.place(
        jax.jit(lambda: trainer.init_state(estimator, meta_optimizer, optimizer.init, 0))(),
        job.num_devices,
        trainer.PARTICLE_AXES,
    )
    times: dict[str, list[float]] = {"case": [], "floor": []}
    for i in range(_STEPS + 2):
        for label in times:
            began = time.perf_counter()
            if label == "case":
                state, metrics = job.step(state)
            else:
                floor_state, metrics = floor_step(floor_state)
            jax.block_until_ready(metrics)
            if i >= 2:
                times[label].append(time.perf_counter() - began)
    seconds, floor = (float(np.median(times[label])) for label in ("case", "floor"))
    floor_inner_steps = floor_config.inner_steps()
    return [
        row
        | {
            "ms_per_outer_step": round(1e3 * seconds, 2),
            "inner_steps_per_second": round(inner_steps / seconds),
            "ratio_to_floor": round((seconds / inner_steps) / (floor / floor_inner_steps), 2),
        }
    ]


def _loop(config, job, state, inner_steps) -> dict:
    """The whole train loop, with checkpoints every 100 steps, against the bare compiled step."""
    import jax

    from launch.loop import run

    ratios = []
    for _ in range(3):
        state, metrics = jax.block_until_ready(job.step(state))  # A run forgets what is compiled.
        began = time.perf_counter()
        for _ in range(_LOOP_STEPS):
            state, metrics = job.step(state)
            jax.block_until_ready(metrics)
        bare = (time.perf_counter() - began) / _LOOP_STEPS
        with tempfile.TemporaryDirectory() as folder:
            run(config, Path(folder))
            rows = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").open()]
        # From the first to the last logged step: start-up and compilation left out.
        loop = rows[-1]["time/wall_seconds"] - rows[1]["time/wall_seconds"]
        loop /= rows[-1]["step"] - rows[1]["step"]
        ratios.append((loop / bare, loop, bare))
    ratio, loop, bare = sorted(ratios)[1]
    return {
        "ms_per_outer_step": round(1e3 * loop, 2),
        "inner_steps_per_second": round(inner_steps / loop),
        "bare_step_ms": round(1e3 * bare, 2),
        "loop_over_bare_step": round(ratio, 3),
    }


def _pes_overhead(num_devices: int) -> list[dict]:
    from launch.benchmarks import pes_overhead

    return [pes_overhead.measure(num_devices)]


def _reversible(num_devices: int) -> list[dict]:
    del num_devices  # Its methods run on one.
    from launch.benchmarks import reversible

    return reversible.lines()


def _optimizers(num_devices: int) -> Iterable[dict]:
    from launch.benchmarks import optimizers

    names = _known("optimizers", _OPTIMIZERS.value, optimizers.MEASURED)
    runs = _known("runs", _RUNS.value, optimizers.RUNS)
    return optimizers.lines(num_devices, names, runs, Path(_INTO.value) if _INTO.value else None)


def _known(flag: str, names: list[str] | None, known: Iterable[str]) -> list[str]:
    """The names given; by default all."""
    names = list(known) if names is None else names
    if not set(names) <= set(known):
        raise ValueError(f"--{flag} must be some of {', '.join(known)}, got {','.join(names)}.")
    return names


def _bfloat16(num_devices: int) -> list[dict]:
    from launch.benchmarks import bfloat16

    return [bfloat16.measure(num_devices)]


def _scale(num_devices: int) -> Iterable[dict]:
    del num_devices  # Each line has its own.
    from launch.benchmarks import scale

    return scale.lines()


def _device(num_devices: int) -> Iterable[dict]:
    from launch.benchmarks import device

    return device.lines(num_devices)


def _control(num_devices: int) -> list[dict]:
    from meta_train.devices import configure_cpu_devices

    configure_cpu_devices(num_devices or 1)  # XLA's flags of jobs.
    from launch.benchmarks import control

    return control.lines()


# ``num_devices -> lines``, run in a process of its own; 0 devices: one per core.
CASES: dict[str, Callable[[int], Iterable[dict]]] = {
    "pes": partial(train_step, "pes"),
    "truncated_es": partial(train_step, "truncated_es"),
    "tbptt": partial(train_step, "tbptt"),
    "loop": partial(train_step, "loop"),
    "pes_overhead": _pes_overhead,
    "reversible": _reversible,
    "optimizers": _optimizers,
    "bfloat16": _bfloat16,
    "scale": _scale,
    "device": _device,
    "control": _control,
}
# Of minutes, of machines or an extra that are not always there: only where they are asked for.
_ASKED_FOR = ("scale", "device", "control")
_CASES = flags.DEFINE_list(
    "cases",
    [name for name in CASES if name not in _ASKED_FOR],
    f"Cases to run, of {', '.join(CASES)}.",
)


def _check_flags() -> None:
    """Raises ``ValueError`` on a case that there is not, or cores that are no number."""
    for name in _CASES.value:
        if name not in CASES:
            raise ValueError(
                f"--cases must be of {', '.join(CASES)}, got {name!r}.{suggest(name, CASES)}"
            )
    for word in _CORES.value or ():
        if not (word.isdecimal() and int(word)):
            raise ValueError(
                f"--cores must be whole numbers from 1, separated by commas, got {word!r}."
            )
        if int(word) > (available := len(os.sched_getaffinity(0))) and not _CHILD.value:
            raise ValueError(
                f"--cores must be at most {available}, those that there are, got {word}."
            )


def _lines_of(command: list[str]) -> Iterator[dict]:
    """What a child measures, line by line."""
    machine = {"machine": platform.processor() or platform.machine()}
    # From where this package is, which `-m` looks into before anything else.
    package = Path(__file__).parent.parent
    with (
        tempfile.TemporaryFile("w+") as said,
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=said, text=True, cwd=package
        ) as child,
    ):
        yield from (json.loads(line) | machine for line in child.stdout or () if line[0] == "{")
        if child.wait():
            said.seek(0)
            sys.exit(f"{' '.join(command[1:])} failed:\n{said.read()}")


def main(argv) -> None:
    if argv:
        raise ValueError(f"Unexpected arguments {argv}; every option is --name=value.")
    _check_flags()
    from meta_train import strict_json

    available = len(os.sched_getaffinity(0))
    if _CHILD.value:
        logging.set_verbosity(logging.WARNING)
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: int((_CORES.value or ["1"])[0])])
        (case,) = _CASES.value
        about = {"case": case, "cores": len(os.sched_getaffinity(0))}
        for row in CASES[case](_DEVICES.value):
            print(strict_json.dumps(about | row), flush=True)
        return
    missed = []
    cores = [int(c) for c in _CORES.value] if _CORES.value else sorted({1, available})
    for case in _CASES.value:
        for count in cores:
            command = [sys.executable, "-m", "launch.benchmark", "--child"]
            command += [f"--cases={case}", f"--cores={count}", f"--num_devices={_DEVICES.value}"]
            given = {"optimizers": _OPTIMIZERS.value, "runs": _RUNS.value}
            command += [f"--{flag}={','.join(v)}" for flag, v in given.items() if v is not None]
            command += [f"--into={Path(_INTO.value).absolute()}"] if _INTO.value else []
            for row in _lines_of(command):
                print(strict_json.dumps(row), flush=True)
                if not row.get("holds", row.get("within_limits", True)):
                    missed.append(row)
    if missed:
        sys.exit("limits not kept:\n" + "\n".join(map(strict_json.dumps, missed)))


def cli() -> None:
    """The installed command."""
    command_line.run_plain(main, __doc__)


if __name__ == "__main__":
    cli()
