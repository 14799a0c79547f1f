"""Any task with its weights in other units: what a learned rate should not depend on."""

from collections.abc import Callable
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp

from tasks.base import Instance, Task, TaskConfig
from tasks.linear import Linear

KINDS = ("tensor", "global")


@dataclass(frozen=True)
class Reparametrized(TaskConfig):
    """The task in parameters ``p / s``: the same function at the start, other gradients.

    An instance has scales with some probability: ``s = exp(U(-spread, spread))`` for each tensor,
    or one for all; else 1.

    Source: Metz et al. 2022 (VeLO), task augmentation. Differs: its probability, and the range.

    Attributes:
      base: the task.
      kind: tensor (each its own scale) or global (one for all).
      probability: of an instance having scales.
      spread: of the scales' logarithm, to both sides.
    """

    base: TaskConfig = field(default_factory=Linear)
    kind: str = "tensor"
    probability: float = 0.5
    spread: float = 1.5

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"`kind` must be one of {', '.join(KINDS)}, got {self.kind!r}.")
        if not 0 <= self.probability <= 1 or not 0 <= self.spread <= 20:
            raise ValueError(
                "`probability` must be between 0 and 1 and `spread` between 0 and 20, got "
                f"probability={self.probability}, spread={self.spread}."
            )

    @property
    def unwrapped(self) -> TaskConfig:
        return self.base.unwrapped

    def make(self, data_dir: str | None = None) -> Task:
        """The task.

        Args:
          data_dir: folder of prepared data sets.
        """
        task = self.base.make(data_dir)

        def scaled(params, scales, sign):
            leaves, structure = jax.tree.flatten(params)
            moved = [
                (leaf * jnp.exp(sign * scale)).astype(leaf.dtype)
                for leaf, scale in zip(leaves, scales, strict=True)
            ]
            return jax.tree.unflatten(structure, moved)

        def sample(key):
            key_base, key_used, key_scales = jax.random.split(key, 3)
            instance = task.sample(key_base)
            shapes = jax.tree.leaves(jax.eval_shape(task.init, instance, key_base))
            number = len(shapes) if self.kind == "tensor" else 1
            logs = jax.random.uniform(
                key_scales, (number,), minval=-self.spread, maxval=self.spread
            )
            used = jax.random.bernoulli(key_used, self.probability)
            logs = jnp.broadcast_to(jnp.where(used, logs, 0.0), (len(shapes),))
            return {"base": instance, "log_scales": logs}

        def init(instance, key):
            return scaled(task.init(instance["base"], key), instance["log_scales"], -1)

        def loss(params, instance, batch, key):
            params = scaled(params, instance["log_scales"], 1)
            return task.loss(params, instance["base"], batch, key)

        def score(params, instance, split):
            params = scaled(params, instance["log_scales"], 1)
            return task.score(params, instance["base"], split)

        return task._replace(
            sample=sample,
            init=init,
            batch=lambda instance, key, split: task.batch(instance["base"], key, split),
            loss=loss,
            score=score if task.score else None,
            constant_loss=of_base(task),
        )


def of_base(task: Task) -> Callable[[Instance], jax.Array] | None:
    """The constant predictor's loss of the task in a wrapper, for the wrapper's instances."""
    if task.constant_loss is None:
        return None
    constant_loss = task.constant_loss
    return lambda instance: constant_loss(instance["base"])
