"""What PES costs beside truncated ES, and beside nothing but its forward unrolls.

    python -m launch.benchmark --cases=pes_overhead

The three take turns in one process on the same system, population, truncation and devices:
the default job (digits MLP, MLP optimizer), whose forward pass dominates. An outer step of an
estimator is all of it, with restarts, draws, the meta-optimizer and the mean over devices.
Times are the processor's, of all threads, which other programs hardly lengthen.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from launch.benchmarks.timing import in_turns
from launch.config import Config
from launch.trainables import make_system
from meta_train import devices, estimators, trainer
from meta_train.estimators.base import map_particles
from meta_train.estimators.particles import antithetic_starts
from meta_train.unroll import UnrolledSystem, unroll, with_flat_theta

LIMITS = {"truncated_es": 1.10, "forward_unrolls": 1.15}
ROUNDS, WARM_UP = 40, 3


class Runs(NamedTuple):
    """One pair of perturbed inner runs (all fields get a leading ``[N]`` axis).

    Attributes:
      id: int32 scalar.
      thetas: the perturbed thetas, ``[2, P]``; never drawn anew.
      states: their inner states, ``[2, ...]``; never restarted.
      windows: int32 scalar, truncations done.
    """

    id: jax.Array
    thetas: jax.Array
    states: Any
    windows: jax.Array


def begin_runs(
    system: UnrolledSystem, theta: jax.Array, num_pairs: int, sigma: float, horizon: int
) -> Runs:
    """The pairs at the start of their inner runs."""

    def one(index):
        key_eps, key_begin = jax.random.split(jax.random.fold_in(jax.random.key(1), index))
        eps = sigma * jax.random.normal(key_eps, theta.shape, theta.dtype)
        states = antithetic_starts(system, theta, eps)(key_begin, horizon)
        return Runs(index, jnp.stack([theta + eps, theta - eps]), states, jnp.int32(0))

    return jax.vmap(one)(jnp.arange(num_pairs, dtype=jnp.int32))


def forward_unrolls(system: UnrolledSystem, truncation: int, chunk: int | None) -> Callable:
    """``Runs -> (Runs, mean loss)``: one truncation of all pairs, and nothing else."""

    def window(runs):
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(2), runs.windows), runs.id)
        states, losses = jax.vmap(
            lambda theta, state: unroll(system, theta, state, key, truncation)
        )(runs.thetas, runs.states)
        return runs._replace(states=states, windows=runs.windows + 1), jnp.mean(losses)

    def step(runs):
        runs, losses = map_particles(window, runs, chunk)
        return runs, devices.device_mean(jnp.mean(losses))

    return step


def measure(num_devices: int) -> dict[str, Any]:
    """Processor milliseconds of a step of each, and the ratios to their limits (0 devices: all)."""
    devices.configure_cpu_devices(num_devices)
    config = Config()
    settings: Any = config.estimator  # PES
    num_pairs = config.estimator.population.size
    num_devices = devices.choose_num_devices(num_devices, num_pairs)
    optimizer = config.optimizer.make()
    system, _ = with_flat_theta(
        make_system(config, config.task.make(), optimizer),
        jax.eval_shape(optimizer.init, jax.random.key(0)),
    )
    meta_optimizer = config.meta.make(config.num_steps)
    truncation, chunk = settings.truncation, devices.default_chunk()

    def init_theta(key):
        return ravel_pytree(optimizer.init(key))[0]

    def outer_step(build):
        estimator = build(
            system,
            num_pairs=num_pairs,
            truncation=truncation,
            horizons=config.horizons(),
            sigma=settings.sigma,
            chunk=chunk,
        )
        step = trainer.make_step(estimator, meta_optimizer, devices.device_mean)
        state = jax.jit(lambda: trainer.init_state(estimator, meta_optimizer, init_theta, 0))()
        return on_devices(step, state, trainer.PARTICLE_AXES)

    def on_devices(step, state, axes):
        state = devices.place(state, num_devices, axes)
        return devices.population_map(step, num_devices, axes), state

    theta = init_theta(jax.random.key(0))
    runs = jax.jit(
        lambda: begin_runs(system, theta, num_pairs, settings.sigma, config.inner.horizon)
    )()
    seconds = in_turns(
        {
            "pes": outer_step(estimators.pes),
            "truncated_es": outer_step(estimators.truncated_es),
            "forward_unrolls": on_devices(forward_unrolls(system, truncation, chunk), runs, 0),
        },
        ROUNDS,
        WARM_UP,
    )
    ratios = {name: float(np.median(seconds["pes"] / seconds[name])) for name in LIMITS}
    return {
        "devices": num_devices,
        **{f"{name}_ms": round(1e3 * float(np.median(t)), 2) for name, t in seconds.items()},
        **{f"pes_over_{name}": round(ratio, 3) for name, ratio in ratios.items()},
        **{f"limit_over_{name}": limit for name, limit in LIMITS.items()},
        "within_limits": all(ratios[name] <= limit for name, limit in LIMITS.items()),
    }
