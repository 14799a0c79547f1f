"""What a training step costs with every learned optimizer, beside ``optax.adam``.

    python -m launch.benchmark --cases=optimizers [--cores=1] [--optimizers=small_fc,star]
        [--runs=digits,million] [--into=launch/benchmarks/optimizers.json]

A whole step, batch, gradient and update, of four runs: a 64-32-10 network on the bundled digits
alone and in a population of 32 (each with its own theta), one of a million parameters, and a
Transformer of 50 tensors. With theta as drawn, so only cost is meant. Every optimizer takes turns
with Adam in one process; times are the processor's, which other programs hardly lengthen.

With ``--into`` every line is written to that file as soon as it is there, and those that it has
already are left out: so the table can be made in pieces. Lines to measure again are deleted from
it first. ``python -m launch.describe --table`` makes docs/optimizers.md of the file.
"""

import datetime
import inspect
import json
import math
import os
import platform
import re
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import learned_opt
from launch.benchmarks.timing import in_turns
from learned_opt import OptimizerConfig
from meta_train import devices, strict_json
from tasks.mlp import mlp_classifier

# What is measured: the name and arguments of each optimizer. One of them also without its most
# expensive part.
NO_MATRICES = "adam_controller (matrices=False)"
MEASURED: dict[str, tuple[str, dict[str, Any]]] = {
    name: (name, {}) for name in learned_opt.OPTIMIZERS
} | {NO_MATRICES: ("adam_controller", {"matrices": False})}
# Of the time of a step over Adam's.
LIMITS = {
    ("adam_controller", "digits"): 1.7,
    (NO_MATRICES, "digits"): 1.7,
    (NO_MATRICES, "million"): 1.7,
    ("adam_controller", "million"): 2.2,
    ("mlp", "digits"): 4.9,
    ("small_fc", "digits"): 2.5,
    ("star", "digits"): 2.5,
    ("celo2_base", "digits"): 2.5,
}
# Of the time of an update alone over Adam's.
UPDATE_LIMITS = {("small_fc", "million"): 8.0}
# Of what an update allocates besides its results, over the size of the state.
MEMORY_LIMIT = 1.5
ROUNDS, SECONDS_A_ROUND = 7, 0.02

FILE = Path(__file__).with_name("optimizers.json")


class Run(NamedTuple):
    """A network to train.

    Attributes:
      init: ``key -> params``.
      gradient: ``(params, key) -> (loss, gradient)`` on a fresh batch.
      population: networks side by side; 0 for one alone.
    """

    init: Callable[[jax.Array], Any]
    gradient: Callable[[Any, jax.Array], tuple[jax.Array, Any]]
    population: int = 0


def digits(*hidden_sizes: int, population: int = 0) -> Run:
    """A multilayer perceptron on the digits, batch 64."""
    task = mlp_classifier(hidden_sizes=hidden_sizes)

    def gradient(params, key):
        batch = task.batch((), key, "train")
        return jax.value_and_grad(task.loss)(params, (), batch, key)

    return Run(lambda key: task.init((), key), gradient, population)


def transformer(depth: int = 4, width: int = 64, length: int = 32) -> Run:
    """A decoder of bytes with 12 tensors a layer, on random text, batch 8."""
    shapes = {"scale": (width,), "query": (width, 3 * width), "query_b": (3 * width,)}
    shapes |= {"out": (width, width), "out_b": (width,), "shift": (width,), "shift_2": (width,)}
    shapes |= {"scale_2": (width,), "up": (width, 4 * width), "up_b": (4 * width,)}
    shapes |= {"down": (4 * width, width), "down_b": (width,)}

    def init(key):
        def layer(key):
            keys = jax.random.split(key, len(shapes))
            return {
                name: shape[0] ** -0.5 * jax.random.normal(own, shape)
                for own, (name, shape) in zip(keys, shapes.items(), strict=True)
            }

        keys = jax.random.split(key, depth + 2)
        ends = {"bytes": (256, width), "places": (length, width)}
        ends = {
            name: 0.1 * jax.random.normal(own, shape)
            for own, (name, shape) in zip(keys, ends.items(), strict=False)
        }
        return ends | {"layers": [layer(own) for own in keys[2:]]}

    def normalized(x, scale, shift):
        centred = x - jnp.mean(x, -1, keepdims=True)
        return (
            centred * jax.lax.rsqrt(1e-5 + jnp.mean(centred**2, -1, keepdims=True)) * scale + shift
        )

    def loss(params, text):
        x = params["bytes"][text[:, :-1]] + params["places"]
        for p in params["layers"]:
            h = normalized(x, p["scale"], p["shift"]) @ p["query"] + p["query_b"]
            heads = (part.reshape(*x.shape[:2], 4, -1) for part in jnp.split(h, 3, axis=-1))
            attended = jax.nn.dot_product_attention(*heads, is_causal=True).reshape(x.shape)
            x = x + attended @ p["out"] + p["out_b"]
            h = jax.nn.gelu(normalized(x, p["scale_2"], p["shift_2"]) @ p["up"] + p["up_b"])
            x = x + h @ p["down"] + p["down_b"]
        log_probs = jax.nn.log_softmax(x @ params["bytes"].T)
        return -jnp.mean(jnp.take_along_axis(log_probs, text[:, 1:, None], axis=-1))

    def gradient(params, key):
        return jax.value_and_grad(loss)(params, jax.random.randint(key, (8, length + 1), 0, 256))

    return Run(init, gradient)


RUNS: dict[str, Callable[[], Run]] = {
    "digits": lambda: digits(32),
    "population of 32": lambda: digits(32, population=32),
    "million": lambda: digits(960, 960),
    "transformer": transformer,
}


class Program(NamedTuple):
    """Compiled steps, ``carry -> carry``, and what it took."""

    steps: Callable[[Any], Any]
    carry: Any
    compile_seconds: float


def rule(name: str, num_tensors: int) -> Callable[[jax.Array], Any]:
    """``key -> transformation`` of the optimizer of that name, with a theta drawn by the key."""
    if name == "optax.adam":
        return lambda key: optax.with_extra_args_support(optax.adam(1e-4))
    name, arguments = MEASURED[name]
    function = learned_opt.OPTIMIZERS[name]
    # Some are made for a number of tensors.
    takes = "num_tensors" in inspect.signature(function).parameters
    made = function(**arguments, **({"num_tensors": num_tensors} if takes else {}))
    optimizer = made.make() if isinstance(made, OptimizerConfig) else made
    return lambda key: optimizer.bind(optimizer.init(key), 10_000)


def training(run: Run, make: Callable, num_steps: int) -> Program:
    """``num_steps`` steps of training, or of a population of runs."""

    def start(key):
        params = run.init(key)
        return params, make(key).init(params), key

    def many(carry, own):
        def step(carry, _):
            params, state, key = carry
            key, key_batch = jax.random.split(key)
            loss, grads = run.gradient(params, key_batch)
            updates, state = make(own).update(grads, state, params, value=loss)
            return (optax.apply_updates(params, updates), state, key), None

        return jax.lax.scan(step, carry, None, num_steps)[0]

    keys = jax.random.key(0)
    if run.population:
        keys, start, many = jax.random.split(keys, run.population), jax.vmap(start), jax.vmap(many)
    carry = jax.block_until_ready(jax.jit(start)(keys))
    began = time.perf_counter()
    compiled = jax.jit(lambda carry: many(carry, keys)).lower(carry).compile()
    return Program(compiled, carry, time.perf_counter() - began)


def updating(run: Run, make: Callable, num_steps: int) -> Program:
    """``num_steps`` updates with gradients that only change by a factor."""
    key = jax.random.key(0)

    def many(carry):
        def step(carry, scale):
            params, state, grads = carry
            grads = jax.tree.map(lambda g: scale * g, grads)
            updates, state = make(key).update(grads, state, params, value=1.0 + scale)
            return (optax.apply_updates(params, updates), state, grads), None

        return jax.lax.scan(step, carry, jnp.linspace(0.99, 1.01, num_steps))[0]

    params = jax.jit(run.init)(key)
    carry = params, jax.jit(make(key).init)(params), jax.jit(run.gradient)(params, key)[1]
    began = time.perf_counter()
    return Program(jax.jit(many).lower(carry).compile(), carry, time.perf_counter() - began)


def seconds(program: Program) -> float:
    """Processor seconds of the program once."""
    began = time.process_time()
    jax.block_until_ready(program.steps(program.carry))
    return time.process_time() - began


def ratio(program: Program, of_adam: Program) -> tuple[float, float]:
    """Median over rounds in turns of its time over Adam's, and that median's standard error."""

    def again(program: Program):
        return (lambda carry: (carry, program.steps(carry))), program.carry

    times = in_turns({"own": again(program), "adam": again(of_adam)}, ROUNDS, 1)
    ratios = times["own"] / times["adam"]
    spread = 1.25 * float(np.std(ratios, ddof=1)) / math.sqrt(ROUNDS)
    return float(np.median(ratios)), spread


def num_bytes(tree: Any) -> int:
    """Of all arrays in it, or their specs."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def update_memory(run: Run, make: Callable) -> tuple[float, float]:
    """Bytes of the state by parameter, and what an update allocates over the state's bytes."""
    key = jax.random.key(0)
    params = jax.jit(run.init)(key)
    state = jax.eval_shape(make(key).init, params)

    def update(params, state, grads):
        return make(key).update(grads, state, params, value=1.0)

    compiled = jax.jit(update).lower(params, state, params).compile()
    analysis: Any = compiled.memory_analysis()
    size = sum(x.size for x in jax.tree.leaves(params))
    return num_bytes(state) / size, analysis.temp_size_in_bytes / max(1, num_bytes(state))


def lines(
    num_devices: int = 1,
    names: Sequence[str] = tuple(MEASURED),
    runs: Sequence[str] = tuple(RUNS),
    into: Path | None = None,
) -> Iterator[dict[str, Any]]:
    """The case of ``launch.benchmark``: a line for every optimizer and run not in ``into`` yet."""
    devices.configure_cpu_devices(num_devices)
    for where in runs:
        missing = [name for name in names if where not in read(into).get(name, {})]
        for row in of_run(where, missing) if missing else ():
            if into is not None:
                found = read(into)
                found.setdefault(row["optimizer"], {})[where] = row | machine()
                replacement = into.with_suffix(".new")
                replacement.write_text(strict_json.dumps(found, indent=1, sort_keys=True) + "\n")
                replacement.replace(into)
            yield row


def read(path: Path | None = FILE) -> dict[str, dict[str, dict[str, Any]]]:
    """``optimizer -> run -> line`` of the file; of none, nothing."""
    return json.loads(path.read_text()) if path is not None and path.is_file() else {}


def machine() -> dict[str, Any]:
    """What it is measured on, and when."""
    found = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else ""
    model = re.search(r"model name\s*: (.*)", found)
    width = "AVX-512" if " avx512f" in found else "AVX2" if " avx2" in found else ""
    name = model[1].strip() if model else platform.machine()
    return {
        "machine": ", ".join(filter(None, [name, width])),
        "cores": len(os.sched_getaffinity(0)),
        "jax": jax.__version__,
        "date": datetime.date.today().isoformat(),
    }


def of_run(where: str, names: Sequence[str]) -> Iterator[dict[str, Any]]:
    """A line for each of the optimizers."""
    run = RUNS[where]()
    num_tensors = len(jax.tree.leaves(jax.eval_shape(run.init, jax.random.key(0))))
    adam = rule("optax.adam", num_tensors)
    once = seconds(training(run, adam, 10)) / 10
    num_steps = max(2, round(SECONDS_A_ROUND / once))
    of_adam = training(run, adam, num_steps)
    updates_of_adam = None if run.population else updating(run, adam, num_steps)
    for name in names:
        make = rule(name, num_tensors)
        program = training(run, make, num_steps)
        value, error = ratio(program, of_adam)
        compile_ratio = program.compile_seconds / of_adam.compile_seconds
        row: dict[str, Any] = {"optimizer": name, "run": where, "step_over_adam": round(value, 3)}
        row |= {"standard_error": round(error, 3)}
        row |= {"adam_us": round(1e6 * seconds(of_adam) / num_steps, 1)}
        row |= {"compile_seconds": round(program.compile_seconds, 2)}
        row |= {"compile_over_adam": round(compile_ratio, 2)}
        kept = value <= LIMITS.get((name, where), math.inf)
        if updates_of_adam is not None:
            of_update = ratio(updating(run, make, num_steps), updates_of_adam)[0]
            by_parameter, allocated = update_memory(run, make)
            row |= {"update_over_adam": round(of_update, 2)}
            row |= {"state_bytes_per_parameter": round(by_parameter, 2)}
            row |= {"update_memory_over_state": round(allocated, 2)}
            kept &= of_update <= UPDATE_LIMITS.get((name, where), math.inf)
            kept &= where != "million" or allocated <= MEMORY_LIMIT
        yield row | {"within_limits": bool(kept)}
