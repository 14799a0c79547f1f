"""Tasks by name, and suites of them: what optimizers are trained on, chosen by and judged by.

Suites are data. What is trained on (``train_small``, ``train_wide``), what choices are made by
(``validation``) and what is reported (``heldout``) share no source of data, and nothing else has
an architecture of ``heldout``; a test checks it. ``celo4`` has the shape of the published recipe,
MNIST among its data, so it shares sources with ``heldout``, but no data set: the held-out images
have other sizes or colours.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, NamedTuple

from launch.choices import attribute_of, suggest
from launch.config import task

if TYPE_CHECKING:
    from tasks import TaskConfig

# Name -> the task's name and its arguments.
ZOO: dict[str, tuple[str, dict[str, Any]]] = {
    # The published four-task recipe in shape: MLP 64-32-10 on 8x8 images, batch 64.
    "celo4_digits": ("mlp", {"dataset": "digits"}),
    "celo4_mnist5k": ("mlp", {"dataset": "mnist5k_8"}),
    "celo4_patches": ("mlp", {"dataset": "patches_8"}),
    "celo4_textures": ("mlp", {"dataset": "textures_8"}),
    # Training: digits, textures, tumours, Python source, quadratics and Rosenbrock's valley.
    "digits_mlp": ("mlp", {"batch_size": 32}),
    "digits_tanh": (
        "mlp",
        {"hidden_sizes": (16, 16), "activation": "tanh", "batch_size": 32, "standardize": True},
    ),
    "digits_logistic": ("mlp", {"hidden_sizes": (), "batch_size": 32}),
    "digits_autoencoder": (
        "autoencoder",
        {"hidden_sizes": (32, 8, 32), "activation": "tanh", "batch_size": 32},
    ),
    "textures_conv": ("conv", {"dataset": "textures_8", "channels": (8,), "batch_size": 16}),
    "tumours_mlp": ("mlp", {"dataset": "breast_cancer", "hidden_sizes": (24,), "batch_size": 16}),
    "quadratic": ("quadratic", {"dim": 16, "batch_size": 4}),
    "source_gru": (
        "rnn_lm",
        {"dataset": "source", "hidden_size": 16, "width": 12, "length": 12, "batch_size": 8},
    ),
    # Training, wide.
    "digits_deep": (
        "mlp",
        {"hidden_sizes": (20, 20, 20, 20), "batch_size": 32, "standardize": True},
    ),
    "digits_layer_norm": (
        "mlp",
        {"hidden_sizes": (24, 24), "normalization": "layer", "batch_size": 32},
    ),
    "digits_mse": ("mlp", {"loss": "mse", "activation": "tanh", "batch_size": 32}),
    "digits_label_noise": (
        "mlp",
        {
            "hidden_sizes": (48,),
            "activation": "gelu",
            "label_noise": (0.0, 0.2, 0.4),
            "batch_size": 16,
        },
    ),
    "digits_relu_autoencoder": ("autoencoder", {"hidden_sizes": (32, 6, 32)}),
    "digits_vae": ("vae", {"batch_size": 32}),
    "digits_conv": ("conv", {"channels": (8, 12), "pool": False, "batch_size": 16}),
    "digits_resnet": ("resnet", {"channels": (8,), "batch_size": 16}),
    "images_mlp": (
        "mlp",
        {
            "dataset": "digits,textures_8",
            "activation": "relu,tanh,gelu",
            "init_scale": (0.5, 1.0, 2.0),
            "batch_size": 32,
        },
    ),
    "textures_mlp": (
        "mlp",
        {
            "dataset": "textures_8",
            "hidden_sizes": (48,),
            "activation": "swish",
            "batch_size": 128,
            "standardize": True,
        },
    ),
    "textures_group_norm": (
        "conv",
        {
            "dataset": "textures_16",
            "channels": (4, 8),
            "normalization": "group",
            "activation": "relu,swish",
            "batch_size": 8,
        },
    ),
    "textures_autoencoder": (
        "autoencoder",
        {
            "dataset": "textures_8",
            "hidden_sizes": (24, 12, 24),
            "activation": "relu,tanh,gelu",
            "batch_size": 32,
        },
    ),
    "tumours_logistic": ("linear", {"batch_size": 32}),
    "source_transformer": (
        "transformer_lm",
        {"dataset": "source", "heads": 1, "length": 8, "batch_size": 8},
    ),
    "source_wide_gru": (
        "rnn_lm",
        {"dataset": "source", "hidden_size": 32, "length": 16, "batch_size": 4},
    ),
    "ill_conditioned": ("quadratic", {"dim": 32, "condition": 1e4, "noise": 0.3}),
    "rosenbrock": ("toy", {"noise": 0.1}),
    "tumours_hyperparameters": ("hyperparameters", {}),
    "tumours_learned_optimizer": ("learned_optimizer", {}),
    # Validation: faces, diabetes, the source of packages, a chain.
    "faces_mlp": (
        "mlp",
        {"dataset": "faces", "hidden_sizes": (16,), "batch_size": 16, "standardize": True},
    ),
    "faces_conv": (
        "conv",
        {
            "dataset": "faces",
            "channels": (4, 4),
            "normalization": "layer",
            "activation": "gelu",
            "batch_size": 8,
        },
    ),
    "faces_autoencoder": (
        "autoencoder",
        {"dataset": "faces", "hidden_sizes": (16,), "batch_size": 16},
    ),
    "diabetes_linear": ("linear", {"dataset": "diabetes", "batch_size": 16}),
    "diabetes_mlp": (
        "mlp",
        {
            "dataset": "diabetes",
            "hidden_sizes": (20, 20),
            "activation": "gelu",
            "batch_size": 32,
        },
    ),
    "packages_gru": (
        "rnn_lm",
        {"dataset": "packages", "hidden_size": 24, "length": 16, "batch_size": 4},
    ),
    "packages_transformer": (
        "transformer_lm",
        {"dataset": "packages", "width": 20, "length": 12, "batch_size": 4},
    ),
    "dixon_price": ("toy", {"function": "dixon_price", "noise": 0.3}),
    # Held out: MNIST above 8 pixels, photographs in colour, wine, English.
    "mnist14_mlp": (
        "mlp",
        {
            "dataset": "mnist5k_14",
            "hidden_sizes": (40, 30, 20),
            "activation": "swish",
            "batch_size": 24,
        },
    ),
    "mnist28_mlp": (
        "mlp",
        {"dataset": "mnist5k", "hidden_sizes": (12,), "activation": "gelu", "batch_size": 16},
    ),
    "mnist14_conv": (
        "conv",
        {
            "dataset": "mnist5k_14",
            "channels": (6, 10),
            "normalization": "layer",
            "activation": "swish",
            "batch_size": 4,
        },
    ),
    "mnist14_autoencoder": (
        "autoencoder",
        {
            "dataset": "mnist5k_14",
            "hidden_sizes": (40, 10, 40),
            "activation": "gelu",
            "batch_size": 16,
        },
    ),
    "mnist14_vae": (
        "vae",
        {
            "dataset": "mnist5k_14",
            "hidden_sizes": (40,),
            "latents": 6,
            "activation": "relu",
            "batch_size": 16,
        },
    ),
    "photographs_mlp": (
        "mlp",
        {"dataset": "patches_8_color", "hidden_sizes": (64,), "batch_size": 48},
    ),
    "photographs_resnet": (
        "resnet",
        {
            "dataset": "patches_8_color",
            "channels": (4, 8),
            "normalization": "layer",
            "activation": "gelu",
            "batch_size": 8,
        },
    ),
    "photographs_vit": (
        "vit",
        {"dataset": "patches_16_color", "layers": 2, "batch_size": 3},
    ),
    "prose_lstm": ("rnn_lm", {"cell": "lstm", "hidden_size": 28, "length": 12, "batch_size": 3}),
    "prose_transformer": (
        "transformer_lm",
        {"heads": 4, "layers": 2, "length": 10, "batch_size": 2},
    ),
    "wine_mlp": (
        "mlp",
        {"dataset": "wine", "hidden_sizes": (10, 10), "activation": "tanh", "batch_size": 8},
    ),
    "styblinski_tang": ("toy", {"function": "styblinski_tang", "dim": 20, "noise": 1.0}),
    # Smoke.
    "smoke_quadratic": ("quadratic", {"dim": 4}),
    "smoke_logistic": ("linear", {"batch_size": 8}),
    "smoke_mlp": ("mlp", {"hidden_sizes": (8,), "batch_size": 8}),
}


# Of runs: steps are counted in 32 bits, as ``meta_train.checks.MAX_LENGTH`` says.
MAX_HORIZON = 2**30


class _Spec(NamedTuple):
    tasks: tuple[str, ...]
    horizons: tuple[int, ...]
    reparametrized: bool = False


_SMALL = (
    "digits_mlp",
    "digits_tanh",
    "digits_logistic",
    "digits_autoencoder",
    "textures_conv",
    "tumours_mlp",
    "quadratic",
    "source_gru",
)
_WIDE = (
    *_SMALL,
    "digits_deep",
    "digits_layer_norm",
    "digits_mse",
    "digits_label_noise",
    "digits_relu_autoencoder",
    "digits_vae",
    "digits_conv",
    "digits_resnet",
    "images_mlp",
    "textures_mlp",
    "textures_group_norm",
    "textures_autoencoder",
    "tumours_logistic",
    "source_transformer",
    "source_wide_gru",
    "ill_conditioned",
    "rosenbrock",
    "tumours_hyperparameters",
    "tumours_learned_optimizer",
)
_SUITES = {
    "celo4": _Spec(
        ("celo4_digits", "celo4_mnist5k", "celo4_patches", "celo4_textures"), (100, 2000)
    ),
    "train_small": _Spec(_SMALL, (100, 400), reparametrized=True),
    "train_wide": _Spec(_WIDE, (100, 2000), reparametrized=True),
    "validation": _Spec(
        (
            "faces_mlp",
            "faces_conv",
            "faces_autoencoder",
            "diabetes_linear",
            "diabetes_mlp",
            "packages_gru",
            "packages_transformer",
            "dixon_price",
        ),
        (400, 2000),
    ),
    "heldout": _Spec(
        (
            "mnist14_mlp",
            "mnist28_mlp",
            "mnist14_conv",
            "mnist14_autoencoder",
            "mnist14_vae",
            "photographs_mlp",
            "photographs_resnet",
            "photographs_vit",
            "prose_lstm",
            "prose_transformer",
            "wine_mlp",
            "styblinski_tang",
        ),
        (400, 2000, 10000),
    ),
    "smoke": _Spec(("smoke_quadratic", "smoke_logistic", "smoke_mlp"), (20, 100)),
}
SUITES = tuple(_SUITES)
# Those by which theta may be chosen.
TO_CHOOSE_BY = tuple(name for name in SUITES if name != "heldout")


class Suite(NamedTuple):
    """Tasks that belong together; one of your own is ``--suite=MODULE:NAME``.

    Attributes:
      name: of the suite.
      tasks: name -> task, as ``launch.config.task`` or ``zoo_task`` make them.
      horizons: numbers of inner steps: the shortest and the longest where it is trained on, those
        at which it is judged where it is not.
      rescaled: whether every second instance has its weights in other units.
    """

    name: str
    tasks: dict[str, TaskConfig]
    horizons: tuple[int, ...]
    rescaled: bool = False


@functools.cache
def zoo_task(name: str) -> TaskConfig:
    """The task of the zoo called ``name``.

    Raises:
      ValueError: if there is none.
    """
    if name not in ZOO:
        raise ValueError(
            f"the task must be one of {', '.join(ZOO)}, got {name!r}.{suggest(name, ZOO)}"
        )
    kind, arguments = ZOO[name]
    return task(kind, **arguments)


def suite(name: str) -> Suite:
    """The suite called ``name``; the tasks of ``train_small`` and ``train_wide`` are rescaled.

    There every second instance has its weights in other units, each tensor's drawn by itself
    (the task ``reparametrized``).

    Raises:
      ValueError: if there is none.
    """
    if not isinstance(name, str) or name not in _SUITES:
        meant = suggest(str(name), SUITES)
        raise ValueError(f"the suite must be one of {', '.join(SUITES)}, got {name!r}.{meant}")
    spec = _SUITES[name]
    found = {member: zoo_task(member) for member in spec.tasks}
    if spec.reparametrized:
        found = {member: task("reparametrized", base=config) for member, config in found.items()}
    return Suite(name, found, spec.horizons, spec.reparametrized)


def find_suite(name: str) -> Suite:
    """The suite called ``name``, or the ``Suite`` that ``MODULE:NAME`` names.

    Raises:
      ValueError: if there is none, or it is no sound one; for the flag ``--suite``.
    """
    if ":" not in name:
        if name not in SUITES:
            raise ValueError(
                f"--suite must be one of {', '.join(SUITES)}, or MODULE:NAME for one of your own, "
                f"got {name!r}.{suggest(name, SUITES)}"
            )
        return suite(name)
    try:
        found = attribute_of(name)
    except ValueError as error:
        raise ValueError(f"--suite {error}") from error.__cause__
    if not isinstance(found, Suite):
        raise ValueError(
            f"--suite names {name!r}, which must be a launch.suites.Suite (name, tasks, horizons), "
            f"got one of type {type(found).__name__}."
        )
    from tasks import TaskConfig

    is_sound = isinstance(found.tasks, dict) and found.tasks
    if not is_sound or not all(isinstance(x, TaskConfig) for x in found.tasks.values()):
        raise ValueError(
            f"--suite names {name!r}, whose `tasks` must be a dict of one or more tasks by name, "
            f"each from launch.config.task or launch.suites.zoo_task, got {_types_of(found.tasks)}."
        )
    for task_name in found.tasks:  # They head tables and columns.
        if not (isinstance(task_name, str) and task_name.strip() and task_name.isprintable()):
            raise ValueError(
                f"--suite names {name!r}, whose tasks must have names of one line that can be "
                f"printed, got {task_name!r}."
            )
    given = found.horizons if isinstance(found.horizons, tuple | list) else ()
    whole = all(type(h) is int and 0 < h <= MAX_HORIZON for h in given)
    if not whole or not given or sorted(set(given)) != list(given):
        raise ValueError(
            f"--suite names {name!r}, whose `horizons` must be whole numbers from 1 to "
            f"{MAX_HORIZON:,} in increasing order, got {found.horizons!r}."
        )
    return found


def _types_of(tasks: Any) -> str:
    """What was given for tasks, in short: functions have long names."""
    if not isinstance(tasks, dict):
        return f"one of type {type(tasks).__name__}"
    return ", ".join(f"{name!r} of type {type(x).__name__}" for name, x in tasks.items()) or "none"
