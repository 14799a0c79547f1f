"""The benchmark command: its cases, and the promise that PES keeps."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from launch.benchmarks import pes_overhead

ROOT = Path(__file__).parent.parent


def command(*flags):
    return subprocess.run(
        [sys.executable, "-m", "launch.benchmark", *flags], cwd=ROOT, capture_output=True, text=True
    )


def test_an_unknown_case_lists_the_valid_ones():
    done = command("--cases=pse")
    assert done.returncode != 0
    assert "the cases are: pes, truncated_es, tbptt, loop, pes_overhead" in done.stderr


@pytest.mark.slow
def test_pes_costs_little_more_than_its_forward_unrolls():
    done = command("--cases=pes_overhead", "--cores=1", "--num_devices=1")
    assert done.returncode == 0, done.stderr
    row = json.loads(done.stdout)
    assert row["within_limits"], row
    for name, limit in pes_overhead.LIMITS.items():
        assert 0.3 < row[f"pes_over_{name}"] <= limit
