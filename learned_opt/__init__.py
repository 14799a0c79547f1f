"""Learned optimizers: Flax modules that act as optax transformations."""

from learned_opt.adam import learnable_adam, learnable_nadamw
from learned_opt.adam_controller import adam_controller
from learned_opt.base import LearnedOptimizer, OptimizerConfig
from learned_opt.celo import celo_optimizer
from learned_opt.celo2 import celo2_base_optimizer, celo2_optimizer
from learned_opt.celo_adam import celo_adam_optimizer
from learned_opt.formats import load_published
from learned_opt.l3rs import l3rs_optimizer
from learned_opt.lion import learnable_lion
from learned_opt.masking import mask_zero_gradients
from learned_opt.mlp import mlp_optimizer
from learned_opt.muon import learnable_muon
from learned_opt.nn_adam import nn_adam
from learned_opt.pretrained import available, optimizer
from learned_opt.reversible import reversible_mlp_optimizer
from learned_opt.rnn_mlp import rnn_mlp_optimizer
from learned_opt.small_fc import small_fc_optimizer
from learned_opt.star import star_optimizer
from learned_opt.tuned import learnable_schedule, learnable_sgdm, per_tensor_sgdm
from learned_opt.velo import velo_optimizer, velo_s_optimizer
from learned_opt.version import __version__
from learned_opt.weights import OPTIMIZERS, load, load_config, save
from learned_opt.width import WideNetworkWarning, scale_by_width

__all__ = [
    "OPTIMIZERS",
    "LearnedOptimizer",
    "OptimizerConfig",
    "WideNetworkWarning",
    "__version__",
    "adam_controller",
    "available",
    "celo2_base_optimizer",
    "celo2_optimizer",
    "celo_adam_optimizer",
    "celo_optimizer",
    "l3rs_optimizer",
    "learnable_adam",
    "learnable_lion",
    "learnable_muon",
    "learnable_nadamw",
    "learnable_schedule",
    "learnable_sgdm",
    "load",
    "load_config",
    "load_published",
    "mask_zero_gradients",
    "mlp_optimizer",
    "nn_adam",
    "optimizer",
    "per_tensor_sgdm",
    "reversible_mlp_optimizer",
    "rnn_mlp_optimizer",
    "save",
    "scale_by_width",
    "small_fc_optimizer",
    "star_optimizer",
    "velo_optimizer",
    "velo_s_optimizer",
]
