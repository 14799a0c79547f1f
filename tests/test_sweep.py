"""Sweeps: what is planned, how runs are started, stopped and continued, what comes of them."""

import csv
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from launch import config as cfg
from launch import job, sweep
from launch.sweeps import plan, processes, results
from meta_train import devices
from tests.jobs import SMALL, changed
from tests.test_train import environment_of_commands

ROOT = Path(__file__).parent.parent


def test_a_grid_is_all_combinations_with_seeds():
    runs = plan.plan(
        changed(seed=5), ["cfg.meta.learning_rate=1e-4,1e-3", "--cfg.inner.horizon=4,8"], 2
    )
    assert [run.number for run in runs] == list(range(8))
    assert [run.name for run in runs[:3]] == [
        "learning_rate=1e-4,horizon=4,seed=5",
        "learning_rate=1e-4,horizon=4,seed=6",
        "learning_rate=1e-4,horizon=8,seed=5",
    ]
    found = {(r.config.meta.learning_rate, r.config.inner.horizon, r.config.seed) for r in runs}
    assert found == {(a, b, c) for a in (1e-4, 1e-3) for b in (4, 8) for c in (5, 6)}
    assert runs[-1].words == ["--cfg.meta.learning_rate=1e-3", "--cfg.inner.horizon=8",
                              "--cfg.seed=6"]  # fmt: skip


def test_brackets_and_names_alike():
    runs = plan.plan(
        cfg.Config(), ["cfg.task.hidden_sizes=(8,),(8,8)", "cfg.optimizer=mlp,velo"], 1
    )
    assert [run.config.task.hidden_sizes for run in runs] == [(8,), (8,), (8, 8), (8, 8)]
    alike = plan.plan(SMALL, ["cfg.optimizer.learning_rate=1,2", "cfg.meta.learning_rate=3"], 1)
    assert alike[0].name == "optimizer.learning_rate=1,meta.learning_rate=3,seed=0"


def test_draws_are_by_the_logarithm_and_stay_when_more_are_asked_for():
    vary = ["cfg.meta.learning_rate=1e-4..1e-2", "cfg.inner.horizon=4..64", "cfg.meta=adam,sgd"]
    base = changed(estimator={"truncation": 1})
    few, many = plan.plan(base, vary, 1, 20), plan.plan(base, vary, 1, 400)
    assert [run.values for run in many[:20]] == [run.values for run in few]
    rates = np.log10([run.config.meta.learning_rate for run in many])
    assert rates.min() >= -4 and rates.max() <= -2
    assert abs(rates.mean() + 3) < 4 * 2 / 12**0.5 / 400**0.5  # Standard errors.
    assert all(isinstance(run.config.inner.horizon, int) for run in many)
    assert {run.values["cfg.meta"] for run in many} == {"adam", "sgd"}


@pytest.mark.parametrize(
    ("vary", "draws", "message"),
    [
        ([], None, "--vary is missing"),
        (["meta.learning_rate=1"], None, "must be cfg.a.b=VALUE"),
        (["cfg.meta.learning_rate"], None, "must be cfg.a.b=VALUE"),
        (["cfg.meta.learning_rate=1,,2"], None, "must be cfg.a.b=VALUE"),
        (["cfg.seed=1,2"], None, "give --seeds=N"),
        (["cfg.num_steps=1", "cfg.num_steps=2"], None, "each field once"),
        (["cfg.num_steps=3,3"], None, "each value once"),
        (["cfg.num_stepz=3"], None, "has no field 'num_stepz'"),
        (["cfg.meta.learning_rate=0"], None, "learning_rate"),
        (["cfg.meta.learning_rate=1..2"], None, "is for --random=N"),
        (["cfg.meta.learning_rate=2..1"], 3, "0 < LOW < HIGH"),
        (["cfg.meta.learning_rate=a..b"], 3, "0 < LOW < HIGH"),
    ],
)
def test_wrong_plans_are_refused(vary, draws, message):
    with pytest.raises(ValueError, match=message):
        plan.plan(SMALL, vary, 1, draws)


FAKE = """
    import json, os, signal, sys, time
    from pathlib import Path

    words = dict(word.lstrip("-").partition("=")[::2] for word in sys.argv[1:])
    folder, seed = Path(words["workdir"]), int(words["cfg.seed"])
    rate = float(words["cfg.meta.learning_rate"])
    stop = False
    def ask(*_):
        global stop
        stop = True
    signal.signal(signal.SIGTERM, ask)
    assert os.environ["JAX_COMPILATION_CACHE_DIR"].endswith("compiled")
    print("starts", len(os.sched_getaffinity(0)), words.get("cfg.num_steps"), flush=True)
    if seed == 2 and not (folder / "begun").exists():
        (folder / "begun").touch()
        while not stop:
            time.sleep(0.01)
        sys.exit(75)
    row = {"step": 9, "eval/final_loss": 10 * rate + seed, "time/wall_seconds": 1.0}
    (folder / "metrics.jsonl").write_text(json.dumps(row) + chr(10))
    sys.exit(3 if rate == 3 else 0)
"""


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """``launch.sweep`` with a stand-in for ``launch.train``: the third seed waits for a signal."""
    (tmp_path / "fake_train.py").write_text(textwrap.dedent(FAKE))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(sweep, "TRAIN", "fake_train")

    def run(*words):
        words = [f"--workdir={tmp_path / 's'}", *words]
        shared = ["--vary=cfg.meta.learning_rate=1,2,3", "--seeds=3", "--cfg.num_steps=9"]
        values = sweep.flags.FLAGS
        names = ("workdir", "vary", "seeds", "jobs", "index", "metric")
        saved = {name: (values[name].value, values[name].present) for name in names}
        monkeypatch.setattr(sys, "argv", ["sweep", *shared, *words])
        try:
            for name in names:
                values[name].present = 0
            values(["sweep", *(word for word in shared + words if "--cfg" not in word[:5])])
            return sweep.main(changed(num_steps=9))
        finally:
            for name, (value, present) in saved.items():
                values[name].value, values[name].present = value, present

    flags = sweep.flags
    flags.DEFINE_string("preset", "default", "")
    yield tmp_path / "s", run
    delattr(flags.FLAGS, "preset")


def test_three_by_three_interrupted_and_continued(fake, capsys):
    folder, run = fake

    def interrupt():
        deadline = time.monotonic() + 60
        while len(list(folder.glob("*/begun"))) < 2 and time.monotonic() < deadline:
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=interrupt)
    thread.start()
    assert run("--jobs=2") == 75
    thread.join()
    assert "Run again to continue" in capsys.readouterr().out
    assert signal.getsignal(signal.SIGTERM) == before and not (folder / "sweep.csv").exists()
    ended = {path.parent.name for path in folder.glob("*/sweep_status.json")}
    assert 2 <= len(ended) <= 6 and not [name for name in ended if "seed=2" in name]
    for name in range(9):  # As an array of a scheduler would: one a task; those done do nothing.
        if name == 2:
            assert run("--index=2") == 0
            assert "seed=2: exit code 0" in capsys.readouterr().out
    # Each waits once; those that waited before go on.
    for path in folder.glob("*"):
        if path.is_dir():
            (path / "begun").touch()
    for name in ("learning_rate=2,seed=2", "learning_rate=3,seed=2"):
        (folder / name).mkdir(exist_ok=True)
        (folder / name / "begun").touch()
    assert run() == 0
    out = capsys.readouterr().out
    assert out.index("\n1 ") < out.index("\n2 ") < out.index("\n3 ")
    rows = list(csv.DictReader((folder / "sweep.csv").open()))
    assert [row["eval/final_loss"] for row in rows] == [
        "10.0", "11.0", "12.0", "20.0", "21.0", "22.0", "", "", "",
    ]  # fmt: skip
    settings = json.loads((folder / "sweep.json").read_text())["settings"]
    assert [s["mean"] for s in settings] == [11, 21, None]
    assert [s["diverged"] for s in settings] == [0, 0, 3]
    # Student's t of two degrees of freedom: 4.303 standard errors of 1 / sqrt(3).
    assert settings[0]["high"] - 11 == pytest.approx(4.3027 / 3**0.5, rel=1e-4)
    assert (folder / "sweep.png").stat().st_size > 5_000
    logs = "".join(path.read_text() for path in folder.glob("*/log.txt"))
    assert logs.count("starts") in (10, 11)  # Each once, and those that the signal stopped twice.
    assert "9" in logs.split()


def test_a_run_that_fails_is_said_and_started_again(fake, capsys):
    folder, run = fake
    (folder / "learning_rate=1,seed=0" / "metrics.jsonl").mkdir(parents=True)  # In its way.
    for name in ("1", "2", "3"):
        (folder / f"learning_rate={name},seed=2").mkdir()
        (folder / f"learning_rate={name},seed=2" / "begun").touch()
    assert run("--jobs=2") == 1
    said = capsys.readouterr()
    assert "learning_rate=1,seed=0 ended with exit code 1" in said.err and "log.txt" in said.err
    assert processes.status(folder / "learning_rate=1,seed=0") is None
    assert processes.status(folder / "learning_rate=3,seed=0") == 3
    (folder / "learning_rate=1,seed=0" / "metrics.jsonl").rmdir()
    assert run() == 0
    with pytest.raises(ValueError, match=r"one of eval/final_loss, time/\w+, got 'final_loss'"):
        run("--metric=final_loss")
    with pytest.raises(ValueError, match="below the number of runs, 9, got 9"):
        run("--index=9")


def test_scores(tmp_path):
    rows = [{"step": i, "meta_loss": float(i), "eval/x": 3.0} for i in range(1, 20)]
    rows.append({"step": 20, "meta_loss": 20.0, "eval/x": None})
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert results.score(tmp_path, "meta_loss") == 19.5 and results.score(tmp_path, "eval/x") == 3
    assert np.isnan(results.score(tmp_path, "none"))
    assert results.interval(np.array([1.0, np.nan]))[0] == 1
    assert np.isnan(results.interval(np.array([np.nan]))).all()


def test_rates_and_seeds_are_arguments_of_one_program():
    """So a sweep over them compiles once: the text of every program is the same."""
    texts = set()
    for rate, seed in ((0.01, 0), (0.03, 1)):
        config = changed(seed=seed, meta={"learning_rate": rate, "schedule": "cosine", "warmup": 2})
        built = job.build(config, None)
        placed = devices.placed_spec(job.jax.eval_shape(built.init), 1, built.axes)
        texts.add(built.step.lower(placed)._step.as_text())
    assert len(texts) == 1


@pytest.mark.slow
def test_a_sweep_of_real_jobs_shares_its_programs(tmp_path):
    """Nine jobs, as many programs on disk as after one."""
    words = [
        sys.executable, "-m", "launch.sweep", f"--workdir={tmp_path}", "--seeds=3", "--jobs=2",
        "--cfg.task=quadratic", "--cfg.optimizer=sgdm", "--cfg.inner.horizon=8",
        "--cfg.estimator.truncation=4", "--cfg.num_steps=4", "--cfg.eval_every=2",
        "--cfg.wandb_mode=disabled", "--vary=cfg.meta.learning_rate=1e-3,1e-2,1e-1",
    ]  # fmt: skip

    def run(*more):
        done = subprocess.run([*words, *more], cwd=ROOT, env=environment_of_commands(),
                              capture_output=True, text=True)  # fmt: skip
        assert done.returncode == 0, done.stderr
        return {path.name for path in (tmp_path / "compiled").glob("*-cache")}

    first = run("--index=0")
    assert len(first) > 3 and run() == first
    assert len(list(csv.DictReader((tmp_path / "sweep.csv").open()))) == 9
