"""Any task with its weights in other units: what a learned rate should not depend on."""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from tasks.arguments import SHARE, Span, check_name, check_number
from tasks.base import Task
from tasks.wrapper import Wrapper, wrapped

KINDS = ("tensor", "global")


@dataclass(frozen=True)
class Reparametrized(Wrapper):
    """The task in parameters ``p / s``: the same function at the start, other gradients.

    An instance has scales with some probability: ``s = exp(U(-spread, spread))`` for each tensor,
    or one for all; else 1.

    Source: Metz et al. 2022 (VeLO), task augmentation. Differs: its probability, and the range.

    Attributes:
      kind: tensor (each its own scale) or global (one for all).
      probability: of an instance having scales.
      spread: of the scales' logarithm, to both sides.
    """

    kind: str = "tensor"
    probability: float = 0.5
    spread: float = 1.5

    def __post_init__(self):
        super().__post_init__()
        check_name(KINDS, kind=self.kind)
        check_number(SHARE, probability=self.probability)
        check_number(Span(0, 20), spread=self.spread)

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

        @functools.cache  # Tracing the network takes longer than all else.
        def num_tensors():
            def start(key):
                return task.init(task.sample(key), key)

            # Of a key's type alone: what is known would be computed, an operation a program, where
            # JAX is asked to evaluate at once, and stay in the program that is being traced.
            key = jax.eval_shape(lambda: jax.random.key(0))
            return len(jax.tree.leaves(jax.eval_shape(start, key)))

        def sample(key):
            key_base, key_used, key_scales = jax.random.split(key, 3)
            instance, tensors = task.sample(key_base), num_tensors()
            number = tensors if self.kind == "tensor" else 1
            logs = jax.random.uniform(
                key_scales, (number,), minval=-self.spread, maxval=self.spread
            )
            used = jax.random.bernoulli(key_used, self.probability)
            logs = jnp.broadcast_to(jnp.where(used, logs, 0.0), (tensors,))
            return {"base": instance, "log_scales": logs}

        at = wrapped(task)
        base_score = at.score

        def init(instance, key):
            return scaled(at.init(instance, key), instance["log_scales"], -1)

        def loss(params, instance, batch, key):
            return at.loss(scaled(params, instance["log_scales"], 1), instance, batch, key)

        def score(params, instance, split):
            return base_score(scaled(params, instance["log_scales"], 1), instance, split)

        return at._replace(sample=sample, init=init, loss=loss, score=base_score and score)
