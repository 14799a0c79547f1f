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
from absl import flags

from launch import config as cfg
from launch import job, sweep
from launch.sweeps import plan, processes, results
from launch.sweeps.search import Search
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


def test_draws_differ_and_are_configurations():
    """What was drawn before, or is refused, is drawn anew."""
    runs = plan.plan(cfg.Config(), ["cfg.estimator.num_particles=2..64"], 1, 12)
    particles = [run.config.estimator.num_particles for run in runs]
    assert len(set(particles)) == 12 and not any(n % 2 for n in particles)
    assert [run.values for run in runs[:5]] == [
        run.values for run in plan.plan(cfg.Config(), ["cfg.estimator.num_particles=2..64"], 1, 5)
    ]
    listed = plan.plan(SMALL, ["cfg.meta.learning_rate=1,2,3"], 2, 3)
    assert {run.config.meta.learning_rate for run in listed} == {1, 2, 3} and len(listed) == 6


def test_a_search_passes_over_what_is_refused_between_the_ends():
    search, seen = Search(cfg.Config(), ["cfg.estimator.num_particles=2..64"], 1, 8), []
    while runs := search.ask():
        seen += [run.config.estimator.num_particles for run in runs]
        search.tell([1.0] * len(runs))
    assert len(set(seen)) == 8 and not any(n % 2 for n in seen)


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
        (["cfg.num_stepz=3"], None, "--vary gives cfg.num_stepz=3.*has no field 'num_stepz'"),
        (["cfg.meta.learning_rate=0"], None, "--vary gives cfg.meta.learning_rate=0, which is ref"),
        # By the function that makes it, not by the configuration.
        (["cfg.optimizer.momentum=0.5,1.5"], None, "--vary gives cfg.optimizer.momentum=1.5, whi"),
        (["cfg.optimizer=adam", "cfg.optimizer.b2=0.9,2"], None, "--vary gives .*b2=2, which is"),
        (["cfg.meta.learning_rate=1..2"], None, "is for --random=N and --search=N"),
        (["cfg.meta.learning_rate=2..1"], 3, "0 < LOW < HIGH"),
        (["cfg.meta.learning_rate=a..b"], 3, "0 < LOW < HIGH"),
        (["cfg.meta.learning_rate=1e-4..1e400"], 3, "finite numbers with 0 < LOW < HIGH"),
        (["cfg.meta.learning_rate=1e-3,0.001"], None, "each value once"),
        (["cfg.meta.learning_rate=1e-3,1e-2"], 5, "--random=5: --vary has 2 settings that differ"),
        (["cfg.meta.learning_rate=-1,-2"], 2, "--vary gives .*=-., which is refused"),
        (["cfg.meta.learning_rate=1,-2"], 2, "--vary gives .*=-2, which is refused"),
        (["cfg.num_steps=1..9", "cfg.eval_seeds=0"], 2, "--vary gives .*=0, which is refused"),
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

    grid = ("--vary=cfg.meta.learning_rate=1,2,3", "--seeds=3")

    def run(*words, shared=grid, folder="s", num_steps=9):
        words = [f"--workdir={tmp_path / folder}", *words]
        shared = [*shared, f"--cfg.num_steps={num_steps}"]
        values = sweep.flags.FLAGS
        names = ("workdir", "vary", "seeds", "jobs", "index", "metric", "search", "random", "plan")
        saved = {name: (values[name].value, values[name].present) for name in names}
        monkeypatch.setattr(sys, "argv", ["sweep", *shared, *words])
        try:
            for name in names:
                values[name].present = 0
            values(["sweep", *(word for word in shared + words if "--cfg" not in word[:5])])
            return sweep.main(changed(num_steps=num_steps))
        finally:
            for name, (value, present) in saved.items():
                values[name].value, values[name].present = value, present

    flags = sweep.flags
    flags.DEFINE_string("preset", "default", "")
    yield tmp_path / "s", run
    delattr(flags.FLAGS, "preset")


def interrupt(folder, pattern, count):
    """Stops this process, as a scheduler does, once there are so many such files."""
    deadline = time.monotonic() + 60
    while len(list(folder.glob(pattern))) < count and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(os.getpid(), signal.SIGTERM)


def test_three_by_three_interrupted_and_continued(fake, capsys):
    folder, run = fake

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=interrupt, args=(folder, "*/begun", 2))
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
    assert "learning_rate=1,seed=0 ended with exit code 1: IsADirectoryError" in said.err
    assert "learning_rate=1,seed=0/log.txt)" in said.err
    assert processes.status(folder / "learning_rate=1,seed=0") is None
    assert processes.status(folder / "learning_rate=3,seed=0") == 3
    (folder / "learning_rate=1,seed=0" / "metrics.jsonl").rmdir()
    assert run() == 0
    with pytest.raises(ValueError, match=r"one of eval/final_loss, time/\w+, got 'final_loss'"):
        run("--metric=final_loss")
    with pytest.raises(ValueError, match="below the number of runs, 9, got 9"):
        run("--index=9")


def test_a_metric_that_there_is_none_of_is_refused_after_one_run(fake):
    folder, run = fake
    with pytest.raises(ValueError, match=r"got 'final_loss'. .*Runs that are done stay so"):
        run("--metric=final_loss", "--jobs=2")
    assert len(list(folder.glob("*/log.txt"))) == 1
    with pytest.raises(flags.IllegalFlagValueError, match="random"):
        run("--random=1000000000")


def test_a_run_done_by_another_command_is_not_taken_for_this_one(fake, capsys):
    """It is started again: the job continues to the steps asked for, or says what differs."""
    folder, run = fake
    shared = ("--vary=cfg.meta.learning_rate=1,2",)
    assert run(shared=shared) == 0 and run(shared=shared) == 0
    log = folder / "learning_rate=1,seed=0" / "log.txt"
    cores = len(os.sched_getaffinity(0))
    assert log.read_text().split()[:2] == ["starts", str(cores)]
    assert log.read_text().count("starts") == 1
    (folder / "learning_rate=2,seed=0" / "metrics.jsonl").unlink()
    (folder / "learning_rate=2,seed=0" / "metrics.jsonl").mkdir()  # So that it fails this time.
    assert run(shared=shared, num_steps=8) == 1
    assert log.read_text().count("starts") == 2 and log.read_text().split()[-1] == "8"
    rows = list(csv.DictReader((folder / "sweep.csv").open()))
    assert [row["eval/final_loss"] for row in rows] == ["10.0", ""]  # Nothing of the old one.


SEARCH = ("--vary=cfg.meta.learning_rate=0.01..10", "--seeds=2", "--search=14")


def test_a_search_is_the_same_whatever_interrupts_it_and_however_many_jobs(fake, capsys):
    folder, run = fake

    thread = threading.Thread(target=interrupt, args=(folder, "*/sweep_status.json", 11))
    thread.start()
    assert run("--jobs=2", shared=SEARCH) == 75
    thread.join()
    before = {path.parent.name for path in folder.glob("*/sweep_status.json")}
    assert 11 <= len(before) <= 13
    # Of a setting whose runs had only begun, and of one that the first try never came to.
    assert run("--jobs=3", shared=SEARCH) == 0
    assert run(shared=SEARCH, folder="at_once") == 0
    first, second = ((folder.parent / name / "sweep.csv").read_text() for name in ("s", "at_once"))
    assert first == second and len(first.splitlines()) == 29
    rates = [float(row["cfg.meta.learning_rate"]) for row in csv.DictReader(first.splitlines())]
    assert len(set(rates)) == 14 and all(0.01 <= rate <= 10 for rate in rates)
    # Of 10 * rate + seed lower rates are better: what was learned of the first ones is used.
    assert np.mean(np.log(rates[24:])) < np.mean(np.log(rates[:24])) - 1
    # Asked for more, it goes on; the last round was not whole.
    longer = (*SEARCH[:2], "--search=16")
    assert run(shared=longer) == 0
    assert (folder / "sweep.csv").read_text().startswith(first)
    logs = [path.read_text() for path in folder.glob("*/log.txt")]
    # Three at a time on the processors there are: a third of them each, or all.
    cores = len(os.sched_getaffinity(0))
    given = {int(text.split()[1]) for text in logs}
    assert given <= {cores, *(len(range(i, cores, n)) for n in (2, 3) for i in range(n))}
    assert sum(text.count("starts") for text in logs) in (32, 33, 34)  # Two may have been stopped.


def test_what_a_search_learns_from():
    """Scores of settings, the worst where a seed diverged; each is tried once."""
    vary = ["cfg.meta.learning_rate=1e-4..1", "cfg.optimizer.momentum=0.25,0.5"]

    def found(seed, count=36):
        search, settings, lost = Search(changed(seed=seed), vary, 2, count), [], []
        while runs := search.ask():
            assert [run.number for run in runs] == list(range(len(lost), len(lost) + len(runs)))
            rates = [float(run.values["cfg.meta.learning_rate"]) for run in runs]
            # Best at 0.03; below 0.01 the second seed diverges, and the first is as good.
            scores = [
                float("nan" if run.seed > seed else 0)
                if rate < 0.01
                else np.log10(rate / 0.03) ** 2
                for run, rate in zip(runs, rates, strict=True)
            ]
            lost += [rate < 0.01 for rate in rates]
            settings += [tuple(run.values.values()) for run in runs[::2]]
            search.tell(scores)
        return settings, lost

    settings, lost = found(0)
    assert len(set(settings)) == 36 and len(lost) == 72
    assert found(0) == (settings, lost) and found(0, 8)[0] == settings[:8]
    assert found(1)[0] != settings
    # Of those drawn by the logarithm half are below 0.01, of those proposed few.
    assert sum(lost[:24]) > 8 > sum(lost[24:]) / 2


@pytest.mark.parametrize(
    ("vary", "message"),
    [
        (["cfg.meta.learning_rate=1,2,3"], "has 3 settings in all; leave --search out"),
        (["cfg.meta.learning_rate=0.1..5", "cfg.num_stepz=1,2"], "--vary gives cfg.num_stepz=1,"),
        (["cfg.estimator.truncation=1..3"], "--vary gives cfg.estimator.truncation=3, which is"),
        ([], "--vary is missing"),
    ],
)
def test_wrong_searches_are_refused_before_anything_runs(vary, message):
    with pytest.raises(ValueError, match=message):
        Search(SMALL, vary, 1, 3)


def test_a_search_ends_where_all_is_tried_and_stops_where_a_run_fails(fake, capsys):
    folder, run = fake
    search = Search(SMALL, ["cfg.num_steps=1..3", "cfg.optimizer.momentum=0.25,0.5"], 1, 20)
    seen = []
    while runs := search.ask():
        seen += [tuple(run.values.values()) for run in runs]
        search.tell([1.0] * len(runs))
    assert sorted(seen) == [(x, y) for x in "123" for y in ("0.25", "0.5")]
    for words, message in (
        (("--random=3",), "--random=3 and --search=14"),
        (("--index=0",), "--index=0 and --search=14"),
        (("--plan",), "--plan cannot know"),
    ):
        with pytest.raises(ValueError, match=message):
            run(*words, shared=SEARCH)
    first = Search(SMALL, ["cfg.meta.learning_rate=0.01..10"], 2, 14).ask()[2].name
    (folder / first / "metrics.jsonl").mkdir(parents=True)  # In its way.
    assert run(shared=SEARCH) == 1
    assert f"{first} ended with exit code 1" in capsys.readouterr().err
    assert len(list(folder.glob("*/sweep_status.json"))) == 7  # Nothing of the second round.


def test_without_optuna_a_search_says_what_to_install(fake, monkeypatch):
    _, run = fake
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ValueError, match=r"pip install '\.\[search\]'"):
        run(shared=SEARCH)


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
