"""The demo: the Adam controller on four tiny tasks with PES.

  make demo

The recipe of the controller in the package (`--preset=controller`) at a fiftieth of its size: runs
of 50 to 200 steps, all four tasks in every outer step.
"""

import dataclasses

from launch.config import Config
from launch.configs import controller
from launch.suites import zoo_task
from tasks import TaskMixture

TASKS = ("digits_mlp", "digits_autoencoder", "tumours_mlp", "quadratic")


def get_config() -> Config:
    recipe = controller.get_config()
    return dataclasses.replace(
        recipe,
        num_steps=300,
        eval_every=0,
        eval_seeds=Config.eval_seeds,
        validation="",
        task=TaskMixture(
            tasks=tuple(zoo_task(name) for name in TASKS), names=TASKS, normalize=True, cut=3.0
        ),
        inner=dataclasses.replace(recipe.inner, horizon=200, min_horizon=50),
        meta=dataclasses.replace(recipe.meta, warmup=20, average=0.98),
    )
