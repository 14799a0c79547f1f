"""Meta-optimizers: what turns the meta-gradient into a step of theta."""

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
import optax

from meta_train.checks import check_positive, check_whole

SCHEDULES = ("constant", "cosine")


@dataclass(frozen=True)
class MetaOptimizerConfig:
    """The kind of all meta-optimizers: clipping, then an optax optimizer with its schedule.

    Attributes:
      learning_rate: of the outer steps; the highest, where a schedule changes it.
      schedule: constant, or cosine (to 0 over the job's outer steps).
      warmup: outer steps of linear warm-up.
      clip_value: clip each component of the meta-gradient to it; 0: off.
      clip_norm: clip the norm of the meta-gradient to it; 0: off.
    """

    learning_rate: float = 1e-3
    schedule: str = "constant"
    warmup: int = 0
    clip_value: float = 0.0
    clip_norm: float = 0.0

    def __post_init__(self):
        check_positive(learning_rate=self.learning_rate)
        if self.schedule not in SCHEDULES:
            raise ValueError(f"`schedule` must be one of {list(SCHEDULES)}, got {self.schedule!r}.")
        check_whole(0, warmup=self.warmup)
        for name in ("clip_value", "clip_norm"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"`{name}` must be at least 0, got {getattr(self, name)}.")

    @property
    def plain_descent(self) -> bool:
        """Whether every step is plain gradient descent at one rate."""
        return False

    def make(self, num_steps: int) -> optax.GradientTransformation:
        """The optax transformation, for a job of ``num_steps`` outer steps."""
        rate: optax.ScalarOrSchedule = self.learning_rate
        if self.schedule == "cosine":
            rate = optax.warmup_cosine_decay_schedule(
                0.0, self.learning_rate, self.warmup, max(num_steps, self.warmup + 1)
            )
        elif self.warmup:
            rate = optax.linear_schedule(0.0, self.learning_rate, self.warmup)
        return optax.chain(
            optax.clip(self.clip_value) if self.clip_value else optax.identity(),
            optax.clip_by_global_norm(self.clip_norm) if self.clip_norm else optax.identity(),
            self.optimizer(rate),
        )

    def optimizer(self, rate: optax.ScalarOrSchedule) -> optax.GradientTransformation:
        """The optax optimizer at this rate."""
        raise NotImplementedError(f"{type(self).__name__} must define `optimizer`.")


@dataclass(frozen=True)
class Adam(MetaOptimizerConfig):
    """``optax.adam``.

    Attributes:
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: added to the root of the second moment.
    """

    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8

    def optimizer(self, rate):
        return optax.adam(rate, self.b1, self.b2, self.eps)


@dataclass(frozen=True)
class AdamW(Adam):
    """``optax.adamw``.

    Attributes:
      weight_decay: strength of the decay of theta.
    """

    weight_decay: float = 1e-4

    def optimizer(self, rate):
        return optax.adamw(rate, self.b1, self.b2, self.eps, weight_decay=self.weight_decay)


@dataclass(frozen=True)
class SGD(MetaOptimizerConfig):
    """``optax.sgd``.

    Attributes:
      momentum: decay of the momentum; 0: none.
    """

    momentum: float = 0.0

    @property
    def plain_descent(self):
        changing = self.schedule != "constant" or self.warmup
        return not (changing or self.clip_value or self.clip_norm or self.momentum)

    def optimizer(self, rate):
        return optax.sgd(rate, self.momentum or None)


@dataclass(frozen=True)
class RMSProp(MetaOptimizerConfig):
    """``optax.rmsprop``.

    Attributes:
      decay: decay of the second moment.
      eps: added to the second moment's root.
    """

    decay: float = 0.9
    eps: float = 1e-8

    def optimizer(self, rate):
        return optax.rmsprop(rate, self.decay, self.eps)


def holding(
    meta_optimizer: optax.GradientTransformation, held: np.ndarray
) -> optax.GradientTransformation:
    """``meta_optimizer``, which sees no gradient where theta is ``held`` and does not move it.

    Args:
      held: ``[P]`` booleans, for theta as a vector.
    """

    def update(grad, state, theta=None):
        updates, state = meta_optimizer.update(jnp.where(held, 0, grad), state, theta)
        return jnp.where(held, 0, updates), state

    return optax.GradientTransformation(meta_optimizer.init, update)


META_OPTIMIZERS: dict[str, type[MetaOptimizerConfig]] = {
    "adam": Adam,
    "adamw": AdamW,
    "rmsprop": RMSProp,
    "sgd": SGD,
}
