"""Whole jobs as a user runs them: real processes, real signals, real files."""

import json
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from safetensors.numpy import load_file

from launch import choices, environment, loop, train, workdir
from launch import config as cfg
from launch.compiled_programs import keep_compiled_programs
from launch.job import build, describe
from launch.lease import claim
from launch.loop import EXIT_NONFINITE
from launch.stopping import EXIT_PREEMPTED
from launch.train import exit_code
from learned_opt import weights
from meta_train import devices
from meta_train.checkpoint import Checkpoints
from tasks import TaskMixture
from tasks.dynamics import mujoco_physics
from tests import commands, jobs
from tests.systems import some_fast

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
NUM_STEPS = 700


def command(workdir, *flags, num_steps=NUM_STEPS, module="launch.train"):
    # An estimator of whole episodes has no truncation.
    whole = "--cfg.estimator=reversible" in flags
    small = [word for word in SMALL if not (whole and "truncation" in word)]
    return [
        sys.executable,
        "-m",
        module,
        f"--workdir={workdir}",
        f"--cfg.num_steps={num_steps}",
        *small,
        *flags,
    ]


def environment_of_commands():
    # The job makes its own devices, and finds its own cache, whatever this test process has.
    ours = ("JAX_NUM_CPU_DEVICES", "XLA_FLAGS", "JAX_COMPILATION_CACHE_DIR")
    env = {k: v for k, v in os.environ.items() if k not in ours}
    cache = os.environ["JAX_COMPILATION_CACHE_DIR"]
    return env | {"WANDB_MODE": "offline", "XDG_CACHE_HOME": cache}


def start(workdir, *flags, **kwargs):
    return subprocess.Popen(
        command(workdir, *flags, **kwargs),
        cwd=ROOT,
        env=environment_of_commands(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def run(workdir, *flags, **kwargs):
    done = subprocess.run(
        command(workdir, *flags, **kwargs),
        cwd=ROOT,
        env=environment_of_commands(),
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


def test_compiled_programs_are_kept(reference):
    """By default, in a folder of this kind of processor; the jobs below find them there."""
    (folder,) = Path(os.environ["JAX_COMPILATION_CACHE_DIR"], "learned-opt").iterdir()
    assert folder.name.startswith("xla-")
    assert [path for path in folder.glob("jit_*-cache") if path.stat().st_size > 10_000]


@pytest.mark.parametrize(
    ("before", "cache_home", "where"),
    [
        (None, "", "{home}/.cache/learned-opt/xla-"),
        (None, "relative", "{home}/.cache/learned-opt/xla-"),
        (None, "{home}/caches", "{home}/caches/learned-opt/xla-"),
        (None, "/proc/nowhere", "None"),  # Nobody can write there.
        ("/elsewhere", "", "/elsewhere"),
    ],
)
def test_where_compiled_programs_are_kept(before, cache_home, where, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", cache_home.format(home=tmp_path))
    names = ("jax_compilation_cache_dir", "jax_compilation_cache_max_size")
    present = {name: jax.config.values[name] for name in names}
    try:
        jax.config.update("jax_compilation_cache_dir", before)
        keep_compiled_programs()
        kept = str(jax.config.values["jax_compilation_cache_dir"])
    finally:
        for name in names:
            jax.config.update(name, present[name])
    assert kept.startswith(where.format(home=tmp_path))
    assert not list(tmp_path.iterdir())  # JAX makes it, when there is something to keep.


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


def test_a_job_killed_and_then_told_to_stop_ends_as_if_never_stopped(tmp_path, reference):
    """Killed at a random moment; SIGTERM saves, and exits with a code of its own."""
    workdir, rng = tmp_path / "job", random.Random(0)
    process = start(workdir)
    wait_for_progress(process, workdir, 100 * rng.random())
    time.sleep(rng.random() * 0.3)  # Anywhere between two flushes, or inside a save.
    assert process.poll() is None, process.communicate()[0]
    process.send_signal(signal.SIGKILL)
    process.communicate()

    process = start(workdir)
    wait_for_progress(process, workdir, 300)  # Rows are seen up to a second late.
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=120)[0]
    assert process.returncode == EXIT_PREEMPTED, output
    assert "Stopped and saved at outer step" in output
    stopped = len(rows(workdir))
    saved = max(int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdigit())
    assert saved == stopped < NUM_STEPS  # Nothing done is lost: the last step is the saved one.
    done = run(workdir)
    assert done.returncode == 0, done.stderr
    assert_same_outcome(workdir, reference)


@pytest.mark.slow  # At a later moment: the test before.
def test_killed_during_startup(tmp_path, reference):
    process = start(tmp_path / "job")
    while not (tmp_path / "job" / "checkpoints").exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert run(tmp_path / "job").returncode == 0
    assert_same_outcome(tmp_path / "job", reference)


@pytest.mark.slow  # In one process: `tests/test_processes.py`.
def test_resume_on_another_number_of_devices(tmp_path, reference):
    workdir = tmp_path / "job"
    shutil.copytree(reference, workdir)
    done = run(workdir, "--cfg.num_devices=1", num_steps=NUM_STEPS + 20)
    assert done.returncode == 0, done.stderr
    assert len(rows(workdir)) == NUM_STEPS + 20


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


def test_a_second_process_on_a_running_job_is_refused(reference):
    with claim(reference):
        done = run(reference)
    assert done.returncode == 2
    assert "is in use by another process" in done.stderr


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


REFUSED = [
    (["--cfg.estimator=pess"], "--cfg.estimator must be one of artbp, bptt"),
    (["--preset=nope"], "--preset must be one of controller, default, demo"),
    (
        ["--cfg.inner.horizon=21"],
        "inner.horizon must be a multiple of the estimator's `truncation`",
    ),
    (
        ["--cfg.estimator=guided_es", "--cfg.estimator.num_surrogates=9999"],
        "`num_surrogates` must be at most the size of theta",
    ),
    (["--cfg.estimator=reversible"], "`learned_optimizer` must have a reversible form"),
    (["--cfg.task.dataset=cifar10"], "tfds.builder('cifar10'"),
    (["--steps=1"], "unknown flag --steps; the flags are: --coordinator_address, --data_dir"),
    (["stray"], "every option is --name=value"),
    (["--cfg.num_steps=99999999999"], "--cfg.num_steps must be at most 2147483647, got"),
    (["--cfg.wandb_project=a/b"], "--cfg.wandb_project must be a name of 1 to 128 characters"),
    (["--cfg.task.hidden_sizes=(1e9,)"], "a size asked for is beyond this machine"),
    (["--cfg.optimizer.hidden_sizes=(99999999999,9)"], "a size asked for is beyond this machine"),
]


@pytest.fixture(scope="module")
def refusals(tmp_path_factory):
    """Of each command the exit code, what it said, and its folder."""
    folder = tmp_path_factory.mktemp("refused")
    given = [command(folder / f"job{i}", *flags)[2:] for i, (flags, _) in enumerate(REFUSED)]
    env = environment_of_commands() | {"PYTHONPATH": str(ROOT)}
    found = commands.one_by_one(folder, given, env, folder)
    return [(said.code, said.error, folder / f"job{i}") for i, said in enumerate(found)]


@pytest.mark.parametrize("case", range(len(REFUSED)), ids=lambda case: REFUSED[case][0][0])
def test_bad_input_is_refused_before_any_compute(refusals, case):
    code, said, workdir = refusals[case]
    assert code not in (0, EXIT_PREEMPTED)
    assert REFUSED[case][1] in said, said
    assert not workdir.exists()


# In one process: `tests/contracts/estimators.py` trains it, `test_weights.py` saves its optimizer.
@pytest.mark.slow
def test_reversible_estimator_trains_and_exports(tmp_path):
    import jax
    import jax.numpy as jnp
    import optax

    import learned_opt

    names = ["--cfg.estimator=reversible", "--cfg.optimizer=reversible_mlp"]
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
    assert "inner steps in total     28,000" in done.stdout  # 700 x 8 runs x 5 steps.
    assert "pairs per device         2" in done.stdout
    assert "memory of a step         not asked for: --measure_memory" in done.stdout
    assert not (tmp_path / "job").exists()


def test_a_plan_compiles_only_when_asked(capsys):
    job = build(jobs.SMALL, None)
    without = job._replace(step=None)  # Whoever compiled would fail.
    assert "--measure_memory compiles the step (one program)" in describe(without)
    assert capsys.readouterr().err == ""
    plan = describe(job, measure_memory=True)
    assert re.search(r"memory of a step +[\d.]+ MiB temporary, [\d.]+ MiB state, per device", plan)
    assert capsys.readouterr().err == "Compiling the training step, one program ...\n"


def test_a_finished_job_says_how_it_went_and_what_next(toys, tmp_path, monkeypatch, capsys):
    outcome = jobs.run(tmp_path, num_steps=40, log_every=3)
    assert capsys.readouterr().err.splitlines()[:2] == [
        "Compiling the training step, one program ...",
        "Compiling the evaluation of theta ...",
    ]
    monkeypatch.setattr(train, "DATA_DIR", SimpleNamespace(value="my data"))
    text = train.ending(jobs.changed(num_steps=40), tmp_path, outcome)
    late = [row["meta_loss"] for row in jobs.rows(tmp_path) if row["step"] > 36]
    assert len(late) == 2  # 39 and 40.
    first, took, exported, *_ = text.splitlines()
    assert first == (
        f"meta-loss    {late[-1]:.4g} at outer step 40; {np.mean(late):.4g} is the mean of the "
        "logged ones in the last tenth"
    )
    assert re.fullmatch(r"took         \d+ s, compiling included", took)
    assert exported == f"optimizer    {tmp_path / 'optimizer'}"
    command = shlex.split(text.splitlines()[-1])
    assert command == [
        *("python", "-m", "launch.evaluate"),
        f"--optimizer={tmp_path / 'optimizer'}",
        f"--workdir={tmp_path / 'evaluation'}",
        "--data_dir=my data",
    ]
    # A loss that was not finite is null in the file.
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 41, "meta_loss": null, "time/wall_seconds": 1.0}\n')
    assert "meta-loss    nan at outer step 41" in train.ending(jobs.SMALL, tmp_path, outcome)
    # A mixture is no task to evaluate on.
    mixed = jobs.changed(task=TaskMixture(tasks=(jobs.SMALL.task, cfg.task("quadratic", dim=2))))
    said = " ".join(train.next_steps(mixed, tmp_path))
    assert "--suite=validation" in said and "--import" not in said and "_best" not in said
    (tmp_path / "optimizer_best").mkdir()
    assert "optimizer_best" in " ".join(train.next_steps(mixed, tmp_path))
    assert (
        train.next_steps(
            jobs.changed(trains="network", inner={"horizon": 1}, estimator={"truncation": 1}),
            tmp_path,
        )
        == []
    )
    outside = {"task": {"name": "mine:waves"}, "x": [{"name": "mlp"}, {"name": "ours:opt"}]}
    assert choices.modules_outside(outside) == ["mine", "ours"]


@pytest.fixture
def toys(monkeypatch):
    """Jobs of this process are toys: with everything but inner training."""
    monkeypatch.setattr(loop, "build", jobs.toy)


SETTINGS = {
    "jax_enable_x64": True,
    "jax_explicit_x64_dtypes": "allow",
    "jax_default_prng_impl": "rbg",
    "jax_threefry_partitionable": False,
    "jax_random_seed_offset": 1,
    "jax_high_dynamic_range_gumbel": True,
    "jax_default_matmul_precision": "highest",
    "jax_numpy_dtype_promotion": "strict",
    "jax_softmax_custom_jvp": True,
    "jax_platforms": "",
}


@pytest.fixture(scope="module")
def toy_job(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy") / "job"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "build", jobs.toy)
        jobs.run(folder)
    return folder


@pytest.mark.parametrize("name", [*environment.DECIDING, "backend"])
def test_another_environment_is_refused(toy_job, name, toys, monkeypatch):
    """Each setting that decides numbers: named, with what to set, and nothing is changed."""
    before = jobs.contents(toy_job)
    decided = json.loads((toy_job / "config.json").read_text())["environment"]["decides"]
    if name == "backend":
        monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    else:
        here = environment._setting(name)  # Not JAX's default, where the suite runs in double.
        assert here == decided[name]
        other = SETTINGS[name] if here == environment.DECIDING[name] else environment.DECIDING[name]
        jax.config.update(name, other)
    try:
        with pytest.raises(ValueError, match=f"{name}: the checkpoint has ") as error:
            jobs.run(toy_job, num_steps=16)
    finally:
        if name != "backend":
            jax.config.update(name, here)
    variable = "JAX_PLATFORMS=cpu" if name == "backend" else name.upper()
    assert variable in str(error.value)
    assert jobs.contents(toy_job) == before
    # Older checkpoints are taken to be of JAX's defaults.
    now = {"decides": {name: "other"}, "rounds": {}}
    assert len(environment.contradictions(now, None)) == (name != "backend")


def test_what_only_rounds_is_said_once(toy_job, tmp_path, toys, monkeypatch, capsys):
    copy = shutil.copytree(toy_job, tmp_path / "job")
    monkeypatch.setenv("XLA_FLAGS", "--xla_of_another_kind")
    jobs.run(copy, num_steps=16)
    notes = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note")]
    assert len(notes) == 1 and "XLA_FLAGS was " in notes[0] and "'--xla_of_another" in notes[0]
    jobs.run(copy, num_steps=20)
    assert "note" not in capsys.readouterr().err


def test_perturbations_that_are_lost_are_said_once(toys, tmp_path, capsys, monkeypatch):
    """By each process of the job; by none while most of theta is still moved."""

    def warnings(**parts):
        jobs.run(tmp_path / f"{len(parts)}", **parts)
        return [line for line in capsys.readouterr().err.splitlines() if "warning" in line]

    assert warnings() == []
    small = {"estimator": {"sigma": 1e-9}}
    for num_steps in (4, 8):
        (line,) = warnings(num_steps=num_steps, **small)
        step = num_steps - 3
        assert line.startswith(f"warning: at outer step {step}, 100% of theta's entries are")
        assert "sigma=1e-09" in line and "--cfg.estimator.sigma" in line
    assert json.loads((tmp_path / "2" / "metrics.jsonl").read_text().splitlines()[0])["unperturbed"]
    monkeypatch.setattr(loop, "UNPERTURBED", 1.0)
    assert warnings(num_steps=4, seed=1, **small) == []


def test_the_mean_of_theta_is_what_is_exported(tmp_path):
    """By the checkpoints' thetas, which move as without it; also in a job that was continued."""
    settings = {"checkpoint_every": 1, "keep_checkpoints": 9, "eval_every": 0}
    average = {"average": 0.75, "learning_rate": 0.1}
    jobs.run(tmp_path / "job", num_steps=3, meta=average, **settings)
    jobs.run(tmp_path / "job", num_steps=6, meta=average, **settings)
    jobs.run(tmp_path / "plain", num_steps=6, meta={"learning_rate": 0.1}, **settings)
    spec = devices.host_like(jax.eval_shape(build(jobs.changed(meta=average), None).init))
    checkpoints = Checkpoints(tmp_path / "job", read_only=True)
    thetas = np.stack([checkpoints.restore(step, spec).theta for step in range(7)])
    mean = thetas[0]
    for theta in thetas[1:]:
        mean = 0.75 * mean + 0.25 * theta
    exported = weights.load(tmp_path / "job" / "optimizer")[1]
    np.testing.assert_allclose(ravel_pytree(exported)[0], mean, rtol=1e-5)
    assert np.max(np.abs(thetas[-1] - mean)) > 0.05
    plain = weights.load(tmp_path / "plain" / "optimizer")[1]
    np.testing.assert_array_equal(ravel_pytree(plain)[0], thetas[-1])


def test_evaluations_are_logged_and_a_resume_goes_on_counting(tmp_path, toys):
    every = {"log_every": 4, "eval_every": 3}
    workdir = tmp_path / "job"
    jobs.run(workdir, num_steps=7, **every)
    assert [row["step"] for row in rows(workdir)] == [3, 4, 6, 7]
    assert ["eval/mean_loss" in row for row in rows(workdir)] == [True, False, True, False]
    config = (workdir / "config.json").read_text()
    with pytest.raises(ValueError, match=r"is at outer step 7, past --cfg\.num_steps=5"):
        jobs.run(workdir, num_steps=5, **every)
    assert (workdir / "config.json").read_text() == config
    jobs.run(workdir, num_steps=9, **every)
    assert [row["step"] for row in rows(workdir)] == [3, 4, 6, 7, 8, 9]
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    seconds = [json.loads(line)["time/wall_seconds"] for line in lines]
    assert seconds == sorted(seconds)


def test_a_finished_job_that_is_run_again_begins_no_run_in_wandb(toys, tmp_path, monkeypatch):
    modes, real = [], loop.Tracker

    def tracker(*given, mode, **options):
        modes.append(mode)
        return real(*given, mode="disabled", **options)

    monkeypatch.setattr(loop, "Tracker", tracker)
    for num_steps in (4, 4, 6):
        jobs.run(tmp_path, num_steps=num_steps, wandb_mode="offline")
    assert modes == ["offline", "disabled", "offline"]


@pytest.mark.parametrize("name", [*workdir._FILES, *workdir._FOLDERS, "lock"])
def test_a_folder_where_a_job_has_a_file_is_refused(toys, tmp_path, name):
    """And a file where it has a folder: before anything is computed or written."""
    if name in workdir._FOLDERS:
        (tmp_path / name).write_text("mine")
    else:
        (tmp_path / name).mkdir()
    with pytest.raises(ValueError, match=rf"^`workdir` .*{name}.* (move it away|give another)"):
        jobs.run(tmp_path, num_steps=4)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_longer_cosine_job_is_refused_with_the_reason(toys, tmp_path):
    meta = {"schedule": "cosine"}
    jobs.run(tmp_path, num_steps=4, meta=meta)
    reason = r"The learning rate follows --cfg.meta.schedule=cosine.*--cfg.init_from=.*/optimizer\)"
    with pytest.raises(ValueError, match=reason):
        jobs.run(tmp_path, num_steps=8, meta=meta)
    assert jobs.run(tmp_path, num_steps=4, meta=meta).step == 4


@pytest.mark.parametrize(
    ("num_steps", "patience", "expected"),
    [(50, 5, 6), (3, 5, 3), (7, 0, None)],
    ids=["patience", "short", "regardless"],
)
def test_a_job_without_a_finite_particle_stops(
    tmp_path, toys, num_steps, patience, expected, capsys
):
    """Its own exit code; saved, not exported."""
    settings = {
        "optimizer": {"learning_rate": 1e30},
        "nonfinite_patience": patience,
        "num_steps": num_steps,
        "eval_every": 0,
    }
    outcome = jobs.run(tmp_path, **settings)
    code, said = exit_code(outcome), capsys.readouterr().err
    if expected is None:
        assert code == 0 and outcome.step == num_steps and (tmp_path / "optimizer").exists()
        return
    assert code == EXIT_NONFINITE and outcome.step == expected
    assert f"no particle was finite in the last {expected} outer steps" in said
    (line,) = [x for x in said.strip().splitlines() if not x.startswith("Compiling ")]
    assert line.startswith("error: ")
    assert (tmp_path / "checkpoints" / str(expected)).is_dir()
    assert not (tmp_path / "optimizer").exists()
    again = jobs.run(tmp_path, **settings | {"num_steps": 60})  # A requeue does not forget.
    assert again.step == expected + (expected < patience) * 3 and again.diagnosis


def test_a_diverging_learned_optimizer_stops_the_job(tmp_path):
    """The real thing: at a learning rate of 1e30 every loss overflows."""
    outcome = jobs.run(
        tmp_path, optimizer={"learning_rate": 1e30}, nonfinite_patience=5, eval_every=0
    )
    assert outcome.diagnosis.startswith("no particle was finite in the last ")
    assert all(row["nonfinite_count"] == 2 for row in jobs.rows(tmp_path))


def test_successive_steps_draw_differently(tmp_path):
    """With theta held still and every step a new episode, equal draws would give equal rows."""
    still = {
        "meta": {"learning_rate": 1e-30},
        "inner": {"horizon": 4},
        "eval_every": 0,
        "num_steps": 6,
    }
    jobs.run(tmp_path / "job", **still)
    jobs.run(tmp_path / "job", **still | {"num_steps": 12})  # Nor does a resume draw again.
    found = jobs.rows(tmp_path / "job")
    assert len(found) == 12
    assert len({row["theta_norm"] for row in found}) == 1
    for name in ("meta_loss", "meta_grad_norm", "meta_grad_spread"):
        assert len({row[name] for row in found}) == 12, name


def test_rates_are_of_steps_alone(tmp_path, toys, monkeypatch):
    """Evaluations and saves of 0.2 s each are in no row's rate, whatever the logging interval."""

    def slow(config, data_dir=None):
        job = jobs.toy(config)

        def evaluate(theta):
            time.sleep(0.2)
            return job.evaluate(theta)

        return job._replace(evaluate=evaluate)

    monkeypatch.setattr(loop, "build", slow)
    to_host = devices.to_host
    monkeypatch.setattr(devices, "to_host", lambda *a: time.sleep(0.2) or to_host(*a))
    outcome = jobs.run(tmp_path, num_steps=40, log_every=3, checkpoint_every=7)
    assert outcome.step == 40
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    inner_steps = 4 * 4  # Particles times truncation.
    steps = np.diff([0] + [row["step"] for row in lines])
    seconds = steps * inner_steps / [row["time/inner_steps_per_second"] for row in lines]
    # 8 evaluations and 6 saves took at least 2.8 s of the time between these rows.
    assert lines[-1]["time/wall_seconds"] - lines[0]["time/wall_seconds"] > 2.0
    assert 0 < seconds.sum() < 0.8


@pytest.mark.parametrize(
    "module", some_fast(["train", "evaluate", "demo", "reproduce", "replay"], ("train",))
)
def test_interrupted_while_importing(module, tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-m", f"launch.{module}", f"--workdir={tmp_path / 'job'}"],
        cwd=ROOT,
        env=environment_of_commands(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # As from a terminal, also where these tests run in the background of a shell.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    # Python is up and the package begun: JAX is loaded early on, and takes long.
    maps = Path(f"/proc/{process.pid}/maps")
    while process.poll() is None and "jaxlib" not in maps.read_text():
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    said = "Interrupted; run again to continue."
    assert (process.returncode, output, errors.strip()) == (130, "", said)
    assert not (tmp_path / "job").exists()


def test_interrupted_while_compiling(tmp_path):
    process = start(tmp_path / "job")
    while not (tmp_path / "job" / "checkpoints" / "0").exists() and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    output = process.communicate(timeout=120)[0]
    assert process.returncode == EXIT_PREEMPTED, output
    assert "Traceback" not in output
    assert "Stopped and saved at outer step" in output


def test_a_path_flag_is_read_by_one_function(monkeypatch):
    """No flag of a command is a bare string but those known to be no path."""
    import importlib
    import pkgutil

    from absl import flags

    import launch
    from launch.path_flags import define_path, define_paths

    for module in pkgutil.iter_modules(launch.__path__):
        importlib.import_module(f"launch.{module.name}")
    strings = {
        flag.name
        for module, known in flags.FLAGS.flags_by_module_dict().items()
        for flag in known
        if module.startswith("launch.") and type(flag.parser) is flags.ArgumentParser
    }
    assert strings == {"coordinator_address", "import", "metric", "suite", "vary"}
    monkeypatch.setenv("HOME", "/home/ada")
    values = flags.FlagValues()
    define_path("folder", "", flag_values=values)
    define_paths("folders", "", flag_values=values)
    values(["command", "--folder=~/a", "--folders=~", "--folders=b"])
    assert values.folder == "/home/ada/a"
    assert values.folders == ["/home/ada", "b"]
    for wrong in ("", "~nobody-of-that-name/x"):
        with pytest.raises(flags.IllegalFlagValueError, match="--folder must "):
            values(["command", f"--folder={wrong}"])


@pytest.mark.parametrize("place", ["file/job", "file"])
def test_a_folder_that_cannot_be_made_is_refused(tmp_path, toys, place):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="must be a folder that can be written"):
        jobs.run(tmp_path / place)
    assert (tmp_path / "file").read_text() == ""


def test_a_missing_extra_is_named_before_anything_is_computed(tmp_path, monkeypatch):
    """Whether or not it is installed here: the simulator's module is looked for under no name."""
    monkeypatch.setitem(mujoco_physics.NEEDED, "no_such_module", "mujoco-mjx")
    mujoco_physics.gymnasium_model.cache_clear()
    with pytest.raises(
        ValueError, match=r"mujoco-mjx missing\); .*make setup EXTRAS=control.*\[co"
    ):
        loop.run(cfg.load_preset("swimmer"), tmp_path)
    assert not list(tmp_path.iterdir())
