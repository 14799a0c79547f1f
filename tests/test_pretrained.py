"""The trained optimizers in the package."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import learned_opt
from launch import choices
from launch import config as cfg
from launch.choices import to_dict
from learned_opt import pretrained
from tests.systems import leaves_equal

FOLDER = Path(pretrained.__file__).parent
NAMES = sorted(learned_opt.available())


def test_names_are_the_folders():
    assert (
        sorted(path.name for path in FOLDER.iterdir() if (path / "config.json").exists()) == NAMES
    )


@pytest.mark.parametrize("name", NAMES)
def test_the_recorded_command_is_of_the_recorded_configuration(name):
    """What repeats the job: the preset as it is now, and the words after it."""
    provenance = learned_opt.load_config(name)["training"]["provenance"]
    preset, *words = provenance["command"][3:]
    words = [word for word in words if word.startswith("--cfg.")]
    node, rest = choices.take_words(words, "cfg")
    assert not rest
    config = choices.apply_words(cfg.load_preset(preset.removeprefix("--preset=")), node, "cfg")
    assert to_dict(cfg.read_config(provenance["config"])) == to_dict(config)


@pytest.mark.parametrize("name", NAMES)
def test_in_three_lines(name, tmp_path, monkeypatch):
    """Small, with provenance and a card; trains a least-squares fit; a folder comes first."""
    assert sum(path.stat().st_size for path in (FOLDER / name).iterdir()) < 200_000
    provenance = learned_opt.load_config(name)["training"]["provenance"]
    assert provenance["command"][:3] == ["python", "-m", "launch.train"] and provenance["commit"]
    assert "## Limits" in (FOLDER / name / "README.md").read_text()

    inputs = jax.random.normal(jax.random.key(0), (64, 8))
    # Of steps of a fixed size only smaller weights are within reach.
    targets = inputs @ (jnp.arange(8.0) / (8 if name == "per_parameter" else 1))

    def loss(params):
        return jnp.mean((inputs @ params["w"] + params["b"] - targets) ** 2)

    tx = learned_opt.optimizer(name, num_steps=300)

    def step(carry, _):
        params, state = carry
        value, grads = jax.value_and_grad(loss)(params)
        updates, state = tx.update(grads, state, params, value=value)
        return (optax.apply_updates(params, updates), state), value

    params = {"w": jnp.zeros(8), "b": jnp.zeros(())}
    losses = jax.lax.scan(step, (params, tx.init(params)), None, 300)[1]
    assert np.all(np.isfinite(losses)) and losses[-1] < 0.05 * losses[0]

    monkeypatch.chdir(tmp_path)
    sgdm = learned_opt.learnable_sgdm()
    theta = sgdm.init(jax.random.key(0))
    learned_opt.save(tmp_path / name, "sgdm", {}, theta)
    assert leaves_equal(learned_opt.load(name)[1], theta)


@pytest.mark.parametrize("name", NAMES)
def test_networks_wider_than_any_of_training_are_warned_of(name, recwarn):
    """By the widest tensor; narrow ones, and what is in `scale_by_width`, are not."""
    tx = learned_opt.optimizer(name, num_steps=10)
    narrow = {"in": jnp.ones((784, 64)), "kernel": jnp.ones((3, 3, 64, 64)), "b": jnp.ones(900)}
    wide = narrow | {"hidden": jnp.ones((65, 300)), "out": jnp.ones((700, 65))}
    tx.init(narrow)
    base = wide | {"hidden": jnp.ones((16, 16)), "out": jnp.ones((16, 65))}
    learned_opt.scale_by_width(tx, base).init(wide)
    assert not recwarn.list
    with pytest.warns(learned_opt.WideNetworkWarning, match=r"shape \((65, 300|700, 65)\), and"):
        state = jax.jit(tx.init)(wide)
    with pytest.warns(learned_opt.WideNetworkWarning, match=f"{name} was trained"):
        again = learned_opt.optimizer(FOLDER / name, num_steps=10).init(wide)
    assert jax.tree.structure(state) == jax.tree.structure(again)


def test_the_card_says_what_the_page_says():
    """Its tables and limits, word by word: the package has no other page."""
    page = (Path(__file__).parent.parent / "docs/controller.md").read_text()
    card = (FOLDER / "controller" / "README.md").read_text()
    said, _, training = page.partition("## How it was trained")
    assert training and said[said.index("## Limits\n\n") :].strip() in card
    rows = [line for line in said.splitlines() if line.startswith("|")]
    assert len(rows) > 5 and all(row in card for row in rows)


def test_what_is_not_there_is_refused_with_the_names():
    with pytest.raises(
        ValueError, match=r"`name` must be one of controller, per_parameter, or .*got 'nothing'"
    ):
        learned_opt.optimizer("nothing", 10)
