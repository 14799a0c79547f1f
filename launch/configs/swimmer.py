"""Gymnasium's Swimmer with PES: a linear policy of 16 weights, episodes of 1,000 steps.

  make setup EXTRAS=control
  python -m launch.train --preset=swimmer --workdir=runs/swimmer

400,000 environment steps, of which one core of a shared machine does 4,500 a second (busy with
other programs: hundreds). ``eval/return`` is the mean return in Gymnasium's own simulation, not in
the one it is trained in; of the result:

  python -m launch.rollout --policy=runs/swimmer/policy
"""

from launch.config import Config, InnerConfig, estimator, meta_optimizer
from tasks.dynamics.control import Control


def get_config() -> Config:
    return Config(
        trains="policy",
        num_steps=200,
        eval_every=25,
        eval_seeds=10,
        task=Control(),
        inner=InnerConfig(horizon=1000),
        estimator=estimator("pes", num_particles=20, truncation=100, sigma=0.3),
        meta=meta_optimizer("sgd", learning_rate=0.3),
    )
