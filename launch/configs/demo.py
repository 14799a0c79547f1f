"""The demo: the Adam controller on four tiny tasks with PES.

  make demo

The recipe of the controller in the package (`--preset=controller`) at a fiftieth of its size: runs
of 50 to 200 steps, all four tasks in every outer step.
"""

from launch.config import Config, InnerConfig, estimator, meta_optimizer, optimizer
from launch.suites import zoo_task
from tasks import TaskMixture

TASKS = ("digits_mlp", "digits_autoencoder", "tumours_mlp", "quadratic")


def get_config() -> Config:
    return Config(
        num_steps=300,
        eval_every=0,
        task=TaskMixture(
            tasks=tuple(zoo_task(name) for name in TASKS), names=TASKS, normalize=True, cut=3.0
        ),
        optimizer=optimizer("adam_controller"),
        inner=InnerConfig(
            horizon=200, min_horizon=50, reduction="late", scale="log", equal_runs=True
        ),
        estimator=estimator("pes", num_particles=8, truncation=50, sigma=0.05),
        meta=meta_optimizer(
            "adam",
            learning_rate=4e-3,
            b2=0.99,
            schedule="cosine",
            warmup=20,
            clip_norm=1.0,
            average=0.98,
        ),
    )
