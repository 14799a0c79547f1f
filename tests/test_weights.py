"""Trained optimizers on disk: whole, damaged, foreign, old; and the model card."""

import json
import os
import shlex
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

import learned_opt
from tests.systems import leaves_equal

FORMAT_1 = Path(__file__).parent / "data" / "export_format_1"  # By the code that wrote format 1.
FILES = {"README.md", "config.json", "theta.safetensors"}
TRAINING = {
    "task": {"name": "mlp", "dataset": "digits"},
    "horizon": 20,
    "estimator": "pes",
    "seed": 7,
    "outer_steps": 3,
}


def sgdm(path, rate=1.0, momentum=0.25):
    """A tiny trained optimizer in the folder, and its theta."""
    theta = {"params": {"log_learning_rate": np.log(rate), "logit_momentum": np.float32(0)}}
    arguments = {"learning_rate": rate, "momentum": momentum}
    learned_opt.save(path, "sgdm", arguments, theta, training=TRAINING)
    return jax.tree.map(jnp.float32, theta)


@pytest.mark.parametrize("name", sorted(learned_opt.OPTIMIZERS))
def test_save_and_load(name, tmp_path):
    optimizer = learned_opt.OPTIMIZERS[name]()
    moved = jax.jit(lambda key: jax.tree.map(lambda t: t + 0.1, optimizer.init(key)))
    theta = moved(jax.random.key(1))
    learned_opt.save(tmp_path / "a", name, {}, theta, training=TRAINING)
    loaded, loaded_theta = learned_opt.load(tmp_path / "a")
    assert leaves_equal(theta, loaded_theta)
    grads = params = [jnp.arange(6.0), jnp.ones(2), jnp.ones(()), jnp.zeros((2, 3))]

    def program(optimizer):
        """Of an update, as it is before it is compiled: equal programs give equal updates."""

        def update(theta):
            transform = optimizer.bind(theta, 10)
            return transform.update(grads, transform.init(params), params, value=1.5)[0]

        return jax.jit(update).lower(theta).as_text()

    assert program(optimizer) == program(loaded)
    assert learned_opt.load_config(tmp_path / "a")["training"] == TRAINING
    assert {p.name for p in (tmp_path / "a").iterdir()} == FILES
    card = (tmp_path / "a" / "README.md").read_text()
    assert ("mask_zero_gradients" in card) == optimizer.moves_without_gradient


def test_a_folder_of_something_else_is_not_written_to(tmp_path):
    """That of a job has a `config.json` of its own; an export is replaced."""
    theta = sgdm(tmp_path / "a")
    sgdm(tmp_path / "a")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"`path` must be a folder of its own, got .* job's"):
        learned_opt.save(tmp_path, "sgdm", {}, theta)
    assert {p.name for p in tmp_path.iterdir()} == {"a", "config.json"}


def test_format_1_stays_readable():
    optimizer, theta = learned_opt.load(FORMAT_1)
    assert learned_opt.load_config(FORMAT_1)["training"]["estimator"] == "pes"
    params = {"w": jnp.arange(6, dtype=jnp.float32).reshape(2, 3)}
    transform = optimizer.bind(theta, 10)
    found, _ = transform.update({"w": params["w"] - 2}, transform.init(params), params)
    # By the code that wrote it.
    expected = np.full((2, 3), -2.0000201e-05)
    expected[1, 2] = -8.0599064e-05
    np.testing.assert_allclose(found["w"], expected, rtol=1e-5)


def damages(contents):
    yield from ((f"cut to {n} bytes", contents[:n]) for n in range(0, len(contents), 16))
    for at in range(8 * len(contents)):
        damaged = bytearray(contents)
        damaged[at // 8] ^= 1 << at % 8
        yield f"bit {at}", bytes(damaged)


@pytest.mark.parametrize("file", ["config.json", "theta.safetensors"])
def test_every_flipped_bit_and_every_truncation_is_detected(file, tmp_path):
    sgdm(tmp_path, rate=1e-05)
    path = tmp_path / file
    contents = path.read_bytes()
    assert len(list(damages(contents))) > 1000
    for what, damaged in damages(contents):
        path.write_bytes(damaged)
        with pytest.raises(ValueError) as caught:
            learned_opt.load(tmp_path)
        message = str(caught.value)
        assert message.startswith(f"`path` {str(tmp_path)!r}") and "\n" not in message, what
        # A flipped bit can turn the format into that of a newer version.
        assert file in message or "newer version" in message, what
    path.unlink()
    with pytest.raises(ValueError, match=f"not a trained optimizer: {file} missing"):
        learned_opt.load(tmp_path)
    path.write_bytes(contents.replace(b"\n", b"\r\n") if file == "config.json" else contents)
    learned_opt.load(tmp_path)


def rewritten(path, **changes):
    """The export of format 1 (which has no digests) with other entries in its config."""
    shutil.copytree(FORMAT_1, path, dirs_exist_ok=True)
    config = json.loads((path / "config.json").read_text()) | changes
    config = {key: value for key, value in config.items() if value is not ...}
    (path / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": 99}, "newer version, got format 99"),
        ({"format": "1"}, "not a trained optimizer"),
        ({"format": True}, "not a trained optimizer"),
        ({"format": 0}, "not a trained optimizer"),
        ({"format": ...}, "not a trained optimizer"),
        ({"format": 2}, r"damaged \(missing or unknown: sha256"),
        ({"name": ...}, r"damaged \(missing or unknown: name"),
        ({"sha256": {}}, r"damaged \(missing or unknown: sha256"),
        ({"nmae": "mlp"}, r"damaged \(missing or unknown: nmae"),
        ({"name": 3}, "`name` is no str"),
        ({"name": "nobodys"}, r"`name` must be one of \['adam', 'adam_controller', "),
        ({"arguments": [1]}, "`arguments` is no dict"),
        ({"training": None}, "`training` is no dict"),
        ({"arguments": {"hidden": [2]}}, "`arguments` of .* must be those of `mlp`.*hidden"),
        ({"arguments": {"hidden_sizes": 2}}, "`hidden_sizes` must be"),
        ({"arguments": {"hidden_sizes": "2"}}, "`hidden_sizes` must be"),
        ({"arguments": {"hidden_sizes": [2.5]}}, "`hidden_sizes` must be"),
        ({"arguments": {"hidden_sizes": [2**63]}}, "make no optimizer"),
        ({"arguments": {"hidden_sizes": [3]}}, "`theta` does not fit"),
        ({"arguments": {"step_mult": "1"}}, "`step_mult` must be"),
        ({"arguments": {"step_mult": np.inf}}, "Infinity is no JSON"),
    ],
)
def test_foreign_and_odd_configs(changes, message, tmp_path):
    rewritten(tmp_path, **changes)
    with pytest.raises(ValueError, match=message) as caught:
        learned_opt.load(tmp_path)
    assert "\n" not in str(caught.value)


def test_numbers_beyond_the_largest_float(tmp_path):
    rewritten(tmp_path)
    text = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(text.replace("0.002", "1e999"))
    with pytest.raises(ValueError, match="`step_mult` must be a finite number"):
        learned_opt.load(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "3", "null", "{}", "[" * 100_000, '{"model": 1}', "\0"])
def test_configs_that_are_none(text, tmp_path):
    rewritten(tmp_path)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"not a trained optimizer|config\.json is damaged"):
        learned_opt.load(tmp_path)


def test_foreign_weights(tmp_path):
    """Behind a config of format 1, which has no digest of them."""
    rewritten(tmp_path)
    good = safetensors.numpy.load((tmp_path / "theta.safetensors").read_bytes())
    kernel = good["params/kernel_0"]
    for arrays, message in (
        ({}, "`theta` does not fit"),
        ({"params": kernel, "params/bias_0": kernel}, "`theta` does not fit"),
        (good | {"params/more": kernel}, "`theta` does not fit"),
        (good | {"params/kernel_0": kernel.T.copy()}, "`theta` does not fit"),
        (good | {"params/kernel_0": kernel.astype(np.int32)}, "must be real floats, got int32"),
        (good | {"params/kernel_0": kernel.astype(np.complex64)}, "real floats, got complex64"),
        (good | {"params/kernel_0": np.where(kernel > 0, np.nan, kernel)}, "must be finite"),
        (good | {"params/kernel_0": kernel.astype(np.float64)}, None),
    ):
        (tmp_path / "theta.safetensors").write_bytes(safetensors.numpy.save(arrays))
        if message is None:
            assert leaves_equal(learned_opt.load(tmp_path)[1], learned_opt.load(FORMAT_1)[1])
            continue
        with pytest.raises(ValueError, match=message):
            learned_opt.load(tmp_path)
    for contents in (b"", b"\0" * 100, b"\xff" * 100, b"text"):
        (tmp_path / "theta.safetensors").write_bytes(contents)
        with pytest.raises(ValueError, match=r"theta\.safetensors is damaged"):
            learned_opt.load(tmp_path)


def test_paths_that_hold_no_optimizer(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    for path in (tmp_path, tmp_path / "missing", tmp_path / "file", tmp_path / ("a" * 300)):
        with pytest.raises(ValueError, match=r"config\.json and theta\.safetensors missing"):
            learned_opt.load(path)
    with pytest.raises(ValueError, match="`path` must be the name of a path"):
        learned_opt.load("")
    monkeypatch.setenv("HOME", str(tmp_path))
    sgdm("~/a")
    assert learned_opt.load_config("~/a")["name"] == "sgdm" and (tmp_path / "a").is_dir()


def test_refused_saves_write_nothing(tmp_path):
    theta = {"params": {"log_learning_rate": np.float32(0), "logit_momentum": np.float32(0)}}

    def other(value):
        return {"params": theta["params"] | {"logit_momentum": value}}

    for changes, message in (
        ({"path": ""}, "`path` must be"),
        ({"name": "nobodys"}, r"`name` must be one of \['adam', 'adam_controller', "),
        ({"name": ["sgdm"]}, "`name` must be one of"),
        ({"arguments": {"decay": 1.0}}, "`arguments` of .*decay"),
        ({"arguments": {"momentum": np.float32(0.5)}}, "`arguments` must be JSON"),
        ({"arguments": {"momentum": np.nan}}, "`arguments` must be JSON"),
        ({"arguments": 3}, "`arguments` must be a dict"),
        ({"training": {"curve": np.zeros(2)}}, "`training` must be JSON"),
        ({"training": [1]}, "`training` must be a dict"),
        ({"theta": [1.0]}, "`theta` must be nested dicts"),
        ({"theta": {}}, "`theta` does not fit"),
        ({"theta": other(np.ones(2))}, "`theta` does not fit"),
        ({"theta": other(np.float32(np.nan))}, "must be finite.*logit_momentum"),
        ({"theta": other(np.float32(-np.inf))}, "must be finite.*logit_momentum"),
        ({"theta": other(np.complex64(1))}, "must be real floats"),
        ({"theta": other(np.int32(1))}, "must be real floats"),
        ({"theta": other(None)}, "must be real floats"),
    ):
        given = {"path": tmp_path / "a", "name": "sgdm", "arguments": {}, "theta": theta} | changes
        with pytest.raises(ValueError, match=message):
            learned_opt.save(**given)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="must be a folder that can be written"):
        learned_opt.save(tmp_path / "file", "sgdm", {}, theta)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_half_precision_is_written_wider(tmp_path):
    theta = {"params": dict.fromkeys(("log_learning_rate", "logit_momentum"), jnp.bfloat16(-0.5))}
    learned_opt.save(tmp_path, "sgdm", {}, theta)
    loaded = learned_opt.load(tmp_path)[1]
    assert leaves_equal(loaded, jax.tree.map(lambda t: t.astype(jnp.float32), theta))


class Stop(BaseException):
    """Like Ctrl-C, not an ``Exception``."""


@pytest.mark.parametrize("killed", [False, True], ids=["raised", "killed"])
@pytest.mark.parametrize("function", ["replace", "fsync"])
@pytest.mark.parametrize("call", [1, 2, 3, 4])
def test_a_save_is_all_or_nothing(function, call, killed, tmp_path, monkeypatch):
    """Stopped at any call; if killed, without the chance to clean up. The next one goes through."""
    for path in (tmp_path / "new", tmp_path / "old"):
        if path.name == "old":
            old = sgdm(path, rate=1.0)
        before = {p.name for p in path.iterdir()} if path.exists() else set()
        calls, real = iter(range(1, 10)), getattr(os, function)

        def stop(*arguments, calls=calls, real=real):
            if next(calls) == call:
                raise Stop
            return real(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(os, function, stop)
            if killed:
                patch.setattr(Path, "unlink", lambda self, missing_ok=False: None)
            try:
                sgdm(path, rate=2.0, momentum=0.5)
            except Stop:
                is_new = function == "replace" and call > 1  # Its first move is what counts.
                assert call < 4
            else:
                is_new = True
                assert call == 4
        new = {"params": {"log_learning_rate": np.log(np.float32(2)), "logit_momentum": 0.0}}
        new = jax.tree.map(jnp.float32, new)
        if is_new or path.name == "old":
            assert leaves_equal(learned_opt.load(path)[1], new if is_new else old)
            momentum = learned_opt.load_config(path)["arguments"]["momentum"]
            assert momentum == (0.5 if is_new else 0.25)
        else:
            with pytest.raises(ValueError, match="not a trained optimizer"):
                learned_opt.load(path)
        if not killed and not is_new:
            assert {p.name for p in path.iterdir()} == before
        # A second one that fails at once takes nothing away; a third one leaves no trace.
        found = learned_opt.load_config(path) if is_new or path.name == "old" else None
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", stop_at_once)
            with pytest.raises(Stop):
                sgdm(path, rate=3.0)
        if found:
            assert learned_opt.load_config(path) == found
            learned_opt.load(path)
        third = sgdm(path, rate=3.0)
        assert leaves_equal(learned_opt.load(path)[1], third)
        assert {p.name for p in path.iterdir()} == FILES


def stop_at_once(*arguments):
    raise Stop


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_files_have_the_mode_of_any_new_file(umask, mode, tmp_path):
    before = os.umask(umask)
    try:
        sgdm(tmp_path / "a")
        (tmp_path / "a" / "theta.safetensors").chmod(0o600)  # As older exports are.
        sgdm(tmp_path / "a")
    finally:
        os.umask(before)
    assert {p.name: p.stat().st_mode & 0o777 for p in (tmp_path / "a").iterdir()} == dict.fromkeys(
        FILES, mode
    )


def test_json_of_numbers_that_are_not_finite(tmp_path):
    theta = learned_opt.learnable_sgdm().init(jax.random.key(0))
    training = {"final_loss": np.inf, "curve": [1.0, (np.nan, 2.0)], "by": {"seed": -np.inf}}
    learned_opt.save(tmp_path, "sgdm", {}, theta, training=training)
    expected = {"final_loss": None, "curve": [1.0, [None, 2.0]], "by": {"seed": None}}
    assert learned_opt.load_config(tmp_path)["training"] == expected
    text = (tmp_path / "config.json").read_text() + (tmp_path / "README.md").read_text()
    assert "Infinity" not in text and "NaN" not in text


def test_card_says_how_to_repeat_the_job(tmp_path):
    """In a block to paste; what it ran with in lines."""
    theta = learned_opt.learnable_sgdm().init(jax.random.key(0))
    words = ["python", "-m", "launch.train", "--cfg.task.hidden_sizes=(8, 8)"]
    origin = {"command": words, "commit": None, "config": {"a": 1}, "versions": {"jax": "9.9"}}
    learned_opt.save(tmp_path, "sgdm", {}, theta, training={"provenance": origin})
    card = (tmp_path / "README.md").read_text()
    section = card.split("## Provenance\n")[1].split("\n## ")[0]
    assert shlex.split(section.split("```")[1]) == words
    assert "- commit: an installed package\n- jax: 9.9\n" in section
    assert "provenance" not in card.split("## Provenance")[0] and '{"a"' not in card


def test_card_holds_the_facts_it_was_given_and_no_others(tmp_path):
    sgdm(tmp_path)
    card = (tmp_path / "README.md").read_text()
    training, limits = card.split("## Training\n")[1].split("## Limits\n")
    assert training.strip().splitlines() == [
        '- task: `mlp`, dataset "digits"',
        "- horizon: 20 inner steps",
        "- estimator: `pes`",
        "- seed: 7",
        "- outer_steps: 3",
    ]
    assert "Meta-trained on `mlp`, in runs of 20 steps." in limits and "num_steps=20)" in card
    theta = learned_opt.learnable_sgdm().init(jax.random.key(0))
    learned_opt.save(tmp_path, "sgdm", {}, theta, training={"task": {"dim": 3}, "loss": 0.5})
    card = (tmp_path / "README.md").read_text()
    assert card.split("## Training\n")[1].split("## Limits\n")[0].strip().splitlines() == [
        "- task: `not recorded`, dim 3",
        "- horizon: not recorded",
        "- estimator: not recorded",
        "- seed: not recorded",
        "- loss: 0.5",
    ]
    assert "digits" not in card and "a length that was not recorded" in card
