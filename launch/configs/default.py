"""The defaults of `launch/config.py`: the MLP optimizer on digits with PES, 1,000 outer steps.

  python -m launch.train --workdir=runs/default

Under 1 minute on 2 CPU cores. The mean meta-loss of an episode falls from 2.42 to about 0.54 nats
(final loss about 0.12): a start, not a finished optimizer.
"""

from launch.config import Config


def get_config() -> Config:
    return Config()
