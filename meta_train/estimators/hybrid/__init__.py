"""Hybrid-ES: a gradient now and then, evolution around the old one in between."""

from meta_train.estimators.hybrid.config import HybridES
from meta_train.estimators.hybrid.differences import control_variate, guided, past_descent
from meta_train.estimators.hybrid.estimator import hybrid_es
from meta_train.estimators.hybrid.noise import Noise
from meta_train.estimators.hybrid.prediction import learned_features
from meta_train.estimators.hybrid.searches import Search, skip, stale
from meta_train.estimators.hybrid.select import select

__all__ = [
    "HybridES",
    "Noise",
    "Search",
    "control_variate",
    "guided",
    "hybrid_es",
    "learned_features",
    "past_descent",
    "select",
    "skip",
    "stale",
]
