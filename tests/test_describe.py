"""What optimizers cost and read, as found by tracing; and the command that prints it."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
import pytest

import learned_opt
from launch import describe
from learned_opt.inspection import LARGE, SMALL, Reading, inspect, used_inputs

ROOT = Path(__file__).parent.parent
NOT, OPTIONAL, NEEDED = Reading(False, False), Reading(True, False), Reading(True, True)


def test_used_inputs():
    """Through calls, to the outputs asked for; a loop is taken as a whole."""

    @jax.jit
    def swapped(a, b):
        return b, a

    def program(a, b, c, d, e):
        first, second = swapped(a, b)
        looped = jax.lax.fori_loop(0, 3, lambda i, x: x + 0 * c, first)
        return jnp.clip(second, 0, 1), looped, jnp.sin(d), jnp.ones(())

    traced = jax.make_jaxpr(program)(*5 * [1.0]).jaxpr
    for output, used in enumerate(("a", "bc", "d", "")):
        found = used_inputs(traced, [i == output for i in range(4)])
        assert "".join(name for name, live in zip("abcde", found, strict=True) if live) == used


def reading(name):
    """What the optimizer of that name reads: parameters, loss and ``num_steps``."""
    found = inspect(learned_opt.OPTIMIZERS[name]()).reads
    return found["params"], found["value"], found["num_steps"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("adam", (NOT, NOT, Reading(False, True))),
        ("schedule", (NOT, NOT, NEEDED)),
        ("mlp", (NEEDED, NOT, Reading(False, True))),
        ("lion", (NEEDED, NOT, NEEDED)),
        ("l3rs", (NEEDED, NEEDED, NEEDED)),
    ],
)
def test_readings(name, expected):
    assert reading(name) == expected


def test_readings_of_later_steps_and_of_what_may_be_given():
    """A loss that is kept, and matters two steps later; parameters that are read if there."""

    def bind(theta, num_steps):
        def init(params):
            return jnp.zeros(()), jnp.zeros(())

        def update(updates, state, params=None, *, value=0.0, **extra):
            weights = updates if params is None else params
            steps = jax.tree.map(lambda g, p: theta * state[1] * (g + p), updates, weights)
            return steps, (jnp.asarray(value, jnp.float32), state[0])

        return optax.GradientTransformationExtraArgs(init, update)

    optimizer = learned_opt.LearnedOptimizer(lambda key: jnp.ones(()), bind)
    found = inspect(optimizer)
    assert found.reads["params"] == found.reads["value"] == OPTIONAL
    assert found.num_meta_parameters == 1
    assert 0 < found.state_bytes[LARGE] < found.state_bytes[SMALL] < 0.01


def test_sizes():
    found = inspect(learned_opt.per_tensor_sgdm(num_tensors=7))
    assert (found.num_meta_parameters, found.num_tensors) == (14, 7)
    assert found.state_bytes[LARGE] == 4 and round(found.adam_bytes[LARGE], 3) == 8
    assert inspect(learned_opt.mlp_optimizer()).num_meta_parameters == 1762
    with pytest.raises(ValueError, match=r"no network of 1 to 64 tensors.*num_tensors=99"):
        inspect(learned_opt.per_tensor_sgdm(num_tensors=99))


def test_table_and_page(tmp_path, monkeypatch):
    """docs/optimizers.md is what the command would write."""
    rows = list(describe.rows())
    assert [name for name, *_ in rows[1:]] == list(learned_opt.OPTIMIZERS)
    assert ("nn_adam", "21,896", "8.00", "yes", "no", "no", "rests") in rows
    assert "of a network of 1,000,000 parameters in 4 tensors (Adam 8.00;" in describe.table()
    monkeypatch.setattr(describe, "rows", lambda: iter(rows))
    assert "\nnn_adam          21,896     8.00   yes" in describe.table()
    assert describe.page() + "\n" == (ROOT / "docs/optimizers.md").read_text()
    source = describe.source(learned_opt.small_fc_optimizer)
    assert source == "Metz et al. 2022 (arXiv 2203.11860)"

    optimizer = learned_opt.learnable_schedule()
    theta = optimizer.init(jax.random.key(0))
    training = {"horizon": 1500, "task": {"name": "quadratic"}}
    learned_opt.save(tmp_path / "trained", "schedule", {}, theta, training=training)
    page = describe.describe(str(tmp_path / "trained"))
    assert "meta-parameters       2\n" in page
    assert "reads num_steps       yes\n" in page
    assert "(Adam 8.00) for a network of 1,000,000 parameters in 4 tensors\n" in page
    assert page.endswith("trained for           1,500 steps of quadratic")
    assert describe.describe("schedule").endswith("trained for           not trained")


OUTSIDE = """
import learned_opt

def odd():
    return learned_opt.per_tensor_sgdm(num_tensors=3)

def wrong():
    return 1
"""


def test_command(tmp_path):
    """Things from outside and from folders, and wrong names in one sentence."""
    (tmp_path / "outside.py").write_text(OUTSIDE)

    def run(*names):
        return subprocess.run(
            [sys.executable, "-m", "launch.describe", *names],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
        )

    done = run("outside:odd", "adam")
    assert done.returncode == 0, done.stderr
    assert "networks of 3 tensors" in done.stdout and "\n\nadam\n" in done.stdout
    for name, message in (
        ("nadam", "NAME must be one of adam, .*got 'nadam'. Did you mean 'nadamw'?"),
        (
            "outside:wrong",
            "The function outside:wrong, given as the optimizer, must return LearnedOptimizer, got "
            "int.",
        ),
        (".", "is not a trained optimizer: config.json and theta.safetensors missing"),
    ):
        done = run(name)
        assert done.returncode == 2 and done.stdout == ""
        start, _, end = message.partition(".*")
        assert done.stderr.startswith("error: ") and start in done.stderr and end in done.stderr
        assert done.stderr.count("\n") == 1
