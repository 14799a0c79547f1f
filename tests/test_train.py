"""Whole jobs as a user runs them: real processes, real signals, real files."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from launch.loop import EXIT_PREEMPTED
from meta_train.tracking import _open_cut_back

ROOT = Path(__file__).parent.parent
SMALL = [
    "--cfg.task.hidden_sizes=(8,)",
    "--cfg.task.batch_size=8",
    "--cfg.optimizer.hidden_sizes=(8,)",
    "--cfg.estimator.num_particles=8",
    "--cfg.estimator.truncation=5",
    "--cfg.inner.horizon=20",
    "--cfg.inner.min_horizon=10",
    "--cfg.checkpoint_every=40",
    "--cfg.log_every=1",
    "--cfg.eval_every=100",
    "--cfg.num_devices=2",
]
NUM_STEPS = 1500


def command(workdir, *flags, num_steps=NUM_STEPS, module="launch.train"):
    return [
        sys.executable,
        "-m",
        module,
        f"--workdir={workdir}",
        f"--cfg.num_steps={num_steps}",
        *SMALL,
        *flags,
    ]


def environment():
    # The job makes its own devices, whatever this test process has.
    env = {k: v for k, v in os.environ.items() if k not in ("JAX_NUM_CPU_DEVICES", "XLA_FLAGS")}
    return env | {"WANDB_MODE": "offline"}


def start(workdir, *flags, **kwargs):
    return subprocess.Popen(
        command(workdir, *flags, **kwargs),
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def run(workdir, *flags, **kwargs):
    done = subprocess.run(
        command(workdir, *flags, **kwargs),
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=600,
    )
    return done


def rows(workdir):
    """Rows of metrics.jsonl without the timings."""
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [
        {k: v for k, v in json.loads(line).items() if not k.startswith("time/")} for line in lines
    ]


def theta(workdir):
    return load_file(workdir / "optimizer" / "theta.safetensors")


def assert_same_outcome(workdir, reference):
    assert rows(workdir) == rows(reference)
    assert [row["step"] for row in rows(workdir)] == list(range(1, NUM_STEPS + 1))
    a, b = theta(workdir), theta(reference)
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name])


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("reference") / "job"
    done = run(workdir)
    assert done.returncode == 0, done.stderr
    return workdir


def progress(workdir):
    """Outer steps in metrics.jsonl so far."""
    path = workdir / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def wait_for_progress(process, workdir, goal):
    """Until that many outer steps are in metrics.jsonl, or the process ended."""
    deadline = time.monotonic() + 300
    while process.poll() is None and progress(workdir) < goal:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def kill_and_resume(workdir, num_kills, seed):
    """Kills the job at random moments, then lets it finish."""
    rng = random.Random(seed)
    for kill in range(num_kills):
        process = start(workdir)
        goal = NUM_STEPS * (kill + rng.random()) / (num_kills + 1)
        wait_for_progress(process, workdir, goal)
        time.sleep(rng.random() * 0.3)  # Anywhere between two flushes, or inside a save.
        assert process.poll() is None, process.communicate()[0]
        process.send_signal(signal.SIGKILL)
        process.communicate()
    done = run(workdir)
    assert done.returncode == 0, done.stderr


def test_killed_job_ends_as_if_never_stopped(tmp_path, reference):
    kill_and_resume(tmp_path / "job", num_kills=2, seed=0)
    assert_same_outcome(tmp_path / "job", reference)


@pytest.mark.slow
def test_killed_ten_times(tmp_path, reference):
    kill_and_resume(tmp_path / "job", num_kills=10, seed=1)
    assert_same_outcome(tmp_path / "job", reference)


def test_killed_during_startup(tmp_path, reference):
    process = start(tmp_path / "job")
    while not (tmp_path / "job" / "checkpoints").exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert run(tmp_path / "job").returncode == 0
    assert_same_outcome(tmp_path / "job", reference)


def test_sigterm_saves_and_exits_with_its_own_code(tmp_path, reference):
    workdir = tmp_path / "job"
    process = start(workdir)
    wait_for_progress(process, workdir, 200)
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=120)[0]
    assert process.returncode == EXIT_PREEMPTED, output
    assert "Stopped and saved at outer step" in output
    stopped = len(rows(workdir))
    saved = max(int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdigit())
    assert saved == stopped < NUM_STEPS  # Nothing done is lost: the last step is the saved one.
    assert run(workdir).returncode == 0
    assert_same_outcome(workdir, reference)


def test_resume_on_another_number_of_devices(tmp_path, reference):
    import shutil

    workdir = tmp_path / "job"
    shutil.copytree(reference, workdir)
    done = run(workdir, "--cfg.num_devices=1", num_steps=NUM_STEPS + 20)
    assert done.returncode == 0, done.stderr
    assert len(rows(workdir)) == NUM_STEPS + 20


def test_evaluations_are_logged_and_a_resume_goes_on_counting(tmp_path):
    flags = ["--cfg.log_every=4", "--cfg.eval_every=3"]
    workdir = tmp_path / "job"
    assert run(workdir, *flags, num_steps=7).returncode == 0
    assert [row["step"] for row in rows(workdir)] == [3, 4, 6, 7]
    assert ["eval/mean_loss" in row for row in rows(workdir)] == [True, False, True, False]
    config = (workdir / "config.json").read_text()
    done = run(workdir, *flags, num_steps=5)
    assert done.returncode == 2
    assert "is at outer step 7, past --cfg.num_steps=5" in done.stderr
    assert (workdir / "config.json").read_text() == config
    assert run(workdir, *flags, num_steps=9).returncode == 0
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    seconds = [json.loads(line)["time/wall_seconds"] for line in lines]
    assert seconds == sorted(seconds)


def test_contradicting_configuration_is_refused(reference):
    # What a killed job left half-written, or a living one is writing.
    unfinished = reference / "checkpoints" / "7.orbax-checkpoint-tmp-1" / "state"
    unfinished.mkdir(parents=True)
    (unfinished / "part").write_text("half")
    before = {p: p.stat().st_mtime_ns for p in reference.rglob("*") if p.is_file()}
    done = run(reference, "--cfg.estimator.sigma=0.5", "--cfg.seed=3")
    assert done.returncode == 2
    assert "--cfg.estimator.sigma: the checkpoint has 0.01, this command 0.5" in done.stderr
    assert "--cfg.seed: the checkpoint has 0, this command 3" in done.stderr
    assert "Traceback" not in done.stderr
    assert before == {p: p.stat().st_mtime_ns for p in reference.rglob("*") if p.is_file()}


def test_a_second_process_on_a_running_job_is_refused(tmp_path):
    first = start(tmp_path / "job", num_steps=10**6)
    try:
        wait_for_progress(first, tmp_path / "job", 1)
        done = run(tmp_path / "job", num_steps=10**6)
        assert done.returncode == 2
        assert "is in use by another process" in done.stderr
        assert first.poll() is None
    finally:
        first.kill()
        first.communicate()


def test_wandb_run_holds_the_metrics(reference):
    (run_file,) = reference.glob("wandb/offline-run-*/run-*.wandb")
    wandb = Path(sys.executable).parent / "wandb"
    deadline = time.monotonic() + 60
    while True:  # W&B's writer may finish a moment after the job.
        done = subprocess.run(
            [wandb, "leet", "inspect", run_file, "--json"], capture_output=True, text=True
        )
        history = [line for line in done.stdout.splitlines() if '"meta_loss"' in line]
        if len(history) >= NUM_STEPS or time.monotonic() > deadline:
            break
        time.sleep(1)
    assert done.returncode == 0, done.stderr
    last = json.loads((reference / "metrics.jsonl").read_text().splitlines()[-1])
    for name in last:
        assert name in done.stdout, name
    assert {
        "meta_loss",
        "meta_grad_norm",
        "meta_grad_spread",
        "theta_norm",
        "update_norm",
        "nonfinite_count",
        "total_inner_steps",
        "time/inner_steps_per_second",
        "time/wall_seconds",
    } <= set(last)
    assert len(history) >= NUM_STEPS


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--cfg.estimator.name=pess"], "--cfg.estimator.name must be one of ['artbp', 'bptt'"),
        (["--cfg.task.name=mnist"], "--cfg.task.name must be one of ['mlp', 'quadratic']"),
        (["--preset=nope"], "--preset must be one of ['default', 'demo'"),
        (["--cfg.inner.horizon=21"], "`horizon` must be a positive multiple of `truncation`"),
        (["--cfg.estimator.num_particles=7"], "must be even for the antithetic estimator"),
        (
            ["--cfg.estimator.name=reparam_es", "--cfg.estimator.num_particles=12"],
            "must be whole groups for 'reparam_es', a multiple of 16, got 12. Try 16.",
        ),
        (
            ["--cfg.estimator.name=reparam_es", "--cfg.estimator.pairs_per_group=3"],
            "--cfg.estimator.pairs_per_group must be even and at least 4, got 3",
        ),
        (
            ["--cfg.estimator.name=gpes", "--cfg.estimator.noise_period=7"],
            "noise_period must be a multiple of --cfg.estimator.truncation=5",
        ),
        (
            ["--cfg.estimator.name=guided_es", "--cfg.estimator.num_surrogates=9999"],
            "`num_surrogates` must be at most the size of theta",
        ),
        (["--cfg.estimator.guided_alpha=0"], "guided_alpha must be above 0 and at most 1"),
        (["--cfg.estimator.name=reversible"], "--cfg.optimizer.name one of ['reversible_mlp']"),
        (["--cfg.estimator.sigma=0"], "`cfg.estimator.sigma` must be a finite number above 0"),
        (["--cfg.task.dataset=cifar10"], "tfds.builder('cifar10'"),
        (
            ["--cfg.estimator.sigmaa=1"],
            "no field 'sigmaa'; its fields are: name, num_particles",
        ),
        (["--steps=1"], "unknown flag --steps; the flags are: --cfg, --data_dir"),
        (["--cfg.task=mlp"], "--cfg.task has fields, set one of them: name,"),
        (["--cfg.task.hidden_sizes=(8.5,)"], "task.hidden_sizes must be whole numbers above 0"),
        (["--cfg.seed=99999999999999"], "--cfg.seed must be between 0 and 4294967295"),
        (["--cfg.meta.warmup=99999"], "--cfg.meta.warmup must be below --cfg.num_steps"),
        (["stray"], "every option is --name=value"),
    ],
)
def test_bad_input_is_refused_before_any_compute(tmp_path, flags, message):
    done = run(tmp_path / "job", *flags)
    assert done.returncode not in (0, EXIT_PREEMPTED)
    assert message in done.stderr, done.stderr
    assert not (tmp_path / "job").exists()


def test_reversible_estimator_trains_and_exports(tmp_path):
    import jax
    import jax.numpy as jnp
    import optax

    import learned_opt

    names = ["--cfg.estimator.name=reversible", "--cfg.optimizer.name=reversible_mlp"]
    done = run(tmp_path / "job", *names, "--cfg.inner.meta_loss=validation", num_steps=4)
    assert done.returncode == 0, done.stderr
    assert [row["exact"] for row in rows(tmp_path / "job")] == [1.0] * 4
    assert [row["total_inner_steps"] for row in rows(tmp_path / "job")] == [160, 320, 480, 640]
    optimizer, trained = learned_opt.load(tmp_path / "job" / "optimizer")
    first = learned_opt.load(tmp_path / "job" / "optimizer_initial")[1]
    moved = optax.tree.norm(optax.tree.sub(trained, first))
    assert 0 < moved < 0.1  # four steps of Adam at 1e-3
    transform = optimizer.bind(trained, num_steps=10)
    params = {"w": jnp.ones((3, 2))}
    updates, _ = jax.jit(transform.update)(params, transform.init(params))
    assert 0 < optax.tree.norm(updates) < 1


def test_dry_run_prints_the_plan(tmp_path):
    done = run(tmp_path / "job", "--dry_run")
    assert done.returncode == 0, done.stderr
    assert "inner steps in total     60,000" in done.stdout  # 1,500 x 8 runs x 5 steps.
    assert "pairs per device         2" in done.stdout
    assert "memory of a step" in done.stdout
    assert not (tmp_path / "job").exists()


def test_evaluate_command(tmp_path, reference):
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "launch.evaluate",
            f"--optimizer={reference / 'optimizer'}",
            f"--workdir={tmp_path}",
            "--seeds=2",
            "--horizons=10,20",
        ],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    document = json.loads((tmp_path / "evaluation.json").read_text())
    assert set(document["results"]) == {"10", "20"}
    assert len(document["learning_rates_swept"]) >= 12
    assert document["task"]["hidden_sizes"] == [8]  # That of training.
    names = [entry["name"] for entry in document["results"]["20"]]
    assert names == ["job/optimizer", "adam", "sgdm"]
    for entry in document["results"]["20"]:
        assert np.shape(entry["losses"]) == (2, 20)
    assert (tmp_path / "evaluation.png").read_bytes()[:4] == b"\x89PNG"


def test_metrics_are_cut_back(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": i}) + "\n" for i in range(1, 8)) + '{"step": 8, "m')
    file, last = _open_cut_back(path, 5)
    with file:
        file.write('{"step": 6}\n')
    assert last == {"step": 5}
    assert [json.loads(line)["step"] for line in path.open()] == [1, 2, 3, 4, 5, 6]
