"""Meta-training a small learned optimizer, as a task: training on two levels."""

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp

from tasks.arguments import check_count, check_instance
from tasks.base import Task, TaskConfig
from tasks.linear import Linear
from tasks.unrolled import Rule, unrolled

_FEATURES, _DECAYS = 5, (0.5, 0.9)


@dataclass(frozen=True)
class LearnedOptimizerTask(TaskConfig):
    """The weights of a per-parameter MLP rule, trained through a few steps of a base task.

    Inputs for each weight: its gradient and two momenta (decays .5 and .9), each over its root mean
    square in the tensor; and the time. Outputs ``a, b``: the step ``-0.1 a exp(b)``.

    Source: Metz et al. 2019 ("Understanding and correcting pathologies"), as a task in their later
    suites. Differs: its size.

    Attributes:
      base: the task that it trains.
      steps: of a run, through which the gradient goes.
      hidden_size: units of the rule's one hidden layer.
      batch_size: runs per batch.
    """

    base: TaskConfig = field(default_factory=lambda: Linear(batch_size=16))
    steps: int = 10
    hidden_size: int = 8
    batch_size: int = 4

    def __post_init__(self):
        check_instance(TaskConfig, base=self.base)
        check_count(steps=self.steps, hidden_size=self.hidden_size, batch_size=self.batch_size)

    def make(self, data_dir: str | None = None) -> Task:
        """The task.

        Args:
          data_dir: folder of prepared data sets.
        """
        rule = mlp_rule(self.hidden_size, self.steps)
        return unrolled(self.base.make(data_dir), rule, steps=self.steps, runs=self.batch_size)


def mlp_rule(hidden_size: int, steps: int) -> Rule:
    """An MLP of ``hidden_size`` units on what a weight's gradients were."""

    def init(key):
        key_in, key_out = jax.random.split(key)
        return {
            "in": jax.random.normal(key_in, (_FEATURES, hidden_size)) / _FEATURES**0.5,
            "b": jnp.zeros(hidden_size),
            # Small: a rule that moves at random would be worse than one that rests.
            "out": 0.1 * jax.random.normal(key_out, (hidden_size, 2)) / hidden_size**0.5,
        }

    def update(theta, state, gradient, step):
        state = [
            jax.tree.map(lambda m, g, d=decay: d * m + (1 - d) * g, momentum, gradient)
            for decay, momentum in zip(_DECAYS, state, strict=True)
        ]

        def move(*values):
            scaled = [x / jnp.sqrt(jnp.mean(x**2) + 1e-12) for x in values]
            time = jnp.full(values[0].shape, step / steps)
            features = jnp.stack([*scaled, time, 1 - time], axis=-1)
            hidden = jnp.tanh(features @ theta["in"] + theta["b"])
            direction, size = jnp.moveaxis(hidden @ theta["out"], -1, 0)
            return -0.1 * direction * jnp.exp(size)

        return jax.tree.map(move, gradient, *state), state

    return Rule(init, lambda weights: [jax.tree.map(jnp.zeros_like, weights)] * 2, update)
