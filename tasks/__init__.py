"""Inner problems for meta-training."""

from collections.abc import Callable

from tasks.autoencoder import Autoencoder
from tasks.base import SPLITS, Split, Task, TaskConfig
from tasks.batch_fraction import BatchFraction
from tasks.conv import ConvNet
from tasks.hyperparameters import Hyperparameters
from tasks.learned_optimizer import LearnedOptimizerTask
from tasks.linear import Linear
from tasks.mixture import TaskMixture
from tasks.mlp import mlp_classifier
from tasks.quadratic import quadratic_family
from tasks.reparametrized import Reparametrized
from tasks.resnet import ResNet
from tasks.rnn_lm import RecurrentLM
from tasks.toys import toy
from tasks.transformer_lm import TransformerLM
from tasks.vae import VariationalAutoencoder
from tasks.vit import VisionTransformer

TASKS: dict[str, type[TaskConfig] | Callable[..., Task]] = {
    "autoencoder": Autoencoder,
    "batch_fraction": BatchFraction,
    "conv": ConvNet,
    "hyperparameters": Hyperparameters,
    "learned_optimizer": LearnedOptimizerTask,
    "linear": Linear,
    "mlp": mlp_classifier,
    "quadratic": quadratic_family,
    "reparametrized": Reparametrized,
    "resnet": ResNet,
    "rnn_lm": RecurrentLM,
    "toy": toy,
    "transformer_lm": TransformerLM,
    "vae": VariationalAutoencoder,
    "vit": VisionTransformer,
}

__all__ = [
    "SPLITS",
    "TASKS",
    "Autoencoder",
    "BatchFraction",
    "ConvNet",
    "Hyperparameters",
    "LearnedOptimizerTask",
    "Linear",
    "RecurrentLM",
    "Reparametrized",
    "ResNet",
    "Split",
    "Task",
    "TaskConfig",
    "TaskMixture",
    "TransformerLM",
    "VariationalAutoencoder",
    "VisionTransformer",
    "mlp_classifier",
    "quadratic_family",
    "toy",
]
