"""One learned optimizer on the digits with PES, as ``NAME_digits``: any that ``describe`` lists.

  python -m launch.train --preset=celo2_digits --cfg.num_steps=50 --workdir=runs/celo2

A first run of an architecture: a 64-32-10 network, inner runs of 100 steps.
"""

from launch.config import Config, InnerConfig, estimator, meta_optimizer, optimizer, task

HIDDEN_SIZES = (32,)


def get_config(name: str = "mlp") -> Config:
    # The one that is made for a number of tensors: a kernel and a bias a layer.
    of_task = {"num_tensors": 2 * len(HIDDEN_SIZES) + 2} if name == "per_tensor_sgdm" else {}
    return Config(
        task=task("mlp", hidden_sizes=HIDDEN_SIZES),
        optimizer=optimizer(name, **of_task),
        inner=InnerConfig(horizon=100),
        estimator=estimator("pes", num_particles=32, truncation=20, sigma=0.01),
        meta=meta_optimizer("adam", learning_rate=1e-3, schedule="cosine", clip_value=1.0),
    )
