"""The population on devices. The only file that knows of ``jax.pmap`` and the axis name.

Only the leading particle axis is ever split: arrays ``[particles, ...]`` become
``[devices, particles / devices, ...]``; everything else is replicated. Where several processes run
the job, its devices are those of all of them, in the order of the processes; ``num_devices`` is
always how many of them are in each process. On the host, and in checkpoints, there is only the
device-free view, so a job may move to another number of devices or processes.
"""

import ctypes
import gc
import os
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.flatten_util import ravel_pytree

_AXIS = "population"

# Measured on the benchmark's cases: vectors of the full width run up to 10% faster where
# there is AVX-512, and LLVM's first optimization level compiles a quarter faster to code
# that runs as fast. XLA ends a process whose devices wait 40 s for each other, which a
# suspended or starved job does without being stuck.
CPU_FLAGS = (
    "--xla_cpu_prefer_vector_width=512 --xla_backend_optimization_level=1 "
    "--xla_cpu_collective_call_terminate_timeout_seconds=3600 "
    "--xla_cpu_collective_timeout_seconds=3600"
)


def configure_cpu_devices(num_devices: int = 0) -> int:
    """Splits the CPU into virtual devices, if nothing was computed with JAX yet.

    On small inner problems XLA's own threads gain little, and one virtual device per core
    is faster (``python -m launch.benchmark`` measures it). No effect on GPU and TPU, or
    where the user set ``JAX_NUM_CPU_DEVICES``. Once JAX computes its devices are what they
    are: where as many as serve are asked for, those are used, with a remark.

    Args:
      num_devices: how many, at most one per core this process may run on; 0 is just that.

    Returns:
      ``num_devices``.

    Raises:
      ValueError: if JAX was used before, and has fewer devices than are asked for.
    """
    if "XLA_FLAGS" not in os.environ and jax.config.values["jax_platforms"] in (None, "", "cpu"):
        os.environ["XLA_FLAGS"] = CPU_FLAGS
    cores = len(os.sched_getaffinity(0))
    wanted = min(num_devices or cores, cores)
    if "JAX_NUM_CPU_DEVICES" in os.environ:
        return num_devices
    if jax.config.values["jax_num_cpu_devices"] == wanted:
        return num_devices
    try:
        jax.config.update("jax_num_cpu_devices", wanted)
    except RuntimeError:  # JAX has computed something.
        available = jax.local_device_count()
        if jax.default_backend() == "cpu" and available < wanted:
            fewer = (
                f"JAX was used before the job was built, so there are {available} CPU devices "
                f"instead of {wanted}; set JAX_NUM_CPU_DEVICES={wanted} for more"
            )
            if num_devices:
                raise ValueError(
                    f"`num_devices` must be at most {available}, got {num_devices}: {fewer}, or "
                    "ask for 0, as many as serve."
                ) from None
            from meta_train.progress import remark  # With tqdm, which the base install lacks.

            remark(f"note: {fewer}.")
    return num_devices


def trim_memory() -> None:
    """Gives the memory that XLA's compiler freed back to the system; glibc would keep it.

    Half of a small job's memory is that. No effect with another C library.
    """
    gc.collect()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim:
            trim(0)


def forget_compiled() -> None:
    """Forgets the programs compiled so far, and trims memory.

    For between the initial state, whose program runs once, and the train step.
    """
    jax.clear_caches()
    trim_memory()


def choose_num_devices(
    requested: int,
    num_shards: int,
    flag: str = "num_particles",
    per_shard: int = 1,
    processes: int | None = None,
) -> int:
    """How many devices of this process to use, and of every other that runs the job.

    Args:
      requested: how many; 0 is the most that divide the population, of those there are.
      num_shards: into how many parts the population can be split.
      flag: what sets the size of the population, for the message.
      per_shard: how much of it one part takes.
      processes: how many run the job; None: those that there are.

    Raises:
      ValueError: if more devices are requested than there are, or if the parts do not
        divide evenly, with the nearest sizes that do.
    """
    processes, available = processes or jax.process_count(), jax.local_device_count()
    if not 0 <= requested <= available:
        raise ValueError(
            f"`num_devices` must be between 0 (as many as divide the population) and {available}, "
            f"the local {jax.default_backend()} devices, got {requested}."
        )
    if not requested:
        dividing = [n for n in range(1, available + 1) if num_shards % (n * processes) == 0]
        if dividing:
            return dividing[-1]
    total = processes * (requested or 1)
    if num_shards % total:
        lower = num_shards // total * total
        near = [count * per_shard for count in (lower, lower + total) if count > 0]
        of = f" ({processes} processes with {requested or 1} each)" if processes > 1 else ""
        raise ValueError(
            f"The population must divide evenly over {total} devices{of}: `{flag}` must be a "
            f"multiple of {total * per_shard}, got {num_shards * per_shard}. Nearest that are: "
            f"{' and '.join(map(str, near))}; or choose another `num_devices`"
            f"{' or number of processes' if processes > 1 else ''}."
        )
    return requested


def default_chunk() -> int | None:
    """Particles (or pairs) to compute at a time: few on a CPU, for its cache; else all."""
    return 2 if jax.default_backend() == "cpu" else None


def max_in_flight() -> int:
    """Unfinished steps there may be when the next one is dispatched.

    Several, so that an accelerator never waits for the host. None on a CPU: its virtual
    devices share one pool of threads, and a device waiting in the mean over devices keeps
    its thread; with many steps queued, XLA was seen to run out of threads and hang.
    """
    return 0 if jax.default_backend() == "cpu" else 8


def population_map(fn: Callable, num_devices: int, axes: Any, donate: bool = True) -> Callable:
    """``fn(state) -> (state, metrics)`` over devices, compiled once.

    Args:
      fn: takes and returns a state; must average over devices with ``device_mean``.
      num_devices: how many devices of each process.
      axes: a prefix of the state's pytree: 0 where a leaf has the particle axis, else None.
      donate: reuse the memory of the state passed in.
    """
    return jax.pmap(
        fn,
        axis_name=_AXIS,
        in_axes=(axes,),
        out_axes=(axes, None),
        devices=job_devices(num_devices),
        donate_argnums=(0,) if donate else (),
    )


def part_map(fn: Callable, num_devices: int) -> Callable:
    """``fn(shared, state) -> (out, state)`` over devices: a part of a step, compiled on its own.

    ``shared`` and ``out`` are on every device; every leaf of ``state`` has the particle axis, and
    its memory is used again.
    """
    return jax.pmap(
        fn,
        axis_name=_AXIS,
        in_axes=(None, 0),
        out_axes=(None, 0),
        devices=job_devices(num_devices),
        donate_argnums=(1,),
    )


def replicated_map(fn: Callable, num_devices: int) -> Callable:
    """``fn`` of arrays that are on every device, to arrays that are on every device."""
    return jax.jit(fn, out_shardings=_sharding(None, num_devices))


def device_gather(tree: Any) -> Any:
    """Leaves ``[n, ...]`` of every device as ``[devices * n, ...]``; inside ``population_map``."""
    return jax.tree.map(lambda x: jax.lax.all_gather(x, _AXIS, tiled=True), tree)


def device_mean(tree: Any) -> Any:
    """The mean over devices, summed in pairs; inside ``population_map`` only.

    Neighbours add, then pairs of neighbours, and so on: of means ``estimators.base.mean_in_pairs``
    of equal parts of a population it is the mean of the whole, to the bit, on 1, 2, 4, ... devices;
    on another number but for rounding. Each device sends less than twice the tree, in
    ``2 log2(devices)`` messages for each dtype.
    """
    num_devices = jax.lax.axis_size(_AXIS)
    if num_devices & (num_devices - 1):
        return jax.lax.pmean(tree, _AXIS)
    leaves, treedef = jax.tree.flatten(tree)
    # In one order in all processes, so no set.
    for dtype in dict.fromkeys(leaf.dtype for leaf in leaves) if num_devices > 1 else ():
        mine = [i for i, leaf in enumerate(leaves) if leaf.dtype == dtype]
        flat, unravel = ravel_pytree([leaves[i] for i in mine])
        mean = _sum_in_pairs(flat.astype(jnp.promote_types(dtype, jnp.float32))) / num_devices
        for i, leaf in zip(mine, unravel(mean.astype(dtype)), strict=True):
            leaves[i] = leaf
    return jax.tree.unflatten(treedef, leaves)


def _sum_in_pairs(x: jax.Array) -> jax.Array:
    """The sum of ``x [size]`` over a power of two of devices, by halving and doubling."""
    num_devices, size = jax.lax.axis_size(_AXIS), x.size
    stages = [1 << i for i in range(num_devices.bit_length() - 1)]
    index = jax.lax.axis_index(_AXIS)

    def of_partner(x, stage):
        return jax.lax.ppermute(x, _AXIS, [(i, i ^ stage) for i in range(num_devices)])

    x = jnp.pad(x, (0, -size % num_devices))
    for stage in stages:  # One of two partners goes on with the first half, one with the second.
        first, second = jnp.split(x, 2)
        is_second = index & stage != 0
        theirs = of_partner(jnp.where(is_second, first, second), stage)
        x = jnp.where(is_second, second, first) + theirs
    for stage in reversed(stages):
        theirs = of_partner(x, stage)
        both = jnp.stack([x, theirs])
        x = jnp.where(index & stage != 0, both[::-1], both).ravel()
    return x[:size]


def place(state: Any, num_devices: int, axes: Any) -> Any:
    """The device-free state as ``population_map`` takes it: split, and already in place.

    (A state placed otherwise would run, but be compiled for, and moved, a second time.)
    """

    def put(axis, tree):
        if axis is not None:
            tree = jax.tree.map(lambda x: x.reshape(_split_shape(x, num_devices)), tree)
        return _put(tree, _sharding(axis, num_devices))

    return jax.tree.map(put, axes, state, is_leaf=lambda axis: axis is None)


def replicate(tree: Any, num_devices: int) -> Any:
    """Arrays on every device."""
    return _put(tree, _sharding(None, num_devices))


def _put(tree: Any, sharding: jax.sharding.NamedSharding) -> Any:
    """Arrays that every process has, each device getting its part."""
    if sharding.is_fully_addressable:
        return jax.device_put(tree, sharding)

    def put(x):
        if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(put(jax.random.key_data(x)))
        x = np.asarray(x)  # `device_put` would compare the whole of it between the processes.
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    return jax.tree.map(put, tree)


def placed_spec(spec: Any, num_devices: int, axes: Any, hosts: int = 1) -> Any:
    """What ``place`` would return, as ``jax.ShapeDtypeStruct`` leaves.

    Args:
      hosts: as on one of so many, each with ``num_devices``, whether or not they are there.
    """

    def put(axis, tree):
        sharding = _sharding(axis, num_devices)
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(
                x.shape if axis is None else _split_shape(x, num_devices, hosts),
                x.dtype,
                sharding=sharding,
            ),
            tree,
        )

    return jax.tree.map(put, axes, spec, is_leaf=lambda axis: axis is None)


def check_equal_processes() -> None:
    """Raises ``ValueError`` unless every process has as many devices as this one."""
    counts = [len(jax.local_devices(index)) for index in range(jax.process_count())]
    if len(set(counts)) > 1:
        raise ValueError(
            f"every process must have as many devices as the others, got {counts}; set "
            f"JAX_NUM_CPU_DEVICES={min(counts)} (or CUDA_VISIBLE_DEVICES) for each."
        )


def job_devices(num_devices: int) -> list[jax.Device]:
    """The first ``num_devices`` of every process, the same list in each of them."""
    processes = range(jax.process_count())
    return [d for index in processes for d in jax.local_devices(index)[:num_devices]]


def _sharding(axis: int | None, num_devices: int) -> jax.sharding.NamedSharding:
    mesh = jax.sharding.Mesh(np.array(job_devices(num_devices)), (_AXIS,))
    return jax.sharding.NamedSharding(mesh, jax.P() if axis is None else jax.P(_AXIS))


def _split_shape(x, num_devices: int, hosts: int = 1) -> tuple[int, ...]:
    here = num_devices * jax.process_count()
    return (here, x.shape[0] // (here * hosts), *x.shape[1:])


def in_turn(tree: Any) -> Any:
    """What a program over all devices returned, before the next one that does not read it.

    Over Gloo two programs' exchanges must not be under way at once: each process would begin with
    another, and wait for ever. Waits there, and nowhere else.
    """
    if jax.process_count() > 1 and jax.default_backend() == "cpu":
        jax.block_until_ready(tree)
    return tree


def anywhere(num_devices: int) -> Callable[[bool], jax.Array]:
    """``flag -> bool scalar``: whether it is true in any process; all must ask, nobody waits."""
    total = num_devices * jax.process_count()
    sharding = _sharding(0, num_devices)
    any_of_all = jax.jit(jnp.any, out_shardings=_sharding(None, num_devices))

    def ask(flag):
        part = np.full(total, flag)
        return any_of_all(jax.make_array_from_callback((total,), sharding, lambda i: part[i]))

    return ask


def to_host(state: Any, axes: Any) -> Any:
    """The device-free state, copied to host memory that later donations cannot touch.

    Keys become their key data, since NumPy has no key arrays. All of several processes must call
    it, and all get the whole population, leaf by leaf.
    """

    def copy(leaf):
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        if not (leaf.is_fully_addressable or leaf.is_fully_replicated):
            return multihost_utils.process_allgather(leaf, tiled=True)
        return np.array(leaf, copy=True)

    def fetch(axis, tree):
        tree = jax.tree.map(copy, tree)
        if axis is None:
            return tree
        return jax.tree.map(lambda x: x.reshape(x.shape[0] * x.shape[1], *x.shape[2:]), tree)

    return jax.tree.map(fetch, axes, state, is_leaf=lambda axis: axis is None)


def host_like(spec: Any) -> Any:
    """Zeros shaped like ``to_host`` would return for a state of these ``jax.eval_shape`` specs."""

    def zeros(leaf):
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.eval_shape(jax.random.key_data, leaf)
        return np.zeros(leaf.shape, leaf.dtype)

    return jax.tree.map(zeros, spec)


def first_replica(tree: Any) -> Any:
    """A replicated tree as ordinary arrays on the first local device."""
    return jax.tree.map(lambda x: x.addressable_shards[0].data, tree)


def from_host(host: Any, like: Any) -> Any:
    """Inverse of ``to_host``; ``like`` has the leaves' dtypes (``jax.eval_shape`` will do)."""

    def restore(leaf, spec):
        if jax.dtypes.issubdtype(spec.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(leaf)
        return jax.numpy.asarray(leaf)

    return jax.tree.map(restore, host, like)
