"""The benchmark command: its cases, and the promise that PES keeps."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from launch.benchmarks import optimizers, pes_overhead

ROOT = Path(__file__).parent.parent


def command(*flags):
    return subprocess.run(
        [sys.executable, "-m", "launch.benchmark", *flags], cwd=ROOT, capture_output=True, text=True
    )


def test_an_unknown_case_lists_the_valid_ones():
    done = command("--cases=pse")
    assert done.returncode != 0
    assert (
        "the cases are: pes, truncated_es, tbptt, loop, pes_overhead, reversible, optimizers"
        in done.stderr
    )


@pytest.mark.parametrize(
    ("line", "kept"),
    [
        pytest.param({"gate": "memory", "holds": True}, True, marks=pytest.mark.slow),
        ({"gate": "memory", "holds": False}, False),
        pytest.param({"within_limits": False}, False, marks=pytest.mark.slow),
        ({"ms_per_outer_step": 1.0}, True),
    ],
)
def test_a_limit_that_is_not_kept_fails_the_command(line, kept):
    """With a case whose process prints just this line; it starts where this package is."""
    code = f"""
import os, subprocess
from launch import benchmark
child = subprocess.CompletedProcess([], 0, stdout={json.dumps(line)!r}, stderr="")
def run(command, *args, cwd=".", **kwargs):
    if "--child" in command:  # `platform` asks for the processor in this way too.
        os.chdir("/")
        assert os.path.samefile(os.path.join(cwd, "launch/benchmark.py"), benchmark.__file__)
    return child
subprocess.run = run
benchmark.app.run(benchmark.main)
"""
    flags = ["--cases=reversible", "--cores=1"]
    done = subprocess.run(
        [sys.executable, "-c", code, *flags], cwd=ROOT, capture_output=True, text=True
    )
    assert json.loads(done.stdout).items() >= line.items()  # every line is printed all the same
    assert (done.returncode == 0) == kept, done.stderr
    assert ("limits not kept" in done.stderr) != kept


@pytest.mark.slow
def test_optimizers_are_timed_beside_adam(monkeypatch):
    monkeypatch.setattr(optimizers, "ROUNDS", 3)
    monkeypatch.setitem(optimizers.LIMITS, ("mlp", "digits"), 1.0)
    adam, mlp = optimizers.lines(0, ["adam", "mlp"], ["digits"])
    assert adam["state_bytes_per_parameter"] == pytest.approx(8, abs=0.1)  # And a count.
    assert mlp["state_bytes_per_parameter"] == pytest.approx(24, abs=0.1)
    assert 0.5 < adam["step_over_adam"] < 2 < mlp["update_over_adam"]
    assert adam["within_limits"] and not mlp["within_limits"]


@pytest.mark.slow
def test_pes_costs_little_more_than_its_forward_unrolls():
    done = command("--cases=pes_overhead", "--cores=1", "--num_devices=1")
    assert done.returncode == 0, done.stderr
    row = json.loads(done.stdout)
    assert row["within_limits"], row
    for name, limit in pes_overhead.LIMITS.items():
        assert 0.3 < row[f"pes_over_{name}"] <= limit
