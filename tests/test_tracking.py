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


def test_offline_runs_of_one_job_count_its_outer_steps(tmp_path, monkeypatch):
    """Read back from W&B's files: a resume goes on at its own step, not at 0."""
    monkeypatch.setattr(loop, "build", toy)
    for num_steps in (3, 5):
        run(tmp_path, num_steps=num_steps, wandb_mode="offline", eval_every=0)
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
        if [len(found) for found in steps] == [3, 2] or time.monotonic() > deadline:
            break
        time.sleep(1)
    assert sorted(steps) == [[(1, 1), (2, 2), (3, 3)], [(4, 4), (5, 5)]]


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
