"""What bfloat16 products of the MLP optimizer cost the meta-gradient, and what they gain.

    python -m launch.benchmark --cases=bfloat16 [--cores=1]

The meta-gradients of PES with and without ``mlp_optimizer(bfloat16=True)``, of the same inner runs
and draws at fresh thetas, and the times of both in turns. Digits MLP 64-32-10, 16 antithetic pairs.
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.flatten_util import ravel_pytree

from launch.benchmarks.timing import in_turns
from launch.config import Config, InnerConfig, estimator, task
from launch.trainables import make_system
from learned_opt import mlp_optimizer
from meta_train import devices
from meta_train.estimators import Context

SEEDS, ROUNDS, WARM_UP = 4, 10, 2
# Of the error of a meta-gradient over its norm.
LIMIT = 0.05
CONFIG = Config(
    task=task("mlp", hidden_sizes=(32,)),
    inner=InnerConfig(horizon=100),
    estimator=estimator("pes", num_particles=32, truncation=20),
)


def meta_gradient(config: Config, hidden_sizes: tuple[int, ...], bfloat16: bool) -> Callable:
    """``seed -> flat gradient`` of the first outer step, compiled."""
    optimizer = mlp_optimizer(hidden_sizes, bfloat16=bfloat16)
    system = make_system(config, config.task.make(), optimizer)
    made = config.estimator.make(system, config.horizons(), Context(devices.default_chunk()))

    @jax.jit
    def gradient(seed):
        keys = jax.random.split(jax.random.key(seed), 3)
        theta = optimizer.init(keys[0])
        return ravel_pytree(made.estimate(theta, made.init(theta, keys[1]), keys[2])[0])[0]

    return gradient


def measure(
    num_devices: int,
    config: Config = CONFIG,
    hidden_sizes: tuple[int, ...] = (32, 32),
    seeds: int = SEEDS,
    rounds: int = ROUNDS,
) -> dict[str, Any]:
    """The mean and largest relative error, the smallest cosine, and the ratio of times."""
    devices.configure_cpu_devices(num_devices)
    narrow, wide = (meta_gradient(config, hidden_sizes, bfloat16) for bfloat16 in (True, False))
    found = [[np.asarray(f(seed), float) for f in (narrow, wide)] for seed in range(seeds)]
    norms = np.array([[np.linalg.norm(x) for x in (*pair, pair[0] - pair[1])] for pair in found])
    errors = norms[:, 2] / norms[:, 1]
    cosines = [a @ b for a, b in found] / (norms[:, 0] * norms[:, 1])

    def again(gradient):
        return (lambda seed: (seed, gradient(seed))), 0

    times = in_turns({"narrow": again(narrow), "wide": again(wide)}, rounds, WARM_UP)
    return {
        "mean_error": round(float(np.mean(errors)), 4),
        "largest_error": round(float(np.max(errors)), 4),
        "smallest_cosine": round(float(np.min(cosines)), 5),
        "time_over_float32": round(float(np.median(times["narrow"] / times["wide"])), 3),
        "limit": LIMIT,
        "within_limits": bool(np.max(errors) <= LIMIT),
    }
