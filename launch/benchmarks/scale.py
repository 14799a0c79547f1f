"""The case ``scale``: devices, processes and populations, and what each costs.

Lines, by ``what``: ``step`` (a fixed population, and a fixed one a device, over 1, 2 and 4 devices
and as many processes of one device), ``checkpoint`` and ``memory`` against the population. On a
machine with fewer cores than devices a step takes as long as its work does; the bytes do not.
"""

import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from meta_train import strict_json

# Shapes of (processes, devices of each).
PLACES = ((1, 1), (1, 2), (1, 4), (2, 1), (4, 1))
FIXED = 64  # Particles of the fixed population.
OF_EACH = 16  # Of a device, where that is fixed.
POPULATIONS = (64, 256, 1024)
STEPS = 20
_COLLECTIVE = re.compile(
    r"= (\([^=]*?\)|\S+) (?:all-reduce|all-gather|collective-permute)(?:-start)?\("
)
_SHAPE = re.compile(r"([a-z]+)(\d+)?\[([\d,]*)\]")


def lines(
    places: tuple = PLACES, populations: tuple = POPULATIONS, steps: int = STEPS
) -> Iterator[dict[str, Any]]:
    """All lines, slowest last."""
    for particles in populations:
        yield {"what": "memory"} | _memory(particles)
        yield {"what": "checkpoint"} | _checkpoint(particles)
    for processes, of_each in places:
        for kind in ("fixed", "fixed_per_device"):
            particles = FIXED if kind == "fixed" else OF_EACH * processes * of_each
            yield {"what": "step", "population": kind} | _step(processes, of_each, particles, steps)


def config(particles: int, num_devices: int):
    """PES on the digits, as in the case ``pes``."""
    from launch.config import Config, estimator

    return Config(
        num_devices=num_devices,
        eval_every=0,
        wandb_mode="disabled",
        estimator=estimator("pes", num_particles=particles, truncation=20),
    )


def bytes_exchanged(job: Any) -> int:
    """What a device gives to the exchange in one outer step, from the compiled program.

    The sizes of the results of its collectives; those of several devices only.
    """
    import jax

    from meta_train import devices

    placed = devices.placed_spec(jax.eval_shape(job.init), job.num_devices, job.axes)
    return exchanged_in(job.step.lower(placed).compile().as_text())


def exchanged_in(program: str) -> int:
    """The bytes of all collectives' results in an XLA program's text."""
    return sum(
        int(bits or 8) // 8 * int(np.prod([int(n) for n in shape.split(",") if n], initial=1))
        for results in _COLLECTIVE.findall(program)
        for _, bits, shape in _SHAPE.findall(results)
    )


def _step(processes: int, of_each: int, particles: int, steps: int) -> dict[str, Any]:
    with socket.socket() as found:
        found.bind(("", 0))
        port = found.getsockname()[1]
    # The virtual devices are the case's own, whatever was chosen for the processes that time.
    env = os.environ | {"JAX_NUM_CPU_DEVICES": str(of_each)}
    words = [str(x) for x in (port, processes, of_each, particles, steps)]
    module = [sys.executable, "-m", "launch.benchmarks.scale"]
    package = Path(__file__).parent.parent.parent
    started = [
        subprocess.Popen([*module, str(i), *words], cwd=package, env=env, stdout=subprocess.PIPE)
        for i in range(processes)
    ]
    printed = [process.communicate()[0] for process in started]
    if any(process.returncode for process in started):
        raise RuntimeError(f"a process of the case {words} failed; see above.")
    return json.loads(printed[0].splitlines()[-1])


def _child(words: list[str]) -> None:
    """One process of a step's case; the first prints a line."""
    import jax

    from launch.job import build
    from meta_train import devices
    from meta_train import processes as together

    index, port, processes, of_each, particles, steps = map(int, words)
    devices.configure_cpu_devices(of_each)
    if processes > 1:
        together.join(f"127.0.0.1:{port}", processes, index, 120)
    job = build(config(particles, of_each), None)
    state = devices.from_host(devices.to_host(jax.jit(job.init)(), None), jax.eval_shape(job.init))
    state = devices.place(state, job.num_devices, job.axes)
    step = job.step.lower(state).compile()
    times = []
    for _ in range(steps + 2):
        began = time.perf_counter()
        state, metrics = step(state)
        jax.block_until_ready(metrics)
        times.append(time.perf_counter() - began)
    if index == 0:
        row: dict[str, Any] = {"processes": processes, "devices": processes * of_each}
        row |= {"particles": particles}
        row |= {"ms_per_outer_step": round(1e3 * float(np.median(times[2:])), 2)}
        row |= {"bytes_exchanged_per_device": exchanged_in(step.as_text())}
        row |= {"bytes_of_theta": int(devices.first_replica(state.theta).nbytes)}
        print(strict_json.dumps(row), flush=True)


def _memory(particles: int) -> dict[str, Any]:
    """Of the state and of a step, a particle."""
    import jax

    from launch.job import build
    from meta_train import devices

    job = build(config(particles, 1), None)
    spec = jax.eval_shape(job.init)
    host = devices.host_like(spec)
    needed = job.step.lower(devices.placed_spec(spec, 1, job.axes)).compile().memory_analysis()
    population = host.estimator_state
    of = {
        name: sum(x.nbytes for x in jax.tree.leaves(getattr(population, name)))
        for name in population._fields
    }
    return {
        "particles": particles,
        "bytes_per_particle": round(sum(of.values()) / particles),
        "of": {name: round(size / particles) for name, size in of.items()},
        "temporary_bytes_per_particle": round(needed.temp_size_in_bytes / particles),
    }


def _checkpoint(particles: int) -> dict[str, Any]:
    """Seconds that the loop waits for a checkpoint, and until it is on disk."""
    import jax

    from launch.job import build
    from meta_train import devices
    from meta_train.checkpoint import Checkpoints

    job = build(config(particles, 1), None)
    state = devices.place(jax.jit(job.init)(), 1, job.axes)
    waited, written = [], []
    with tempfile.TemporaryDirectory() as folder:
        checkpoints = Checkpoints(Path(folder))
        for step in range(1, 5):
            began = time.perf_counter()
            host = devices.to_host(state, job.axes)
            checkpoints.save(step, host, {})
            waited.append(time.perf_counter() - began)
            checkpoints.wait()
            written.append(time.perf_counter() - began)
        checkpoints.close()
    size = sum(x.nbytes for x in jax.tree.leaves(host))
    return {
        "particles": particles,
        "bytes": size,
        "seconds_waited": round(float(np.median(waited[1:])), 4),
        "seconds_written": round(float(np.median(written[1:])), 4),
    }


if __name__ == "__main__":
    _child(sys.argv[1:])
