"""The benchmark command: its cases, and the promise that PES keeps."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from launch.benchmarks import bfloat16, optimizers, pes_overhead
from launch.config import InnerConfig, estimator
from launch.config import task as choose_task

ROOT = Path(__file__).parent.parent


def command(*flags):
    return subprocess.run(
        [sys.executable, "-m", "launch.benchmark", *flags], cwd=ROOT, capture_output=True, text=True
    )


def test_an_unknown_case_lists_the_valid_ones():
    done = command("--cases=pse")
    assert done.returncode != 0
    assert (
        "--cases must be of pes, truncated_es, tbptt, loop, pes_overhead, reversible, optimizers, "
        "bfloat16, scale, device, control, got 'pse'. Did you mean 'pes'?" in done.stderr
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
import os, subprocess, sys
from launch import benchmark
class Child(subprocess.Popen):
    def __init__(self, command, *args, cwd=None, **kwargs):
        if "--child" in command:  # `platform` asks for the processor in this way too.
            os.chdir("/")
            assert os.path.samefile(os.path.join(cwd, "launch/benchmark.py"), benchmark.__file__)
            command = [sys.executable, "-c", {f"print({json.dumps(line)!r})"!r}]
        super().__init__(command, *args, cwd=cwd, **kwargs)
subprocess.Popen = Child
benchmark.cli()
"""
    flags = ["--cases=reversible", "--cores=1"]
    done = subprocess.run(
        [sys.executable, "-c", code, *flags], cwd=ROOT, capture_output=True, text=True
    )
    assert json.loads(done.stdout).items() >= line.items()  # every line is printed all the same
    assert (done.returncode == 0) == kept, done.stderr
    assert ("limits not kept" in done.stderr) != kept


def test_lines_are_kept_and_made_once(monkeypatch, tmp_path):
    """In a file, of optimizers and runs that are not there yet; broken off, all but the last."""
    made = []

    def of_run(where, names):
        for name in names:
            if (where, name) == ("million", "star"):
                raise KeyboardInterrupt
            made.append((where, name))
            yield {"optimizer": name, "run": where, "step_over_adam": 2.0}

    monkeypatch.setattr(optimizers, "of_run", of_run)
    file, names, runs = tmp_path / "lines.json", ["mlp", "star"], ["digits", "million"]
    with pytest.raises(KeyboardInterrupt):
        list(optimizers.lines(0, names, runs, file))
    assert made == [("digits", "mlp"), ("digits", "star"), ("million", "mlp")]
    assert list(optimizers.lines(0, names, ["digits"], file)) == []
    (row,) = optimizers.lines(0, ["adam", "mlp"], ["digits"], file)
    found = optimizers.read(file)
    assert row["optimizer"] == "adam" and made[3:] == [("digits", "adam")]
    assert {name: list(lines) for name, lines in found.items()} == {
        "adam": ["digits"],
        "mlp": ["digits", "million"],
        "star": ["digits"],
    }
    assert found["mlp"]["digits"].items() >= {"step_over_adam": 2.0, "run": "digits"}.items()
    assert found["mlp"]["digits"]["machine"] and found["mlp"]["digits"]["date"]


def test_optimizers_for_a_number_of_tensors():
    for name in ("per_tensor_sgdm", "l3rs"):
        transform = optimizers.rule(name, 7)(jax.random.key(0))
        jax.eval_shape(transform.init, [jax.ShapeDtypeStruct((2,), "float32")] * 7)


@pytest.mark.parametrize("flag", ["optimizers", "runs"])
def test_unknown_names_of_the_case(flag):
    done = command("--child", "--cases=optimizers", f"--{flag}=digitz")
    assert done.returncode != 0
    assert f"--{flag} must be some of " in done.stderr and ", got digitz." in done.stderr


def test_error_of_bfloat16():
    """Of the meta-gradient, on a small network: some, and little."""
    config = dataclasses.replace(
        bfloat16.CONFIG,
        task=choose_task("quadratic"),
        inner=InnerConfig(horizon=10),
        estimator=estimator("pes", num_particles=8, truncation=5),
    )
    row = bfloat16.measure(0, config, (8, 8), seeds=2, rounds=2)
    assert 1e-4 < row["mean_error"] <= row["largest_error"] < 0.1
    assert 0.99 < row["smallest_cosine"] < 1


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
