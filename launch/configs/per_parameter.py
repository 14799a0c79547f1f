"""A per-parameter rule in the published recipe: Celo2 on the four tasks of ``celo4``.

  python -m launch.train --preset=per_parameter --workdir=runs/per_parameter

The tasks have one shape, so they are instances of one population. As published: networks in other
units (one scale each), horizons log-uniform from 100 to 2,000, truncations of 50 inner steps, PES
with deviations of .01, AdamW. Differs: 1,024 inner runs at a time instead of 64, and fewer outer
steps (2.5e8 inner steps in all instead of 3.2e8); scales from .1 to 10 instead of .001 to 1,000;
the rule's rate falls along a cosine in training as in use, and is told the drawn horizon; every
parameter follows the learned rule, biases too, as names of other people's biases are not known; the
loss is the logarithm of its share of a constant predictor's, the last fifth of a run counts most.

About 3 minutes on an H200, after a minute of compiling; hours on two cores.
"""

from launch.config import Config, InnerConfig, estimator, meta_optimizer, optimizer, task


def get_config() -> Config:
    return Config(
        num_steps=4800,
        eval_every=0,
        checkpoint_every=1000,
        task=task(
            "reparametrized",
            base=task("mlp", dataset="digits,mnist5k_8,patches_8,textures_8"),
            kind="global",
            probability=1.0,
            spread=2.3,
        ),
        optimizer=optimizer("celo2", learning_rate=0.004, adam_names="", schedule="cosine"),
        inner=InnerConfig(
            horizon=2000, min_horizon=100, reduction="late", scale="log", equal_runs=True
        ),
        estimator=estimator("pes", num_particles=1024, truncation=50, sigma=0.01),
        meta=meta_optimizer(
            "adamw",
            learning_rate=1e-3,
            schedule="cosine",
            warmup=100,
            clip_norm=1.0,
            average=0.99,
        ),
    )
