"""Shared fixtures. Tests run on four virtual CPU devices, in float32 unless they ask for `x64`."""

import os

os.environ.setdefault("JAX_NUM_CPU_DEVICES", "4")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("WANDB_MODE", "offline")
# Devices of a starved machine wait for each other longer than XLA's patience of 40 s; and
# LLVM's first optimization level, as in `devices.configure_cpu_devices`, compiles faster.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_cpu_collective_call_terminate_timeout_seconds=300 --xla_backend_optimization_level=1",
)

import jax
import pytest


@pytest.fixture
def x64():
    """Runs the test in double precision."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def fast_compilation():
    """Compiles in a third of the time, into slower code: for programs that run a few steps."""
    before = jax.config.values["jax_disable_most_optimizations"]
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
