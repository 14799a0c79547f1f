"""The Adam controller on eighteen small tasks, for runs of 100 to 2,000 steps.

  python -m launch.train --preset=controller --workdir=runs/controller

Five of the tasks in an outer step, each gradient over its running norm and cut at three times it; a
quarter of the instances have their weights in other units. The loss of a step is the logarithm of
its share of a constant predictor's loss, the last fifth of a run counts most, and long runs count
no more than short ones. The running mean of theta is what the suite ``validation`` judges every
100 outer steps; ``optimizer_best`` is the best of these. Nothing of ``validation`` or ``heldout``
is trained on.
"""

from launch.config import Config, InnerConfig, estimator, meta_optimizer, optimizer, task
from launch.suites import zoo_task
from tasks import TaskMixture

TASKS = (
    "digits_mlp",
    "digits_tanh",
    "digits_logistic",
    "digits_autoencoder",
    "textures_conv",
    "tumours_mlp",
    "quadratic",
    "source_gru",
    "digits_deep",
    "digits_layer_norm",
    "digits_label_noise",
    "textures_mlp",
    "source_transformer",
    "digits_relu_autoencoder",
    "textures_autoencoder",
    "ill_conditioned",
    "images_mlp",
    "digits_vae",
)


def get_config() -> Config:
    return Config(
        num_steps=1200,
        eval_every=100,
        eval_seeds=4,
        validation="validation",
        task=TaskMixture(
            tasks=tuple(
                task("reparametrized", base=zoo_task(name), probability=0.25, spread=0.7)
                for name in TASKS
            ),
            names=TASKS,
            drawn=5,
            normalize=True,
            cut=3.0,
        ),
        optimizer=optimizer("adam_controller"),
        inner=InnerConfig(
            horizon=2000, min_horizon=100, reduction="late", scale="log", equal_runs=True
        ),
        estimator=estimator("pes", num_particles=8, truncation=50, sigma=0.05),
        meta=meta_optimizer(
            "adam",
            learning_rate=4e-3,
            b2=0.99,
            schedule="cosine",
            warmup=50,
            clip_norm=1.0,
            average=0.99,
        ),
    )
