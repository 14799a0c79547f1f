"""Estimators of the gradient of an unrolled computation graph, behind one interface."""

from meta_train.estimators.backprop import bptt, tbptt
from meta_train.estimators.base import (
    GradientEstimator,
    Horizons,
    fixed_horizon,
    log_uniform_horizons,
)
from meta_train.estimators.es import full_es, truncated_es
from meta_train.estimators.pes import pes
from meta_train.estimators.reversible import reversible

__all__ = [
    "GradientEstimator",
    "Horizons",
    "bptt",
    "fixed_horizon",
    "full_es",
    "log_uniform_horizons",
    "pes",
    "reversible",
    "tbptt",
    "truncated_es",
]
