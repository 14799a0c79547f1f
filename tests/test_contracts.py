"""One contract for every task, every learned optimizer and every estimator.

A test of a contract takes the thing by a parameter called ``name``; its other parameters are the
cases. The summary counts both (``pytest_terminal_summary`` in ``conftest.py``).
"""

from tests.contracts.estimator_draws import *  # noqa: F403
from tests.contracts.estimator_inputs import *  # noqa: F403
from tests.contracts.estimators import *  # noqa: F403
from tests.contracts.keys import *  # noqa: F403
from tests.contracts.optimizers import *  # noqa: F403
from tests.contracts.tasks import *  # noqa: F403
