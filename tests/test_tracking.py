"""Where metrics go: every row on disk at once, W&B by outer step, progress in lines."""

import io
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch import loop, pending
from meta_train import progress as progress_file
from meta_train import tracking
from meta_train.progress import progress
from tests.jobs import run, toy


def tracker(folder, start_step, mode, mark=None):
    return tracking.Tracker(
        folder,
        config={},
        run_id="abcd1234",
        start_step=start_step,
        num_steps=8,
        project="test",
        mode=mode,
        mark=mark,
    )


def test_a_row_is_on_disk_when_it_is_logged(tmp_path):
    track = tracker(tmp_path, 0, "disabled")
    for step in (1, 2):
        track.log({"step": step, "meta_loss": float("nan")})
        lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
        assert json.loads(lines[-1]) == {"step": step, "meta_loss": None}
    assert track.wandb_dir is None
    track.close()


def test_the_next_process_goes_on_where_the_last_one_was(tmp_path, monkeypatch):
    """With a clock of our own, after rows beyond the checkpoint and a torn one."""
    now = 1000.0
    monkeypatch.setattr(tracking.time, "perf_counter", lambda: now)
    first = tracker(tmp_path, 0, "disabled")
    marks = []
    for step in (1, 2, 3):
        now += 10
        first.log({"step": step, "meta_loss": 0.5, "time/wall_seconds": first.seconds()})
        marks.append(first.mark())
    first.close()
    assert first._file._file.closed and first._bar.disable
    assert [mark["bytes"] for mark in marks] == sorted({mark["bytes"] for mark in marks})

    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes() + b'{"step": 4, "meta_l')
    now += 500  # Nothing runs.
    second = tracker(tmp_path, 2, "disabled", marks[1])
    assert second.seconds() == 20  # As the row that is kept says.
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2]
    now += 10
    second.log({"step": 3, "meta_loss": 0.25, "time/wall_seconds": second.seconds()})
    assert (second._bar.n, second._bar.postfix) == (3, "meta-loss 0.2500")
    second.close()
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(row["step"], row["time/wall_seconds"]) for row in rows] == [(1, 10), (2, 20), (3, 30)]


def test_other_processes_track_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(tracking.jax, "process_index", lambda: 1)
    track = tracker(tmp_path, 0, "disabled")
    track.log({"step": 1, "meta_loss": 0.0})
    assert track.mark() is None and track.wandb_dir is None and track.seconds() >= 0
    track.close()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("lines", "last_step", "kept", "sound"),
    [
        ([b'{"step": 1}', b'{"step": 2}', b""], 2, [0, 1], True),
        ([b'{"step": 1}', b'{"step": 2}', b""], 1, [0], True),
        ([b'{"step": 0}', b'{"step": 1}', b'{"step": 1}', b""], 9, [1], True),
        ([b'{"step": 1}', b'{"st'], 9, [0], True),
        ([b'{"step": 1}', b'{"st', b'{"step": 2}', b""], 9, [0, 2], False),
        *(
            ([b'{"step": 1}', line, b'{"step": 2}', b""], 9, [0, 2], False)
            for line in (b"{}", b"7", b"[]", b'{"step": "2"}', b"\xff", b"")
        ),
    ],
)
def test_whole_rows(lines, last_step, kept, sound):
    expected = b"".join(lines[i] + b"\n" for i in kept)
    assert tracking.whole_rows(b"\n".join(lines), last_step) == (expected, sound)


def test_offline_runs_of_one_job_count_its_outer_steps(tmp_path, monkeypatch):
    """Read back from W&B's files: a resume goes on at its own step, not at 0."""
    monkeypatch.setattr(loop, "build", toy)
    for num_steps in (3, 5):
        run(
            tmp_path,
            num_steps=num_steps,
            wandb_mode="offline",
            eval_every=num_steps,
            wandb={"group": "sweep", "tags": "one, two", "name": "a name"},
        )
    files = sorted(tmp_path.glob("wandb/offline-run-*/*.wandb"))
    assert len({path.name for path in files}) == 1  # One run id.
    wandb = Path(sys.executable).parent / "wandb"
    deadline = time.monotonic() + 60
    while True:  # W&B's writer may finish a moment after the job.
        steps = []
        for path in files:
            command = [wandb, "leet", "inspect", path, "--json"]
            done = subprocess.run(command, capture_output=True, text=True)
            records = [json.loads(line) for line in done.stdout.splitlines()]
            steps.append([row for r in records if (row := history(r)) is not None])
            last = records
        if [len(found) for found in steps] == [3, 2] or time.monotonic() > deadline:
            break
        time.sleep(1)
    assert sorted(steps) == [[(1, 1), (2, 2), (3, 3)], [(4, 4), (5, 5)]]
    (named,) = (record["run"] for record in last if record["type"] == "run")
    assert (named["run_group"], named["tags"]) == ("sweep", ["one", "two"])
    assert named["display_name"] == "a name"
    row = [record["history"]["item"] for record in last if record["type"] == "history"][-1]
    written = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    for name, value in written.items():  # The same names, the same numbers.
        if name.endswith("_histogram"):
            assert row[f"{name}.values"] == value["counts"] and sum(value["counts"]) == 3
        else:
            assert row[name] == pytest.approx(value), name
    assert row["curves/meta-loss._type"] == "image-file" and row["evaluations.nrows"] == 2
    found = {record["artifact"]["name"] for record in last if record["type"] == "artifact"}
    assert f"{tmp_path.name}-optimizer" in found


def history(record):
    """W&B's own step and ours, of a record of a logged row."""
    if record.get("type") != "history":
        return None
    values = record["history"]["item"]
    return values["_step"], values["step"]


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_is_a_bar_or_lines(monkeypatch, terminal):
    class Stream(io.StringIO):
        def isatty(self):
            return terminal

    stream = Stream()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(progress_file, "LOG_SECONDS", 0.2)
    for _ in progress(range(10), desc="short"):
        pass
    short = len(stream.getvalue())
    began = time.monotonic()
    for _ in progress(range(1000), desc="long"):
        time.sleep(0.0007)
    seconds = time.monotonic() - began
    text = stream.getvalue()
    before = len(text)
    with progress(total=1, desc="outer"):
        for _ in progress(range(500), desc="inner"):
            time.sleep(0.0007)
    assert ("\x1b" in stream.getvalue()[before:]) == terminal
    assert ("\r" in text) == terminal and (short > 0) == terminal
    if not terminal:
        lines = text.splitlines()
        assert 1 <= len(lines) <= seconds / 0.2 + 1
        assert all(line.startswith("long: ") and "/1000 [" in line for line in lines)


def test_progress_is_shown_by_one_function():
    root = Path(__file__).parent.parent
    users = [
        path.relative_to(root).as_posix()
        for package in ("launch", "meta_train", "learned_opt", "tasks")
        for path in (root / package).rglob("*.py")
        if "import tqdm" in path.read_text()
    ]
    assert users == ["meta_train/progress.py"]


def test_the_clock_of_steps_leaves_out_what_is_apart(monkeypatch):
    """With a clock of our own: each step takes 2 s, what is apart an hour."""
    now = 100.0
    monkeypatch.setattr(pending.time, "perf_counter", lambda: now)
    queue = pending.Pending(limit=0)
    seen = []
    for step in range(1, 7):
        queue.wait_for_room()
        seen += queue.take()
        queue.add(step, {"x": step})
        now += 2
        if step in (2, 5):
            with queue.apart():
                seen += queue.take()
                now += 3600
    with queue.apart():
        seen += queue.take()
    assert [finished.step for finished in seen] == [1, 2, 3, 4, 5, 6]
    assert [finished.seconds for finished in seen] == [2, 4, 6, 8, 10, 12]
