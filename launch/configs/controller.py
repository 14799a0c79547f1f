"""The Adam controller on every task of ``train_wide``, for runs of 100 to 2,000 steps.

  python -m launch.train --preset=controller --workdir=runs/controller

Five of the tasks in an outer step, each gradient over its running norm; the loss of a step is the
logarithm of its share of a constant predictor's loss, the last fifth of a run counts most, and long
runs count no more than short ones. Nothing of the suites ``validation`` and ``heldout`` is in it.
"""

from launch.config import Config, InnerConfig, estimator, meta_optimizer, optimizer
from launch.suites import suite
from tasks import TaskMixture


def get_config() -> Config:
    trained = suite("train_wide")
    shortest, longest = trained.horizons
    return Config(
        num_steps=2000,
        eval_every=0,
        task=TaskMixture(
            tasks=tuple(trained.tasks.values()),
            names=tuple(trained.tasks),
            drawn=5,
            normalize=True,
        ),
        optimizer=optimizer("adam_controller"),
        inner=InnerConfig(
            horizon=longest, min_horizon=shortest, reduction="late", scale="log", equal_runs=True
        ),
        estimator=estimator("pes", num_particles=8, truncation=50, sigma=0.05),
        meta=meta_optimizer(
            "adam", learning_rate=4e-3, b2=0.99, schedule="cosine", warmup=50, clip_norm=1.0
        ),
    )
