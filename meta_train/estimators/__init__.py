"""Estimators of the gradient of an unrolled computation graph, behind one interface."""

from meta_train.estimators.artbp import ARTBP, artbp
from meta_train.estimators.backprop import BPTT, TBPTT, bptt, tbptt
from meta_train.estimators.base import GradientEstimator
from meta_train.estimators.config import NO_EXCHANGE, Context, EstimatorConfig, Exchange
from meta_train.estimators.es import FullES, TruncatedES, full_es, truncated_es
from meta_train.estimators.forward import RTRL, UORO, ForwardGradient, forward_gradient, rtrl, uoro
from meta_train.estimators.gpes import GPES, NRES, es_single, gpes, nres
from meta_train.estimators.guided import GuidedES, guided_es
from meta_train.estimators.horizons import Horizons, fixed_horizon, log_uniform_horizons
from meta_train.estimators.hybrid import HybridES, Noise, hybrid_es, learned_features
from meta_train.estimators.mixture import Mixture, mixture
from meta_train.estimators.particles import synchronized
from meta_train.estimators.pes import PES, pes
from meta_train.estimators.pes_analytic import PESAnalytic, pes_analytic
from meta_train.estimators.reparam import Reparam, ReparamES, reparam, reparam_es
from meta_train.estimators.reversible import Reversible, reversible
from meta_train.estimators.telescoped import telescoped

ESTIMATORS: dict[str, type[EstimatorConfig]] = {
    "artbp": ARTBP,
    "bptt": BPTT,
    "forward_gradient": ForwardGradient,
    "full_es": FullES,
    "gpes": GPES,
    "guided_es": GuidedES,
    "hybrid_es": HybridES,
    "nres": NRES,
    "es_single": NRES,
    "pes": PES,
    "pes_analytic": PESAnalytic,
    "reparam": Reparam,
    "reparam_es": ReparamES,
    "reversible": Reversible,
    "rtrl": RTRL,
    "tbptt": TBPTT,
    "truncated_es": TruncatedES,
    "uoro": UORO,
}

__all__ = [
    "ARTBP",
    "BPTT",
    "ESTIMATORS",
    "GPES",
    "NO_EXCHANGE",
    "NRES",
    "PES",
    "RTRL",
    "TBPTT",
    "UORO",
    "Context",
    "EstimatorConfig",
    "Exchange",
    "ForwardGradient",
    "FullES",
    "GradientEstimator",
    "GuidedES",
    "Horizons",
    "HybridES",
    "Mixture",
    "Noise",
    "PESAnalytic",
    "Reparam",
    "ReparamES",
    "Reversible",
    "TruncatedES",
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
    "mixture",
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
