"""Meta-training: unrolled systems, gradient estimators, the trainer."""

from meta_train.inner import inner_training
from meta_train.trainer import TrainState, init_state, make_step
from meta_train.unroll import UnrolledSystem, unroll

__all__ = [
    "TrainState",
    "UnrolledSystem",
    "init_state",
    "inner_training",
    "make_step",
    "unroll",
]
