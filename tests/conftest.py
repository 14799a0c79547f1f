"""Shared fixtures. Tests run on four virtual CPU devices, in float32 unless they ask for `x64`."""

import atexit
import importlib.metadata
import os
import shutil
import tempfile

if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    # Compiled once for all processes of this run, those that tests start included.
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="jax_cache_")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
# A job forgets what it compiled, and the next one of the same kind finds it there.
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "4")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("WANDB_MODE", "offline")

import collections
import gc

import jax
import pytest

from tasks.dynamics import mujoco_physics

# What the extra `control` is needed for.
collect_ignore = ["test_control.py"] if mujoco_physics.missing() else []


def pytest_configure(config):
    """Tests run few steps of many programs, so their time is that of compiling.

    LLVM's first optimization level is a job's own (see `devices.CPU_FLAGS`). Without LLVM's
    optimizations the time is half of that, and by XLA's older emitters, where it still has them, a
    third of the rest. These round one formula differently in different programs, so they serve
    where tests marked `exact` are left out. Commands that tests start compile as jobs do, and in
    ``make test-as-jobs`` so do all. JAX reads the variable at its first computation.
    """
    quick = "not exact" in config.option.markexpr
    # Devices of a starved machine wait for each other longer than XLA's patience of 40 s.
    flags = ["--xla_cpu_collective_call_terminate_timeout_seconds=300"]
    # A program is not cut into parts for as many threads: a tenth of the time, and tests run beside
    # each other anyway.
    flags += ["--xla_cpu_parallel_codegen_split_count=1"]
    flags += [f"--xla_backend_optimization_level={0 if quick else 1}"]
    if quick and importlib.metadata.version("jax").startswith("0.10."):
        flags += ["--xla_cpu_use_fusion_emitters=false"]
    os.environ.setdefault("XLA_FLAGS", " ".join(flags))


# Their assertions explain themselves, as those of files called `test_*` do.
pytest.register_assert_rewrite("tests.contracts")


# Names whose code another name runs too, at another size or under another flag: tests of every
# name have these among the slow ones.
TWINS = {
    "es_single": "nres",
    "nres": "gpes",
    "velo": "velo_s",
    "celo2_base": "celo2",
    "learned_optimizer": "hyperparameters",
    "batch_fraction": "reparametrized",
    "conv": "resnet",
}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    for item in items:
        if hasattr(item, "callspec") and item.callspec.params.get("name") in TWINS:
            item.add_marker(pytest.mark.slow)


def pytest_collection_finish():
    """What was imported stays: collecting garbage, an eighth of tracing's time, passes over it."""
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item):
    """Notes what a contract test ran on: the thing, by its parameter ``name``."""
    outcome = yield
    if item.path.name == "test_contracts.py":
        callspec = getattr(item, "callspec", None)
        name = str(callspec.params.get("name", "-")) if callspec else "-"
        outcome.get_result().user_properties.append(("contract", (item.originalname, name)))


def pytest_terminal_summary(terminalreporter):
    """Prints what was not collected, and how many things x cases the contract tests ran."""
    if collect_ignore:
        terminalreporter.line(
            "not collected, as the extra `control` is not installed: tests/test_control.py, the "
            "studies of control, their example (make test-control)"
        )
    things: dict = collections.defaultdict(collections.Counter)
    for outcome in ("passed", "failed"):
        for report in terminalreporter.stats.get(outcome, []):
            contract = dict(report.user_properties).get("contract")
            if contract and report.when == "call":
                things[contract[0]][contract[1]] += 1
    if things:
        terminalreporter.section("contracts: things x cases")
        for test, counts in sorted(things.items()):
            terminalreporter.line(f"{len(counts):4} things, {counts.total():5} cases  {test}")
        total = sum(counts.total() for counts in things.values())
        terminalreporter.line(f"{total} cases in {len(things)} contracts")


@pytest.fixture
def x64():
    """Runs the test in double precision."""
    with jax.enable_x64(True):
        yield
