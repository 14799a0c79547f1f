"""Estimators of the gradient of an unrolled computation graph, behind one interface."""

from meta_train.estimators.artbp import artbp
from meta_train.estimators.backprop import bptt, tbptt
from meta_train.estimators.base import (
    GradientEstimator,
    Horizons,
    fixed_horizon,
    log_uniform_horizons,
    synchronized,
)
from meta_train.estimators.es import full_es, truncated_es
from meta_train.estimators.forward import forward_gradient, rtrl, uoro
from meta_train.estimators.gpes import es_single, gpes, nres
from meta_train.estimators.guided import guided_es
from meta_train.estimators.hybrid import hybrid_es
from meta_train.estimators.messages import ALONE, Exchange
from meta_train.estimators.noise import Noise
from meta_train.estimators.pes import pes
from meta_train.estimators.pes_analytic import pes_analytic
from meta_train.estimators.prediction import learned_features
from meta_train.estimators.reparam import reparam, reparam_es
from meta_train.estimators.reversible import reversible
from meta_train.estimators.telescoped import telescoped

__all__ = [
    "ALONE",
    "Exchange",
    "GradientEstimator",
    "Horizons",
    "Noise",
    "artbp",
    "bptt",
    "es_single",
    "fixed_horizon",
    "forward_gradient",
    "full_es",
    "gpes",
    "guided_es",
    "hybrid_es",
    "learned_features",
    "log_uniform_horizons",
    "nres",
    "pes",
    "pes_analytic",
    "reparam",
    "reparam_es",
    "reversible",
    "rtrl",
    "synchronized",
    "tbptt",
    "telescoped",
    "truncated_es",
    "uoro",
]
