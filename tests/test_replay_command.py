"""``launch.replay`` on the folders of jobs that are whole, damaged, or of older versions."""

import io
import shutil
import zlib
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

import learned_opt
from launch import config as cfg
from launch import replay as command
from launch.replay import replay
from launch.workdir import find_start
from meta_train.checkpoint import Checkpoints, UnreadableError
from meta_train.estimators.hybrid import messages
from meta_train.estimators.hybrid.replay import ReplayLog, read_log
from meta_train.journal import Journal
from meta_train.tracking import whole_rows
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
    folder = tmp_path_factory.mktemp("replay") / "job"
    run(folder, **PARTS)
    run(folder, **PARTS, num_steps=15, checkpoint_every=100)
    shutil.rmtree(folder / "checkpoints" / "15")
    return folder


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
        found = replay(copy, step)
        assert (found.step, found.start) == (15, step or 12)
        assert found.equal == {str(copy / "optimizer"): True}  # Of step 15; there is no checkpoint.
        assert_rebuilt(copy, job)


@pytest.mark.parametrize("damage", [None, "other weights", "unreadable"])
def test_what_was_rebuilt_is_compared_with_the_record(copy, damage, monkeypatch, capsys):
    """By the command: in words, and by its exit code."""
    _, theta = learned_opt.load(copy / "optimizer")
    if damage == "other weights":
        saved = learned_opt.load_config(copy / "optimizer")
        other = jax.tree.map(lambda x: np.nextafter(x, np.float32(9)), theta)
        arguments = saved["arguments"]
        learned_opt.save(copy / "optimizer", "sgdm", arguments, other, training=saved["training"])
    elif damage:
        DAMAGES["truncated"](copy / "optimizer" / "theta.safetensors")
    monkeypatch.setattr(command, "required_workdir", lambda: copy)
    monkeypatch.setattr(command, "_FROM_STEP", SimpleNamespace(value=8))
    monkeypatch.setattr(command, "DATA_DIR", SimpleNamespace(value=None))
    assert command.main([]) == (command.DIFFERS if damage else 0)
    said = capsys.readouterr().out
    assert "outer step 15 from checkpoint 8 and 7 records" in said
    assert f"wrote {copy / 'optimizer_rebuilt'}." in said
    word = "DIFFER from" if damage else "equal, bit for bit,"
    assert f"They {word} those of {copy / 'optimizer'}." in said


def small_log(path):
    """Two records of every part there is, and what they say."""
    costs = messages.Costs(np.arange(2, dtype=np.uint32), np.ones(2, np.float32))
    like = messages.Message(np.array(True), np.zeros(3, np.float32), np.array(True), costs)
    log = ReplayLog(path, 0)
    for step in (1, 2):
        log.append(step, like._replace(gradient=np.full(3, step, np.float32)))
    log.close()
    return like


def test_every_flipped_bit_in_the_log_is_found(tmp_path):
    """Lengths too, in the last record too: it is not taken for one that a kill tore."""
    path = tmp_path / "log"
    like = small_log(path)
    whole = path.read_bytes()
    assert len(list(read_log(path, like))) == 2
    for bit in range(0, 8 * len(whole), 9):  # Every byte, and every place in one.
        data = bytearray(whole)
        data[bit // 8] ^= 1 << (bit % 8)
        path.write_bytes(data)
        with pytest.raises(ValueError, match=r"is damaged: the record at byte \d+ is not"):
            list(read_log(path, like))


@pytest.mark.parametrize("numbers", [4, 5])
def test_logs_of_older_versions_are_read_and_go_on(tmp_path, numbers):
    """Whole, torn and damaged ones; what is appended is of today's form."""
    path = tmp_path / "log"
    like = small_log(path)
    expected = list(read_log(path, like))
    path.unlink()

    def old(message, step):
        arrays = jax.tree.leaves((message.gradient, message.costs))
        header = [step, 1, 1, len(arrays)]
        crc = zlib.crc32(np.array(header, np.int64).tobytes())
        for array in arrays:
            crc = zlib.crc32(f"{array.dtype.str}{array.shape}".encode() + array.tobytes(), crc)
        file = io.BytesIO()
        for array in [np.array([*header, crc][:numbers], np.int64), *arrays]:
            np.save(file, array)
        return file.getvalue()

    first, second = (old(message, step) for step, message in expected)

    def found():
        return [
            (step, *map(np.ndarray.tolist, jax.tree.leaves(x))) for step, x in read_log(path, like)
        ]

    said = [(step, *map(np.ndarray.tolist, jax.tree.leaves(x))) for step, x in expected]
    for data, count in ((first + second, 2), (first + second[:-1], 1), (first[:100], 0)):
        path.write_bytes(data)
        assert found() == said[:count]
    path.write_bytes(first)
    log = ReplayLog(path, 1)
    log.append(2, expected[1][1])
    log.close()
    assert path.read_bytes().startswith(first) and found() == said
    for data in (b"\0" + first[1:], first + b"\0" + second[1:], b"\0" + first[1:] + second):
        path.write_bytes(data)
        with pytest.raises(ValueError, match="is damaged"):
            found()


def test_a_damaged_log_is_refused(copy):
    log = copy / "replay.log"
    whole = log.read_bytes()
    DAMAGES["one bit flipped"](log)
    with pytest.raises(ValueError, match=r"replay.log' is damaged: the record at byte \d+ is not"):
        replay(copy, 8)
    log.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"replay.log is damaged, .* checkpoint at 12"):
        replay(copy, 8)


def test_a_damaged_checkpoint_is_passed_over_or_refused(copy, job, capsys):
    DAMAGES["one bit flipped"](copy / "checkpoints" / "12" / "job" / "metadata")
    before = contents(copy)
    with pytest.raises(ValueError, match=r"^checkpoint 12 is damaged: job/metadata "):
        replay(copy, 12)
    with pytest.raises(ValueError, match="`from_step` must be one of the checkpoints"):
        replay(copy, 11)
    assert contents(copy) == before
    assert replay(copy).step == 15
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert line.startswith("warning: checkpoint 12 is damaged: job/metadata ")
    assert line.endswith("; going on from 8.")
    assert_rebuilt(copy, job)
    assert before.items() <= contents(copy).items()
    (copy / "replay.log").unlink()
    with pytest.raises(ValueError, match=r"has no replay.log; give the folder of a job"):
        replay(copy)


def test_another_environment_is_refused(copy):
    with jax.enable_x64(True), pytest.raises(ValueError, match="JAX_ENABLE_X64=0"):
        replay(copy)


def flips(data):
    """A bit in the first byte, in the last one, and in some between."""
    for at in sorted({0, len(data) - 1, *range(0, len(data), max(1, len(data) // 5))}):
        yield data[:at] + bytes([data[at] ^ 1 << at % 8]) + data[at + 1 :]


def test_damage_to_any_file_of_a_job_is_noticed(copy, capsys):
    """By who reads it, in one sentence that names the file; and there is no other file."""
    record = find_start(copy).record
    marks = record["files"]

    def checkpoint(path):
        step = int(path.relative_to(copy / "checkpoints").parts[0])
        found = find_start(copy)
        assert found.step == {12: 8}.get(step, 12)
        with pytest.raises(UnreadableError) as error:
            Checkpoints(copy, read_only=True).job(step)
        assert found.unreadable in ({}, {step: str(error.value)})
        return str(error.value)

    def export(path):
        with pytest.raises(ValueError) as error:
            learned_opt.load(path.parent)
        return str(error.value)

    def journal(path):
        before = path.read_bytes() if path.exists() else None
        if path.name == "replay.log":
            ReplayLog(path, 12, marks[path.name]).close()
        else:
            Journal(path, marks[path.name], lambda data: whole_rows(data, 12)).close()
        aside = copy / f"{path.name}.damaged"
        assert (aside.read_bytes() if aside.exists() else None) == before
        aside.unlink(missing_ok=True)
        return capsys.readouterr().err.strip()

    readers = {"checkpoints": checkpoint, "optimizer": export, "optimizer_initial": export,
               "metrics.jsonl": journal, "replay.log": journal}  # fmt: skip
    # Nobody reads these: they are for people, or say nothing, and each start writes them anew.
    unread = {"config.json", "lock", "optimizer/README.md", "optimizer_initial/README.md"}
    seen = set()
    for name in contents(copy):
        path = copy / name
        if name in unread:
            continue
        reader = readers[name.split("/")[0]]
        # Of what grows, up to the checkpoint: the rest is cut off, and written again.
        data = path.read_bytes()[: marks[name]["bytes"] if name in marks else None]
        seen.add(name)
        for damaged in (*flips(data), data[: len(data) // 2], data[:-1], b"", None):
            if damaged is None:
                path.unlink()
            else:
                path.write_bytes(damaged)
            said = reader(path)
            assert said and "\n" not in said, name
            assert name.split("/", 2)[-1] in said or name.endswith("SHA256SUMS"), name
        path.write_bytes(data)
    assert seen | unread == set(contents(copy))
    assert len(seen) > 30
    assert replay(copy).step == 12


def test_a_damaged_log_is_set_aside_at_a_resume(copy, capsys):
    log = copy / "replay.log"
    DAMAGES["one bit flipped"](log)
    damaged = log.read_bytes()
    run(copy, **PARTS, num_steps=14)
    assert f"warning: {log} is damaged; " in capsys.readouterr().err
    assert (copy / "replay.log.damaged").read_bytes() == damaged
    assert replay(copy).step == 14
