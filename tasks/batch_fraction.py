"""Any task of examples with batches that are really smaller: more noise in the same shapes."""

import dataclasses
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from tasks.arguments import ABOVE_ZERO, check_numbers
from tasks.base import Task
from tasks.wrapper import Wrapper, wrapped


@dataclass(frozen=True)
class BatchFraction(Wrapper):
    """The task with a part of each training batch, repeated to fill it.

    The gradient is that of a batch of examples so much smaller. An instance has one of the
    fractions, drawn with equal probability.

    Source: Metz et al. 2022 (VeLO), task augmentation. Differs: fractions that divide the batch.

    Attributes:
      fractions: of the batch, each of which times the batch size is a whole number that divides it.
    """

    fractions: tuple[float, ...] = (1.0, 0.5, 0.25, 0.125)

    def __post_init__(self):
        super().__post_init__()
        check_numbers(ABOVE_ZERO, fractions=self.fractions)

    def make(self, data_dir: str | None = None) -> Task:
        """The task.

        Args:
          data_dir: folder of prepared data sets.

        Raises:
          ValueError: if the task has no batches of examples, or fractions do not divide them.
        """
        task = self.base.make(data_dir)
        base: Any = self.base
        size: int = getattr(base, "batch_size", 0)
        # Asked of another size too: a batch that is no list of examples may be as long by chance.
        if not size or not all(
            leaf.shape[:1] == (number,)
            for number, of in (
                (size, task),
                (size + 1, dataclasses.replace(base, batch_size=size + 1).make(data_dir)),
            )
            for leaf in _batch_of(of)
        ):
            raise ValueError(
                f"`base` must be a task whose batches are `batch_size` examples, got {self.base}."
            )
        parts = [fraction * size for fraction in self.fractions]
        if not parts or any(n < 1 or n != round(n) or size % round(n) for n in parts):
            raise ValueError(
                f"`fractions` of the batch size, {size}, must be whole numbers that divide it, got "
                f"{self.fractions}, which give {parts}."
            )

        def sample(key):
            key_base, key_part = jax.random.split(key)
            which = jax.random.randint(key_part, (), 0, len(parts))
            return {"base": task.sample(key_base), "examples": jnp.array(parts, jnp.int32)[which]}

        at = wrapped(task)

        def batch(instance, key, split):
            found = at.batch(instance, key, split)
            if split != "train":
                return found
            index = jnp.arange(size) % instance["examples"]
            return jax.tree.map(lambda leaf: leaf[index], found)

        return at._replace(sample=sample, batch=batch)


def _batch_of(task: Task) -> list[jax.ShapeDtypeStruct]:
    """The shapes of a training batch's arrays."""
    key = jax.random.key(0)
    return jax.tree.leaves(jax.eval_shape(lambda: task.batch(task.sample(key), key, "train")))
