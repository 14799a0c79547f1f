"""The MLP optimizer on four tasks of different shapes at once.

  python -m launch.train --preset=four_tasks --workdir=runs/four_tasks

Noisy quadratics, logistic regression, a ReLU network and a deeper tanh network on the digits; each
task's gradient is divided by its running norm, so that none drowns the others. About 2 minutes
on 2 CPU cores.
"""

from launch.config import Config, InnerConfig, estimator, meta_optimizer, task
from tasks import TaskMixture


def get_config() -> Config:
    return Config(
        num_steps=1000,
        task=TaskMixture(
            tasks=(
                task("quadratic", dim=20, batch_size=4),
                task("mlp", hidden_sizes=(), batch_size=32),
                task("mlp", hidden_sizes=(32,), batch_size=32),
                task("mlp", hidden_sizes=(16, 16), activation="tanh", batch_size=32),
            ),
            names=("quadratic", "logistic", "relu", "tanh"),
            normalize=True,
        ),
        inner=InnerConfig(horizon=100),
        estimator=estimator("pes", num_particles=16, truncation=20, sigma=0.01),
        meta=meta_optimizer("adam", learning_rate=1e-3, schedule="cosine", clip_value=1.0),
    )
