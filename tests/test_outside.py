"""A task, an optimizer and an estimator from outside the repository, from train to evaluate."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from learned_opt import weights
from tests import commands

ROOT = Path(__file__).parent.parent
SOURCE = '''
"""Things of somebody else's."""
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import optax

from learned_opt import LearnedOptimizer, OptimizerConfig
from meta_train.estimators import full_es
from tasks import Task


def bowl(dim=4, depth=1.0):
    """A bowl.

    Args:
      dim: of the bowl.
      depth: of the bowl.
    """
    return Task(
        sample=lambda key: (),
        init=lambda instance, key: jax.random.normal(key, (dim,)),
        batch=lambda instance, key, split: jax.random.normal(key, (dim,)),
        loss=lambda params, instance, batch, key: depth * jnp.mean((params - 0.1 * batch) ** 2),
    )


@dataclass(frozen=True)
class SignDescent(OptimizerConfig):
    """Steps of one size.

    Attributes:
      rate: the size at the start.
    """

    rate: float = 0.01

    def make(self):
        def bind(theta, num_steps):
            chain = optax.chain(optax.scale_by_sign(), optax.scale(-jnp.exp(theta["log_rate"])))
            return optax.with_extra_args_support(chain)

        return LearnedOptimizer(lambda key: {"log_rate": jnp.log(jnp.float32(self.rate))}, bind)


def wide_es(system, horizons, num_particles=4, sigma=0.1):
    """Full ES.

    Args:
      num_particles: antithetic pairs.
      sigma: of the perturbations.
    """
    return full_es(system, num_pairs=num_particles, horizons=horizons, sigma=sigma)
'''
WORDS = (
    "--cfg.task.dim=3",
    "--cfg.task=mything:bowl",
    "--cfg.optimizer=mything:SignDescent",
    "--cfg.estimator=mything:wide_es",
    "--cfg.estimator.sigma=0.2",
    "--cfg.inner.horizon=5",
    "--cfg.checkpoint_every=50",
    "--cfg.meta.learning_rate=0.003",
    "--cfg.eval_every=0",
    "--cfg.log_every=1",
    "--cfg.num_devices=2",
    "--cfg.wandb_mode=disabled",
)
NUM_STEPS = 800


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the user works: their module, and jobs."""
    path = tmp_path_factory.mktemp("outside")
    (path / "mything.py").write_text(textwrap.dedent(SOURCE))
    return path


def environment():
    # The job makes its own devices, whatever this test process has.
    env = {k: v for k, v in os.environ.items() if k not in ("JAX_NUM_CPU_DEVICES", "XLA_FLAGS")}
    return env | {"PYTHONPATH": str(ROOT)}


def start(folder, *words):
    return subprocess.Popen(
        [sys.executable, "-m", *words],
        cwd=folder,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(folder, *words):
    process = start(folder, *words)
    out, error = process.communicate(timeout=300)
    return process.returncode, out, error


def train(workdir, *words, num_steps=NUM_STEPS):
    return ("launch.train", f"--workdir={workdir}", f"--cfg.num_steps={num_steps}", *WORDS, *words)


@pytest.fixture(scope="module")
def whole(folder):
    """A job never stopped."""
    code, _, error = run(folder, *train("whole"))
    assert code == 0, error
    return folder / "whole"


def test_a_killed_job_continues_to_the_same_theta(folder, whole):
    process = start(folder, *train("parted"))
    rows = folder / "parted/metrics.jsonl"
    deadline = time.monotonic() + 200
    while process.poll() is None and (not rows.exists() or rows.read_text().count("\n") < 100):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert process.poll() is None, process.communicate()
    process.send_signal(signal.SIGKILL)
    process.communicate()
    code, _, error = run(folder, *train("parted"))
    assert code == 0 and "Continuing" in error, error
    found, expected = (
        load_file(f"{job}/optimizer/theta.safetensors") for job in (folder / "parted", whole)
    )
    np.testing.assert_array_equal(found["log_rate"], expected["log_rate"])
    assert abs(expected["log_rate"] - np.log(0.01)) > 0.5  # It learned a rate.


def test_the_export_says_how_to_repeat_the_job(whole):
    card = json.loads((whole / "optimizer/config.json").read_text())
    assert card["name"] == "mything:SignDescent" and card["arguments"] == {"rate": 0.01}
    assert card["training"]["task"] == {"name": "mything:bowl", "dim": 3, "depth": 1.0}
    origin = card["training"]["provenance"]
    assert origin["config"]["estimator"] == {
        "name": "mything:wide_es",
        "num_particles": 4,
        "sigma": 0.2,
    }
    assert origin["command"][:3] == ["python", "-m", "launch.train"]
    assert "--cfg.task=mything:bowl" in origin["command"] and origin["config"]["seed"] == 0
    assert {"jax", "optax", "learned-opt"} <= origin["versions"].keys()


def test_it_loads_only_what_was_imported(folder, whole):
    code = """
import sys, learned_opt
try:
    learned_opt.load("whole/optimizer")
except ValueError as error:
    assert "import mything first" in str(error), error
    assert "mything" not in sys.modules
    import mything
    print(learned_opt.load("whole/optimizer")[1]["log_rate"].shape)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 0 and done.stdout == "()\n", done.stderr


@pytest.fixture(scope="module")
def said(folder, whole):
    """What further commands on the export say."""
    words = ("launch.evaluate", "--optimizer=whole/optimizer", "--horizons=5", "--seeds=3")
    ours, warm = "--import=mything", "--cfg.init_from=whole/optimizer"
    given = {
        "refused": (*words, "--workdir=refused"),
        "evaluated": (*words, "--workdir=evaluated", ours),
        "other": (*words, "--workdir=other", ours, "--cfg.task=quadratic"),
        "warm": train("warm", warm, num_steps=1),
        "cold": train("cold", warm, "--cfg.optimizer=sgdm", num_steps=1),
    }
    logs = folder / "said"
    logs.mkdir()
    found = commands.one_by_one(folder, given.values(), environment(), logs)
    return dict(zip(given, found, strict=True))


def test_it_is_evaluated_on_the_task_of_training_and_another(folder, said):
    code, _, error = said["refused"]
    assert code == 2 and "--import=mything" in error and len(error.splitlines()) == 1
    code, out, error = said["evaluated"]
    assert code == 0 and "Task: mything:bowl (dim 3, depth 1.0)" in out, error
    document = json.loads((folder / "evaluated/evaluation.json").read_text())
    assert document["task"] == {"name": "mything:bowl", "dim": 3, "depth": 1.0}
    assert len(document["baselines"]["learning_rates_swept"]) >= 12
    (entries,) = document["results"].values()
    assert [entry["name"] for entry in entries] == ["whole/optimizer", "adam", "sgdm"]
    assert all(np.shape(entry["losses"]) == (3, 5) for entry in entries)
    assert (folder / "evaluated/evaluation.png").read_bytes()[:4] == b"\x89PNG"
    code, out, error = said["other"]
    assert code == 0 and "Task: quadratic (dim 10" in out, error


def test_a_job_starts_from_an_export(folder, said):
    """Theta begins as the export's, for the same optimizer; another one is refused."""
    code, _, error = said["warm"]
    assert code == 0, error
    first, exported = (
        load_file(folder / path / "theta.safetensors")["log_rate"]
        for path in ("warm/optimizer_initial", "whole/optimizer")
    )
    assert first == exported
    card = json.loads((folder / "warm/optimizer/config.json").read_text())
    assert card["training"]["init_from"] == "whole/optimizer"
    code, _, error = said["cold"]
    assert code == 2 and "--cfg.optimizer is 'mything:SignDescent' there, 'sgdm' here" in error
    assert not (folder / "cold").exists()


def test_an_error_of_ones_own_says_where_it_was_raised(tmp_path, capsys):
    """What this library or a package refuses says what to do instead."""
    from launch import command_line

    module = tmp_path / "mine_raises.py"
    module.write_text("def refuse():\n    raise ValueError('my own fault')\n")
    names: dict = {}
    exec(compile(module.read_text(), str(module), "exec"), names)
    refused = (
        (names["refuse"], f"my own fault (raised in {module}, line 2)"),
        (lambda: np.zeros(2).reshape(3), f"(raised in {__file__}, line "),
        (lambda: weights.load_config(tmp_path), "`path`"),
    )
    for refuse, said in refused:
        with pytest.raises(SystemExit), command_line.messages():
            refuse()
        message = capsys.readouterr().err
        assert said in message and ("(raised in" in message) == ("raised in" in said)
