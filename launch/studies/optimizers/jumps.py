"""Slopes of the mean loss of inner runs along a line: derivatives, differences, estimators."""

from functools import cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from launch.studies.pes.table1_rows import ROWS, builder
from launch.studies.shared.compare import in_terms_of
from launch.studies.shared.episodes import mean_estimate
from learned_opt import mlp_optimizer
from meta_train import estimators as est
from meta_train.evaluate import Estimate, estimate
from meta_train.inner import inner_training
from meta_train.unroll import UnrolledSystem, unroll
from tasks import mlp_classifier
from tasks.data import load_images

H = SIGMA = 1e-3  # In units of the direction, whose components have variance 1.
CHUNK = 50
TRUNCATION, PARTICLES = 5, 32
RUNS, SEED, DIRECTIONS = 36, 37, 3001  # What runs, estimators and directions are drawn from.


class JumpSetting(NamedTuple):
    """An inner problem: digits 64-width-10, and how long and how fast it is trained."""

    activation: str = "relu"
    width: int = 32
    batch: int = 64
    horizon: int = 100
    step_mult: float = 1e-3


SMALL = JumpSetting(width=5, batch=8, horizon=20, step_mult=0.05)
# Of table 1, with truncations of a quarter of the small setting's horizon.
ESTIMATORS = {
    name: ROWS[name]
    for name in ("BPTT", "RTRL", "UORO", "ARTBP", "forward gradient", "Reparam", "PES+Analytic",
                 "ES", "PES", "GPES", "NRES")
}  # fmt: skip
ESTIMATORS["ARTBP"] = ROWS["ARTBP"]._replace(build=builder(est.artbp, mean_truncation=9.0))


def direction(index: int) -> jax.Array:
    """``v ~ N(0, I)``, as long as theta."""
    theta = jax.eval_shape(mlp_optimizer().init, jax.random.key(0))
    size = sum(leaf.size for leaf in jax.tree.leaves(theta))
    return jax.random.normal(jax.random.key(DIRECTIONS + index), (size,))


def line(setting: JumpSetting, v: jax.Array) -> UnrolledSystem:
    """Inner training as a function of ``a``, float ``[1]``: theta moved by ``a v``."""
    optimizer = mlp_optimizer(step_mult=setting.step_mult)
    start, unravel = ravel_pytree(optimizer.init(jax.random.key(0)))
    task = mlp_classifier(
        load_images("digits"),
        hidden_sizes=(setting.width,),
        activation=setting.activation,
        batch_size=setting.batch,
    )
    return in_terms_of(lambda a: unravel(start + a[0] * v), inner_training(task, optimizer))


def slopes(setting: JumpSetting, directions: tuple[int, ...], num_runs: int) -> np.ndarray:
    """Derivative and central difference of each run's mean loss, ``[directions, num_runs, 2]``."""

    def one(v, key):
        system = line(setting, v)
        key_init, key_steps = jax.random.split(key)

        def loss(a):
            state = system.init(a, key_init, setting.horizon)
            return jnp.mean(unroll(system, a, state, key_steps, setting.horizon)[1])

        derivative = jax.jvp(loss, (jnp.zeros(1),), (jnp.ones(1),))[1]
        above, below = jax.lax.map(loss, jnp.array([[H], [-H]]))
        return jnp.stack([derivative, (above - below) / (2 * H)])

    keys = jax.random.split(jax.random.key(RUNS), num_runs)
    measure = jax.jit(lambda v: jax.lax.map(partial(one, v), keys, batch_size=min(CHUNK, num_runs)))
    return np.array([measure(direction(index)) for index in directions], np.float64)


class Slopes(NamedTuple):
    """Means over runs and their standard errors, of each direction ``[V]``."""

    derivative: np.ndarray
    derivative_error: np.ndarray
    difference: np.ndarray
    difference_error: np.ndarray
    gap: np.ndarray  # derivative - difference, in pairs
    gap_error: np.ndarray

    @property
    def relative(self) -> Estimate:
        """The gap relative to the slope, over all directions, in percent."""
        size = np.sqrt(max(np.sum(self.difference**2 - self.difference_error**2), 1e-12))
        gap = np.sqrt(max(np.sum(self.gap**2 - self.gap_error**2), 0.0))
        error = np.sqrt(np.sum((self.gap * self.gap_error) ** 2) / max(np.sum(self.gap**2), 1e-12))
        return Estimate(100 * float(gap / size), 100 * float(error / size))


@cache  # The defaults are a point of every sweep.
def compare(setting: JumpSetting, directions: tuple[int, ...], num_runs: int) -> Slopes:
    """The slopes in some directions."""
    found = slopes(setting, directions, num_runs)
    columns = (found[..., 0], found[..., 1], found[..., 0] - found[..., 1])
    pairs = ((x.mean(axis=1), x.std(axis=1, ddof=1) / num_runs**0.5) for x in columns)
    return Slopes(*(x for pair in pairs for x in pair))


def estimates(name: str, setting: JumpSetting, index: int, replicates: int) -> Estimate:
    """Of an estimator in direction ``index``: independent episodes."""
    system = line(setting, direction(index))
    estimator = ESTIMATORS[name].build(system, PARTICLES, setting.horizon, TRUNCATION, SIGMA)

    def one(key):
        return mean_estimate(estimator, jnp.zeros(1), key, setting.horizon // TRUNCATION)[0]

    keys = jax.random.split(jax.random.key(SEED), replicates)
    return estimate(np.asarray(jax.jit(partial(jax.lax.map, one))(keys), np.float64))
