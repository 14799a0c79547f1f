"""``launch.replay`` on the folders of jobs that are whole, damaged, or of older versions."""

import collections
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from launch import config as cfg
from launch.replay import replay
from meta_train.estimators.hybrid import messages
from meta_train.estimators.hybrid.replay import ReplayLog, read_log
from tests.jobs import DAMAGES, contents, run

PARTS = {
    "estimator": cfg.estimator(
        "hybrid_es",
        base=cfg.estimator("tbptt", num_particles=4, truncation=4),
        num_workers=2,
        refresh_every=3,
        replay_log=True,
    ),
    "eval_every": 0,
}


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """12 steps of Hybrid-ES, checkpoints at 4, 8 and 12, and 3 more steps in the log alone."""
    before = jax.config.values["jax_disable_most_optimizations"]
    jax.config.update("jax_disable_most_optimizations", True)
    folder = tmp_path_factory.mktemp("replay") / "job"
    run(folder, **PARTS)
    run(folder, **PARTS, num_steps=15, checkpoint_every=100)
    shutil.rmtree(folder / "checkpoints" / "15")
    yield folder
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture
def copy(job, tmp_path):
    return shutil.copytree(job, tmp_path / "job")


def assert_rebuilt(folder, job):
    a, b = (load_file(folder / "optimizer_rebuilt" / "theta.safetensors"),
            load_file(job / "optimizer" / "theta.safetensors"))  # fmt: skip
    assert all(np.array_equal(a[name], b[name]) for name in a)


def test_rebuilds_from_any_checkpoint_and_needs_no_config_file(copy, job):
    (copy / "config.json").unlink()
    for step in (None, 8):
        assert replay(copy, step) == 15
        assert_rebuilt(copy, job)


def test_a_flipped_bit_in_the_log_is_found(tmp_path):
    """At every byte: an error, or (a length that makes the last record seem torn) less; never
    other messages."""
    path = tmp_path / "log"
    costs = messages.Costs(np.arange(2, dtype=np.uint32), np.ones(2, np.float32))
    like = messages.Message(np.array(True), np.zeros(3, np.float32), np.array(True), costs)
    log = ReplayLog(path, 0)
    for step in (1, 2):
        log.append(step, like._replace(gradient=np.full(3, step, np.float32)))
    log.close()
    whole, expected = path.read_bytes(), list(read_log(path, like))
    assert len(expected) == 2
    outcomes = collections.Counter()
    for position in range(0, len(whole), 5):
        data = bytearray(whole)
        data[position] ^= 1 << (position % 8)
        path.write_bytes(data)
        try:
            found = list(read_log(path, like))
        except ValueError as error:
            assert "\n" not in str(error)
            outcomes["error"] += 1
            continue
        outcomes["fewer" if len(found) < 2 else "equal"] += 1
        assert len(found) == 2 or position > len(whole) // 2
        for (a, one), (b, other) in zip(found, expected, strict=False):
            assert a == b and jax.tree.all(jax.tree.map(np.array_equal, one, other))
    assert outcomes["error"] > 0.7 * len(whole) / 5  # The rest is mostly padding of headers.


def test_a_damaged_log_is_refused(copy):
    log = copy / "replay.log"
    whole = log.read_bytes()
    DAMAGES["one bit flipped"](log)
    with pytest.raises(ValueError, match=r"replay.log' is damaged: the record at byte \d+ is not"):
        replay(copy, 8)
    log.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"replay.log is damaged, .* checkpoint at 12"):
        replay(copy, 8)


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_checkpoints_are_refused(copy, damage):
    DAMAGES[damage](copy / "checkpoints" / "12" / "job" / "metadata")
    before = contents(copy)
    with pytest.raises(ValueError, match=r"^checkpoint 12 is damaged: job/metadata "):
        replay(copy)
    with pytest.raises(ValueError, match="`from_step` must be one of the checkpoints"):
        replay(copy, 11)
    (copy / "replay.log").unlink()
    with pytest.raises(ValueError, match=r"has no replay.log; give the folder of a job"):
        replay(copy)
    assert contents(copy) == {k: v for k, v in before.items() if k != "replay.log"}


def test_another_environment_is_refused(copy):
    with jax.enable_x64(True), pytest.raises(ValueError, match="JAX_ENABLE_X64=0"):
        replay(copy)


def test_a_damaged_log_is_set_aside_at_a_resume(copy, capsys):
    log = copy / "replay.log"
    DAMAGES["one bit flipped"](log)
    damaged = log.read_bytes()
    run(copy, **PARTS, num_steps=14)
    assert f"warning: {log} is damaged; " in capsys.readouterr().err
    assert (copy / "replay.log.damaged").read_bytes() == damaged
    assert replay(copy) == 14
