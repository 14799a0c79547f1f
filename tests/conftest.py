"""Shared fixtures. Tests run on four virtual CPU devices, in float32 unless they ask for `x64`."""

import atexit
import os
import shutil
import tempfile

if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    # Compiled once for all processes of this run, those that tests start included.
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="jax_cache_")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "4")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("WANDB_MODE", "offline")
# Devices of a starved machine wait for each other longer than XLA's patience of 40 s; and
# LLVM's first optimization level, as in `devices.configure_cpu_devices`, compiles faster.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_cpu_collective_call_terminate_timeout_seconds=300 --xla_backend_optimization_level=1",
)

import collections

import jax
import pytest

# Their assertions explain themselves, as those of files called `test_*` do.
pytest.register_assert_rewrite("tests.contracts")


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item):
    """Notes what a contract test ran on: the thing, by its parameter ``name``."""
    outcome = yield
    if item.path.name == "test_contracts.py":
        callspec = getattr(item, "callspec", None)
        name = str(callspec.params.get("name", "-")) if callspec else "-"
        outcome.get_result().user_properties.append(("contract", (item.originalname, name)))


def pytest_terminal_summary(terminalreporter):
    """Prints how many things x cases the contract tests ran."""
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


@pytest.fixture
def fast_compilation():
    """Compiles in a third of the time, into slower code: for programs that run a few steps."""
    before = jax.config.values["jax_disable_most_optimizations"]
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
