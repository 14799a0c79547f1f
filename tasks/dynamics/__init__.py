"""Systems that are not optimizer training, each as a pair of functions ``init`` and ``step``."""

from tasks.dynamics.char_lstm import char_lstm, char_lstm_theta
from tasks.dynamics.influence_balancing import influence_balancing
from tasks.dynamics.toy_regression import toy_regression

__all__ = ["char_lstm", "char_lstm_theta", "influence_balancing", "toy_regression"]
