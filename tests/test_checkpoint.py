"""Damage to the files of a job: detected, named, survived; nothing is deleted."""

import json
import shutil

import numpy as np
import pytest

from launch import loop, workdir
from meta_train import journal
from meta_train.checkpoint import Checkpoints
from tests.jobs import DAMAGES, contents, rows, run, toy

MORE = 16  # Outer steps, where the original has 12 and checkpoints at 4, 8 and 12.


@pytest.fixture(scope="module", autouse=True)
def toys():
    """All jobs of this file are toys: it is about their files."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "build", toy)
        yield


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint") / "job"
    run(folder)
    return folder


@pytest.fixture(scope="module")
def extended(job, tmp_path_factory):
    """What the job becomes in more steps if nothing is damaged."""
    folder = tmp_path_factory.mktemp("checkpoint") / "extended"
    shutil.copytree(job, folder)
    run(folder, num_steps=MORE)
    return folder


@pytest.fixture
def copy(job, tmp_path):
    return shutil.copytree(job, tmp_path / "job")


def theta(folder):
    exported = np.load(folder / "optimizer" / "theta.npz")
    assert exported["step"] == MORE
    return exported["theta"]


def assert_as(folder, extended):
    assert rows(folder) == rows(extended)
    assert [row["step"] for row in rows(folder)] == list(range(1, MORE + 1))
    np.testing.assert_array_equal(theta(folder), theta(extended))


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_to_any_file_of_a_checkpoint_is_found(copy, damage, caplog):
    newest = copy / "checkpoints" / "12"
    seen = 0
    for path in sorted(p for p in newest.rglob("*") if p.is_file()):
        name = path.relative_to(newest).as_posix()
        before = path.read_bytes()
        DAMAGES[damage](path)
        start = workdir.find_start(copy)
        assert start.step == 8, name
        problem = start.unreadable[12]
        assert problem.startswith("checkpoint 12 is damaged: ") and "\n" not in problem
        # A wrong digest accuses the file that it is of.
        assert name in problem or name == "SHA256SUMS"
        path.write_bytes(before)
        seen += 1
    assert seen > 8
    digests = newest / "SHA256SUMS"
    before = digests.read_bytes()
    for after in (before + b" ", before[:-1]):
        digests.write_bytes(after)
        assert workdir.find_start(copy).step == 8
    digests.write_bytes(before)
    assert workdir.find_start(copy).step == 12
    assert not caplog.records  # One sentence each, and not what Orbax has to say.


@pytest.mark.parametrize("item", ["state", "job", "."])
def test_a_missing_item_is_found(copy, item):
    shutil.rmtree(copy / "checkpoints" / "12" / item)
    (copy / "checkpoints" / "12").mkdir(exist_ok=True)
    assert workdir.find_start(copy).step == 8


def test_continues_from_the_newest_sound_checkpoint(copy, extended, capsys):
    checkpoints = copy / "checkpoints"
    shutil.rmtree(checkpoints / "12" / "job")
    DAMAGES["one bit flipped"](max((checkpoints / "8" / "state").rglob("d/*")))
    damaged = {step: contents(checkpoints / step) for step in ("8", "12")}
    assert run(copy, num_steps=MORE).step == MORE
    warnings = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert len(warnings) == 2
    for line, step in zip(warnings, ("12", "8"), strict=True):
        assert line.startswith(f"warning: checkpoint {step} is damaged: ")
        assert line.endswith(f"it is kept in {copy / 'damaged' / step}.")
        assert contents(copy / "damaged" / step) == damaged[step]
    assert_as(copy, extended)
    # The steps were saved anew.
    assert sorted(p.name for p in checkpoints.iterdir() if p.name.isdigit()) == ["12", "16", "8"]
    assert workdir.find_start(copy).unreadable == {}


def test_without_a_sound_checkpoint_nothing_is_touched(copy):
    for path in (copy / "checkpoints").glob("*/job/metadata"):
        DAMAGES["truncated"](path)
    before = contents(copy)
    with pytest.raises(ValueError, match="has no checkpoint that can be read") as error:
        run(copy, num_steps=MORE)
    assert "\n" not in str(error.value)
    assert contents(copy) == before
    shutil.rmtree(copy / "checkpoints")
    before = contents(copy)
    with pytest.raises(ValueError, match="metrics up to outer step 12 but no checkpoint"):
        run(copy, num_steps=MORE)
    assert contents(copy) == before


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_metrics_are_set_aside(copy, extended, damage, capsys):
    """And the files that are written anew may be damaged as they like."""
    for name in ("config.json", "optimizer/theta.npz"):
        DAMAGES[damage](copy / name)
    path = copy / "metrics.jsonl"
    DAMAGES[damage](path)
    damaged = path.read_bytes() if path.exists() else None
    run(copy, num_steps=MORE)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert line.startswith(f"warning: {path} is damaged; ")
    if damaged is not None:
        assert (copy / "metrics.jsonl.damaged").read_bytes() == damaged
    # What was whole is still there, and what came after is as if nothing had happened.
    assert rows(copy)[-4:] == rows(extended)[-4:]
    whole = [row for row in rows(extended) if row in rows(copy)]
    assert len(whole) >= {"emptied": 4, "deleted": 4, "truncated": 4 + 5}.get(damage, 4 + 11)
    assert len(rows(copy)) == len({row["step"] for row in rows(copy)})
    np.testing.assert_array_equal(*(theta(folder) for folder in (copy, extended)))


def test_checkpoints_of_older_versions_are_continued(copy, extended):
    """They know nothing of digests, of the environment or of the metrics' length."""
    for path in (copy / "checkpoints").glob("*/job/metadata"):
        record = json.loads(path.read_text())
        kept = {"config": record["config"], "wandb_run_id": record["wandb_run_id"]}
        del kept["config"]["nonfinite_patience"]
        path.write_text(json.dumps(kept))
        (path.parents[1] / "SHA256SUMS").unlink()
    with (copy / "metrics.jsonl").open("a") as file:
        file.write('{"step": 13, "meta_')  # Torn by a kill, and no damage.
    run(copy, num_steps=MORE)
    assert_as(copy, extended)
    assert not list(copy.glob("*damaged*"))
    # Of these, damage is found when Orbax cannot read them.
    shutil.rmtree(copy / "checkpoints" / "16")
    shutil.rmtree(copy / "checkpoints" / "12" / "state")
    with pytest.raises(ValueError, match="at outer step 12, past"):
        run(copy, num_steps=11)  # Its record can be read.
    run(copy, num_steps=MORE)
    assert_as(copy, extended)
    assert (copy / "damaged" / "12" / "job").is_dir()


def test_journal_is_pinned_to_the_byte(tmp_path):
    path = tmp_path / "log"
    nothing = lambda data: journal.Salvage(b"", not data)  # noqa: E731
    log = journal.Journal(path, None, nothing)
    log.append(b"one\n")
    assert path.read_bytes() == b"one\n"  # At once, with the file still open.
    mark = log.mark()
    log.append(b"two\n")
    log.close()
    log = journal.Journal(path, mark, nothing)
    assert path.read_bytes() == b"one\n" and log.mark() == mark
    log.append(b"three\n")
    log.close()
    path.write_bytes(b"0ne\nthree\n")
    log = journal.Journal(path, mark, nothing)
    assert path.read_bytes() == b""
    assert (tmp_path / "log.damaged").read_bytes() == b"0ne\nthree\n"
    log.close()
    log = journal.Journal(path, mark, nothing)  # A second damage does not overwrite the first.
    log.close()
    assert (tmp_path / "log.damaged.2").read_bytes() == b""


def test_arrays_without_entries_are_saved(tmp_path):
    state = {"z": np.zeros((0, 3), np.int32), "w": np.arange(3.0), "e": np.zeros(0)}
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, state, {})
    found = checkpoints.restore(1, {name: np.empty_like(x) for name, x in state.items()})
    checkpoints.close()
    for name, array in state.items():
        assert (found[name].shape, found[name].dtype) == (array.shape, array.dtype)
    np.testing.assert_array_equal(found["w"], state["w"])
