"""The defaults of `launch/config.py`: the MLP optimizer on digits with PES, 1,000 outer steps.

  python -m launch.train --workdir=runs/default

Under 1 minute on 2 CPU cores; a start, not a finished optimizer.
"""

from launch.config import Config


def get_config() -> Config:
    return Config()
