"""The Adam controller on 36 small tasks, for runs of 100 to 2,000 steps.

  python -m launch.train --preset=controller --workdir=runs/controller

Five of the tasks in an outer step, each gradient over its running norm and cut at three times it; a
quarter of the instances have their weights in other units, and where batches are of examples, an
instance has whole ones, halves or quarters. The loss of a step is the logarithm of its share of a
constant predictor's loss, the mean of that on a training batch and on a held-back one, so that a
decay is learned where a run overfits; the last fifth of a run counts most, and long runs count no
more than short ones. The running mean of theta is what is exported, and what the suite
``validation`` judges. Nothing of ``validation`` or ``heldout`` is trained on.

Its 36 programs take more mappings of memory than Linux gives a process: as root,
``sysctl -w vm.max_map_count=262144`` makes it two to three times as fast.
"""

from typing import Any

from launch.config import Config, InnerConfig, estimator, meta_optimizer, optimizer, task
from launch.suites import zoo_task
from tasks import TaskConfig, TaskMixture

ZOO = (
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
    "digits_mse",
    "digits_conv",
    "textures_group_norm",
    "tumours_logistic",
    "source_wide_gru",
    "rosenbrock",
)
# More shapes over the same data; on 24 tasks alone theta fits these within some hundred steps.
MORE: dict[str, tuple[str, dict[str, Any]]] = {
    "digits_narrow": (
        "mlp",
        {"hidden_sizes": (12,), "activation": "gelu", "batch_size": 8, "standardize": True},
    ),
    "digits_wide": ("mlp", {"hidden_sizes": (64,), "activation": "relu,swish", "batch_size": 16}),
    "digits_two": (
        "mlp",
        {
            "hidden_sizes": (32, 32),
            "activation": "relu,gelu",
            "batch_size": 64,
            "init_scale": (0.5, 1.0, 2.0),
        },
    ),
    "tumours_two": (
        "mlp",
        {
            "dataset": "breast_cancer",
            "hidden_sizes": (48, 24),
            "activation": "relu,gelu",
            "batch_size": 32,
        },
    ),
    "textures16_mlp": ("mlp", {"dataset": "textures_16", "hidden_sizes": (16,), "batch_size": 16}),
    "textures16_conv": (
        "conv",
        {"dataset": "textures_16", "channels": (6, 6), "activation": "relu", "batch_size": 8},
    ),
    "digits_conv_norm": (
        "conv",
        {
            "channels": (6, 6),
            "normalization": "layer",
            "activation": "relu,swish",
            "batch_size": 8,
        },
    ),
    "digits_shallow_autoencoder": (
        "autoencoder",
        {"hidden_sizes": (24,), "activation": "relu,gelu", "batch_size": 16},
    ),
    "textures_vae": ("vae", {"dataset": "textures_8", "hidden_sizes": (24,), "batch_size": 16}),
    "source_two_heads": (
        "transformer_lm",
        {"dataset": "source", "width": 24, "heads": 2, "length": 12, "batch_size": 4},
    ),
    "source_long_gru": (
        "rnn_lm",
        {"dataset": "source", "hidden_size": 24, "width": 8, "length": 24, "batch_size": 4},
    ),
    "quadratic_noisy": ("quadratic", {"dim": 48, "condition": 1e3, "noise": 1.0}),
}
# Those without batches of examples, or of few.
WHOLE = {
    "quadratic",
    "source_gru",
    "source_transformer",
    "ill_conditioned",
    "digits_vae",
    "textures_group_norm",
    "source_wide_gru",
    "rosenbrock",
    "source_two_heads",
    "source_long_gru",
    "quadratic_noisy",
}


def member(name: str) -> TaskConfig:
    """The task of that name with what varies from instance to instance."""
    kind, arguments = MORE.get(name, ("", {}))
    base = task(kind, **arguments) if kind else zoo_task(name)
    if name not in WHOLE:
        base = task("batch_fraction", base=base, fractions=(1.0, 0.5, 0.25))
    return task("reparametrized", base=base, probability=0.25, spread=0.7)


def get_config() -> Config:
    names = (*ZOO, *MORE)
    return Config(
        num_steps=2400,
        eval_every=800,
        eval_seeds=4,
        validation="validation",
        task=TaskMixture(
            tasks=tuple(map(member, names)), names=names, drawn=5, normalize=True, cut=3.0
        ),
        optimizer=optimizer("adam_controller", decay=0.0135),
        inner=InnerConfig(
            horizon=2000,
            min_horizon=100,
            meta_loss="both",
            reduction="late",
            scale="log",
            equal_runs=True,
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
