"""Tuning the hyperparameters of an optimizer by gradient, as a task."""

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp

from tasks.arguments import check_count, check_instance, check_name
from tasks.base import Task, TaskConfig
from tasks.linear import Linear
from tasks.unrolled import Rule, unrolled

OPTIMIZERS = ("sgdm", "adam")
_EPSILON = 1e-8


@dataclass(frozen=True)
class Hyperparameters(TaskConfig):
    """A learning rate for each step, and momentum, trained through a few steps of a base task.

    The parameters are the logarithms of the rates, and momenta (and Adam's second one) as
    ``log((1 + m) / (1 - m))``, so any number is a sound value. They start at rates of .01 and .001
    (Adam), and momentum .9.

    Source: Maclaurin, Duvenaud, Adams 2015. Differs: few steps, and gradients by backpropagation.

    Attributes:
      base: the task that is trained.
      optimizer: sgdm or adam.
      steps: of a run, through which the gradient goes.
      batch_size: runs per batch.
    """

    base: TaskConfig = field(default_factory=lambda: Linear(batch_size=16))
    optimizer: str = "sgdm"
    steps: int = 10
    batch_size: int = 4

    def __post_init__(self):
        check_instance(TaskConfig, base=self.base)
        check_count(steps=self.steps, batch_size=self.batch_size)
        check_name(OPTIMIZERS, optimizer=self.optimizer)

    def make(self, data_dir: str | None = None) -> Task:
        """The task.

        Args:
          data_dir: folder of prepared data sets.
        """
        rule = {"sgdm": sgdm_rule, "adam": adam_rule}[self.optimizer](self.steps)
        return unrolled(self.base.make(data_dir), rule, steps=self.steps, runs=self.batch_size)


def _decay(value: jax.Array) -> jax.Array:
    return jnp.tanh(value / 2)


def _raw(decay: float) -> jax.Array:
    return 2 * jnp.arctanh(jnp.float32(decay))


def sgdm_rule(steps: int) -> Rule:
    """``v <- m v - a_t g``, ``w <- w + v``."""

    def init(key):
        del key
        return {"log_rates": jnp.full(steps, jnp.log(0.01)), "momentum": _raw(0.9)}

    def update(theta, velocity, gradient, step):
        rate, decay = jnp.exp(jnp.asarray(theta["log_rates"])[step]), _decay(theta["momentum"])
        velocity = jax.tree.map(lambda v, g: decay * v - rate * g, velocity, gradient)
        return velocity, velocity

    return Rule(init, lambda weights: jax.tree.map(jnp.zeros_like, weights), update)


def adam_rule(steps: int) -> Rule:
    """Adam, ``a_t m / (sqrt(v) + 1e-8)`` with bias corrections."""

    def init(key):
        del key
        rates = jnp.full(steps, jnp.log(0.001))
        return {"log_rates": rates, "momentum": _raw(0.9), "second": _raw(0.99)}

    def update(theta, state, gradient, step):
        rate, b1 = jnp.exp(jnp.asarray(theta["log_rates"])[step]), _decay(theta["momentum"])
        b2 = _decay(theta["second"])
        first, second = state
        first = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, first, gradient)
        second = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * g**2, second, gradient)
        corrections = 1 - b1 ** (step + 1), 1 - b2 ** (step + 1)

        def move(m, v):
            # The tiny number keeps the root's slope finite where a gradient was always 0.
            root = jnp.sqrt(jnp.maximum(v / corrections[1], 1e-30))
            return -rate * m / corrections[0] / (root + _EPSILON)

        return jax.tree.map(move, first, second), (first, second)

    def start(weights):
        zeros = jax.tree.map(jnp.zeros_like, weights)
        return zeros, zeros

    return Rule(init, start, update)
