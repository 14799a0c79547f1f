"""Meta-optimizers: what turns the meta-gradient into a step of theta."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from meta_train.checks import check_decay, check_positive, check_whole

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
      average: decay of a running mean of theta, which is then what is evaluated and exported;
        0: theta itself is.
    """

    learning_rate: float = 1e-3
    schedule: str = "constant"
    warmup: int = 0
    clip_value: float = 0.0
    clip_norm: float = 0.0
    average: float = 0.0

    def __post_init__(self):
        check_positive(learning_rate=self.learning_rate)
        if self.schedule not in SCHEDULES:
            raise ValueError(
                f"`schedule` must be one of {', '.join(SCHEDULES)}, got {self.schedule!r}."
            )
        check_whole(0, warmup=self.warmup)
        for name in ("clip_value", "clip_norm"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"`{name}` must be at least 0, got {getattr(self, name)}.")
        if not 0 <= self.average < 1:
            raise ValueError(
                f"`average` must be at least 0 (off) and below 1, got {self.average}; .99 is a "
                "mean over about 100 outer steps."
            )

    @property
    def plain_descent(self) -> bool:
        """Whether every step is plain gradient descent at one rate."""
        return False

    def rate(
        self, num_steps: int, learning_rate: float | jax.Array | None = None
    ) -> optax.ScalarOrSchedule:
        """The learning rate of a job of ``num_steps`` outer steps; a function of those done.

        Args:
          learning_rate: in place of ``self.learning_rate``; a scalar, perhaps traced.
        """
        highest: Any = self.learning_rate if learning_rate is None else learning_rate
        rising = optax.linear_schedule(0.0, highest, self.warmup) if self.warmup else None
        if self.schedule == "cosine":
            # As `optax.warmup_cosine_decay_schedule`, which takes no traced rate.
            steps = max(num_steps, self.warmup + 1) - self.warmup
            falling = optax.cosine_decay_schedule(highest, steps)
            return optax.join_schedules([rising, falling], [self.warmup]) if rising else falling
        return rising or highest

    def make(
        self,
        num_steps: int,
        held: np.ndarray | None = None,
        learning_rate: float | jax.Array | None = None,
    ) -> optax.GradientTransformation:
        """The optax transformation, for a job of ``num_steps`` outer steps.

        Args:
          held: ``[P]`` booleans, for theta as a vector: what no step moves.
          learning_rate: in place of ``self.learning_rate``; a scalar, perhaps traced.
        """
        found = optax.chain(
            optax.clip(self.clip_value) if self.clip_value else optax.identity(),
            optax.clip_by_global_norm(self.clip_norm) if self.clip_norm else optax.identity(),
            self.optimizer(self.rate(num_steps, learning_rate)),
        )
        if held is not None:
            found = holding(found, held)
        return averaging(found, self.average) if self.average else found

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

    def __post_init__(self):
        super().__post_init__()
        check_decay(b1=self.b1, b2=self.b2)
        check_positive(eps=self.eps)

    def optimizer(self, rate):
        return optax.adam(rate, self.b1, self.b2, self.eps)


@dataclass(frozen=True)
class AdamW(Adam):
    """``optax.adamw``.

    Attributes:
      weight_decay: strength of the decay of theta.
    """

    weight_decay: float = 1e-4

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.weight_decay < float("inf"):
            raise ValueError(
                f"`weight_decay` must be a finite number of at least 0, got {self.weight_decay}."
            )

    def optimizer(self, rate):
        return optax.adamw(rate, self.b1, self.b2, self.eps, weight_decay=self.weight_decay)


@dataclass(frozen=True)
class SGD(MetaOptimizerConfig):
    """``optax.sgd``.

    Attributes:
      momentum: decay of the momentum; 0: none.
    """

    momentum: float = 0.0

    def __post_init__(self):
        super().__post_init__()
        check_decay(momentum=self.momentum)

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

    def __post_init__(self):
        super().__post_init__()
        check_decay(decay=self.decay)
        check_positive(eps=self.eps)

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


class Averaged(NamedTuple):
    """State of ``averaging``: the meta-optimizer's, and the running mean of theta."""

    state: Any
    average: Any


def averaging(
    meta_optimizer: optax.GradientTransformation, decay: float
) -> optax.GradientTransformation:
    """``meta_optimizer``, whose state keeps a running mean of theta, from the first theta on.

    ``average <- decay average + (1 - decay) theta`` after each step (Polyak and Juditsky 1992, with
    an exponential window).
    """

    def init(theta):
        # A copy, as a step may be given its state's memory and no part of that twice.
        return Averaged(meta_optimizer.init(theta), jax.tree.map(jnp.copy, theta))

    def update(grad, state, theta=None):
        updates, inner = meta_optimizer.update(grad, state.state, theta)
        moved = optax.apply_updates(theta, updates)
        return updates, Averaged(
            inner, optax.incremental_update(moved, state.average, step_size=1 - decay)
        )

    return optax.GradientTransformation(init, update)


def judged(theta: Any, meta_opt_state: Any) -> Any:
    """What is evaluated and exported of a job: the running mean of theta where there is one."""
    return meta_opt_state.average if isinstance(meta_opt_state, Averaged) else theta


META_OPTIMIZERS: dict[str, type[MetaOptimizerConfig]] = {
    "adam": Adam,
    "adamw": AdamW,
    "rmsprop": RMSProp,
    "sgd": SGD,
}
