"""Training runs that can be walked back bit for bit, for exact gradients in almost no memory."""

from meta_train.reversible.arithmetic import DOUBLE, SINGLE, FixedPoint
from meta_train.reversible.dynamics import Dynamics
from meta_train.reversible.report import Failure, Report, explain, raise_if_failed
from meta_train.reversible.sgd import Setup, Trained, hypergradients, setup, train

__all__ = [
    "DOUBLE",
    "SINGLE",
    "Dynamics",
    "Failure",
    "FixedPoint",
    "Report",
    "Setup",
    "Trained",
    "explain",
    "hypergradients",
    "raise_if_failed",
    "setup",
    "train",
]
