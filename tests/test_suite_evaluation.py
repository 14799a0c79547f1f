"""Evaluation on suites: fair sweeps, closed forms of what is averaged, and nothing lost."""

import csv
import dataclasses
import gc
import hashlib
import html.parser
import io
import json
import pickle
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import stats

from launch import config as cfg
from launch import suites, trained
from launch.choices import to_dict
from launch.evaluation import SEED, aggregates, kept, page, report, sweep
from launch.evaluation import suite as command
from launch.evaluation.aggregates import Interval
from launch.evaluation.baselines import BASELINES, BUILDERS, EVALUATED, Setting, theta_of
from launch.evaluation.contenders import contender
from launch.evaluation.on_suite import OUTPUTS
from launch.evaluation.on_suite import evaluate as evaluate_suite
from launch.evaluation.optlist import OPTLIST
from launch.evaluation.runs import BLOCK, POINTS, Runner, Starts, part_edges
from launch.suites import Suite, suite
from learned_opt import LearnedOptimizer
from learned_opt.base import learned_optimizer
from meta_train import evaluate, pool
from tasks import TaskMixture, quadratic_family

TASK = quadratic_family(dim=4, noise=0.05)


def stacked(settings):
    return jax.tree.map(lambda *x: jnp.stack(x), *[theta_of(s) for s in settings])


def runner(name, width, task=TASK):
    baseline = BASELINES[name]
    evaluated = EVALUATED.get(baseline.builder)
    return Runner(Starts(task), baseline.optimizer(), width, evaluated=evaluated, quick=True)


def test_interquartile_mean_drops_a_quarter_at_each_end():
    assert aggregates.interquartile_mean(np.array([[1, 2, 3, -900], [4, 5, 6, 1e9]])) == 3.5
    assert Interval(0.1, -1.0, 1.0).sign == 0
    assert Interval(-1.0, -2.0, -0.1).sign == -1 and Interval(1.0, 0.1, 2.0).sign == 1


def test_bootstrap_covers_the_truth():
    """Of normal tasks and seeds the interval holds the mean in most repetitions, not in all."""
    random, covered = np.random.default_rng(0), 0
    for repetition in range(200):
        values = random.normal(size=(20, 1)) + 0.5 * random.normal(size=(20, 3))
        found = aggregates.bootstrap(values, seed=repetition)
        covered += found.low <= 0 <= found.high
        assert found.estimate == pytest.approx(aggregates.interquartile_mean(values))
    assert 0.88 * 200 <= covered <= 0.99 * 200
    # A difference that is the same in every run has no width; runs differ by far more.
    values = random.normal(size=(6, 4))
    same = aggregates.paired(values - 0.25, values)
    assert same[:3] == pytest.approx((-0.25,) * 3) and same.tasks == 6 and same.sign == -1


@pytest.mark.parametrize("tasks", [1, 2, 3, 5, 6, 8, 12, 18])
def test_differences_of_nothing_are_seldom_claimed(tasks):
    """Of optimizers that are alike but for chance, at most one time in twenty."""
    random, repetitions = np.random.default_rng(tasks), 300
    claimed = 0
    for repetition in range(repetitions):
        values = random.normal(size=(tasks, 1)) + 0.3 * random.normal(size=(tasks, 5))
        found = aggregates.bootstrap(values, seed=repetition)
        claimed += found.sign != 0
    assert claimed <= 0.05 * repetitions + 3 * (0.05 * 0.95 * repetitions) ** 0.5
    assert (claimed > 0) == (tasks >= aggregates.LEAST_TASKS)
    assert found.tasks == (tasks if tasks > 1 else 5)
    assert aggregates.bootstrap(values[:1, :1])[1:] == (-np.inf, np.inf, 1)  # One run has none.


def test_bootstrap_draws_tasks_and_seeds():
    """The variance of a mean: that of the tasks, and that of the seeds in each."""
    values = np.arange(16.0)[:, None] * 10 + np.array([-40.0, 40.0])
    between, within = np.var(10 * np.arange(16)) / 16, 1600.0 / 32

    def width(values):
        found = aggregates.bootstrap(values, lambda x: x.mean(axis=1))
        # Its quantiles are those of a normal number at the tails that are taken.
        t = stats.t.ppf(0.975, found.tasks - 1) * (found.tasks / (found.tasks - 1)) ** 0.5
        return (found.high - found.low) / 2 / t

    assert width(values) == pytest.approx((between + within) ** 0.5, rel=0.1)
    seeds = np.linspace(-1, 1, 16)[None]  # One task: seeds alone.
    assert width(seeds) == pytest.approx(np.std(seeds) / 4, rel=0.1)


def test_log_loss_is_of_the_constant_and_has_a_ceiling():
    losses, constant = np.array([2.0, 0.0, 7.0, np.nan, np.inf, -1.0]), np.full(6, 2.0)
    expected = np.log([1.01, 0.01, 3.01, 3.01, 3.01, 0.01])
    np.testing.assert_allclose(aggregates.log_loss(losses, constant), expected)


def test_profile_and_its_score_by_hand():
    times = np.array([[1.0, 4.0, np.inf, np.inf], [2.0, 1.0, 5.0, np.inf]])
    ratios = np.array([1.0, 2.0, 4.0])
    expected = [[0.25, 0.25, 0.5], [0.5, 0.75, 0.75]]  # Ratios 1, 4, inf and 2, 1, 1.
    np.testing.assert_allclose(aggregates.profile(times, ratios), expected)
    np.testing.assert_allclose(aggregates.profile_score(times), [1 / 4, (2 / 3 + 1 + 1) / 4])
    fine = np.linspace(1, 4, 30001)
    area = aggregates.profile(times, fine).mean(axis=1)
    np.testing.assert_allclose(area, aggregates.profile_score(times), atol=1e-3)


def test_speed_up_interpolates_adam():
    steps, losses = aggregates.envelope(
        [(np.array([10, 20, 30]), np.array([4.0, 2.0, np.nan])), (np.array([15]), np.array([5.0]))]
    )
    np.testing.assert_array_equal(steps, [10, 15, 20, 30])
    np.testing.assert_array_equal(losses, [4, 4, 2, 2])  # The lowest so far.
    assert aggregates.steps_to(3.0, steps, losses) == 17.5
    assert aggregates.steps_to(9.0, steps, losses) == 10
    assert aggregates.steps_to(1.0, steps, losses) == np.inf
    assert aggregates.speed_up(3.0, 5, steps, losses) == 3.5
    assert aggregates.speed_up(1.0, 5, steps, losses) == 6  # A bound: as long as Adam ran.
    assert aggregates.speed_up(np.nan, 5, steps, losses) == 0

    assert [aggregates.is_bound(x, losses) for x in (3.0, 2.0, 1.0, np.nan)] == [0, 0, 1, 0]
    reached = [aggregates.reached_by(x, steps, losses) for x in (5, 15, 19, 20, 99)]
    assert reached == [4, 4, 4, 2, 2]
    curve = np.arange(40.0)
    expected = [np.mean(curve[max(0, i - 3) : i + 1]) for i in range(40)]
    np.testing.assert_allclose(aggregates.smoothed(curve), expected)


def test_the_data_of_a_task_decide():
    def facts(dataset):
        return command._Ground("x", cfg.task("linear", dataset=dataset), None, 1).facts["data"]

    assert facts("wine") == facts("wine") != facts("breast_cancer")


def test_whatever_a_task_from_outside_computes_decides(tmp_path, monkeypatch):
    """Numbers of a file, of a variable or the environment; not how it is written."""
    module = tmp_path / "mine_computes.py"
    monkeypatch.syspath_prepend(tmp_path)
    module.write_text(
        "import json, os, numpy as np\n"
        "from tasks import quadratic_family\n"
        "ARRAY, NUMBER = np.ones(3), [np.float32(2)]\n"
        "def make(dim: int = 2):\n"
        "    task, held = quadratic_family(dim=dim), json.load(open(os.environ['MINE']))\n"
        "    def loss(params, *given):\n"
        "        import mine_helper\n"
        "        factor = ARRAY.sum() * NUMBER[0] * held * float(os.environ['MINE_SIZE'])\n"
        "        return mine_helper.twice(factor) * task.loss(params, *given)\n"
        "    return task._replace(loss=loss, score=None)\n"
    )
    (tmp_path / "mine_helper.py").write_text("def twice(x): return 2 * x\n")
    (tmp_path / "held.json").write_text("1.0")
    monkeypatch.setenv("MINE", str(tmp_path / "held.json"))
    monkeypatch.setenv("MINE_SIZE", "1")
    config = cfg.task("mine_computes:make")
    mine = sys.modules["mine_computes"]

    def digest():
        return kept.digest_of_task(config.make())

    found = [digest()]
    assert digest() == found[0]
    (tmp_path / "held.json").write_text("3.0")
    found.append(digest())
    monkeypatch.setattr(mine, "ARRAY", np.full(3, 5.0))
    found.append(digest())
    mine.NUMBER[0] = np.float32(7)
    found.append(digest())
    monkeypatch.setenv("MINE_SIZE", "11")
    found.append(digest())
    monkeypatch.setattr(sys.modules["mine_helper"], "twice", lambda x: 4 * x)
    found.append(digest())
    assert len(set(found)) == len(found)
    with pytest.raises(ValueError, match="the task 'x' of a suite must have a `score`"):
        command._Ground("x", config, None, 1)


def test_what_an_optimizer_from_outside_computes_decides(monkeypatch):
    """Its steps, what theta starts from, and what a callback may compute."""
    held = {"rate": 0.1, "factor": 1.0}

    def plain(callback=False):
        def bind(theta, num_steps):  # An optimizer without extra arguments, as they may be.
            def update(updates, state, params=None):
                del params
                rate = theta["rate"] * held["factor"]
                if callback:
                    rate = jax.pure_callback(lambda r: r, jax.ShapeDtypeStruct((), "float32"), rate)
                return jax.tree.map(lambda g: -rate * g, updates), state

            return optax.GradientTransformation(lambda params: (), update)

        return LearnedOptimizer(lambda key: {"rate": jnp.float32(held["rate"])}, bind)

    def digest(**how):
        optimizer = plain(**how)
        return kept.digest_of_steps(TASK, optimizer, optimizer.init(jax.random.key(0)), 10)

    first, called = digest(), digest(callback=True)
    assert digest() == first and digest(callback=True) == called
    held["rate"] = 0.2
    second = digest()
    held["factor"] = 3.0
    assert len({first, second, digest()}) == 3
    held.update(rate=0.1, factor=1.0)
    monkeypatch.setattr(kept, "_source_of_others", lambda: b"edited")
    assert digest() == first and digest(callback=True) != called


def test_a_result_of_which_one_bit_is_wrong_is_computed_again(tmp_path, capsys):
    made, random = [], np.random.default_rng(0)

    def compute():
        made.append(1)
        return {"a": np.arange(700.0), "name": np.array("x")}

    expected = kept.kept(tmp_path, {"of": 1}, compute)
    (path,) = tmp_path.iterdir()
    sound = path.read_bytes()
    for place in [0, 40, len(sound) - 1, *random.integers(len(sound), size=60)]:
        damaged = bytearray(sound)
        damaged[place] ^= 1 << int(random.integers(8))
        path.write_bytes(damaged)
        found = kept.kept(tmp_path, {"of": 1}, compute)
        assert found.keys() == expected.keys()
        np.testing.assert_array_equal(found["a"], expected["a"])
    assert len(made) == 64 and capsys.readouterr().err.count("is damaged") == 63
    assert path.read_bytes() == sound and list(tmp_path.iterdir()) == [path]
    kept.kept(tmp_path, {"of": 1}, compute)
    assert len(made) == 64
    path.unlink()
    path.mkdir()
    with pytest.raises(ValueError, match="is a folder, where a result is to be kept"):
        kept.kept(tmp_path, {"of": 1}, compute)


def test_what_is_no_result_in_spite_of_its_digest_is_computed_again(tmp_path, capsys):
    def compute():
        return {"a": np.arange(3.0)}

    kept.kept(tmp_path, {"of": 1}, compute)
    (path,) = tmp_path.iterdir()
    sound = path.read_bytes()
    buffer = io.BytesIO()
    np.savez(buffer, a=np.arange(3.0))
    bare, packed = io.BytesIO(), io.BytesIO()
    np.save(bare, np.arange(3))
    np.savez_compressed(packed, settings=np.arange(99.0))
    broken = bytearray(packed.getvalue())
    broken[60:90] = bytes(30)
    contents = (b"", b"hello", b"PK\x03\x04", buffer.getvalue(), buffer.getvalue()[:-9])
    contents += (bare.getvalue(), bytes(broken))
    for content in (*contents, pickle.dumps({"settings": 1})):
        path.write_bytes(hashlib.sha256(content).digest() + content)
        np.testing.assert_array_equal(kept.kept(tmp_path, {"of": 1}, compute)["a"], np.arange(3.0))
        assert f"{path} is damaged; it is computed again" in capsys.readouterr().err
        assert path.read_bytes() == sound


def test_results_are_read_by_several_at_once(tmp_path):
    """While garbage is collected, which lets other threads in where Python expects none."""
    arrays = {f"a{i}": np.arange(3.0) for i in range(12)}
    kept.kept(tmp_path, {"of": 1}, lambda: arrays)

    def read(_):
        return kept.kept(tmp_path, {"of": 1}, lambda: pytest.fail("it is kept")).keys()

    def linger(phase, info):
        for _ in range(200):
            pass

    switch, threshold = sys.getswitchinterval(), gc.get_threshold()
    try:
        gc.callbacks.append(linger)
        gc.set_threshold(50, 5, 5)
        sys.setswitchinterval(1e-5)
        with ThreadPoolExecutor(4) as workers:
            assert all(keys == arrays.keys() for keys in workers.map(read, range(400)))
    finally:
        gc.callbacks.remove(linger)
        gc.set_threshold(*threshold)
        sys.setswitchinterval(switch)


def test_results_that_cannot_be_read_are_named(tmp_path, monkeypatch):
    """The superuser reads all, so reading is refused here."""
    kept.kept(tmp_path, {"of": 1}, lambda: {"a": np.arange(3.0)})

    def refuse(self):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(
        ValueError, match=r"part cannot be read \(Permission denied\); move it away"
    ):
        kept.kept(tmp_path, {"of": 1}, lambda: {"a": np.arange(3.0)})


@pytest.mark.parametrize(
    ("taken", "words", "message"),
    [
        ("suite.md/", [], "a file that can be written, got .*suite.md.: it is a folder"),
        ("evaluation.parts", [], "a folder that can be written, got .*evaluation.parts"),
        ("", ["--horizons=1073741825"], "--horizons must be whole numbers from 1 to 1,073,741,824"),
        ("", ["--horizons="], "--horizons must be whole numbers from 1 to 1,073,741,824"),
        ("", ["--trained_horizon=50000000"], "--trained_horizon must be .* at most 42949672, got"),
        ("", ["--baselines=none"], "--baselines=none leaves nothing to evaluate; add an --opt"),
        ("", ["--baselines=muon"], "must have adam, .* got 'muon'; add it, or give `none`"),
    ],
)
def test_what_could_not_be_run_or_written_is_refused_before(taken, words, message, tmp_path):
    """Nothing is run, and nothing written beside what is there."""
    if taken.endswith("/"):
        (tmp_path / taken).mkdir()
    elif taken:
        (tmp_path / taken).write_text("x")
    arguments = ["--suite=smoke", "--baselines=adam", f"--workdir={tmp_path}", *words]
    done = subprocess.run(
        [sys.executable, "-m", "launch.evaluate", *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 2 and re.search(message, done.stderr), done.stderr
    assert "Traceback" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ([taken.rstrip("/")] if taken else [])


def test_tasks_without_a_finite_loss_are_named(evaluated):
    """Of one split, and of training batches; one finite run is enough."""
    run, tasks = evaluated
    entries, broken = run(), next(iter(tasks))

    def spoiled(entry, split):
        bad = {"loss": np.full_like(entry.scores[split]["loss"], np.nan)}
        return entry._replace(scores=entry.scores | {split: bad})

    assert not any("finite loss" in x for x in report.warnings(report.summarize(entries, tasks)))
    some = [spoiled(e, "test") if e.task == broken else e for e in entries]
    (said,) = [
        x for x in report.warnings(report.summarize(some, tasks)) if "with a finite loss" in x
    ]
    assert f"on {broken} no run of any optimizer ends with a finite loss on the test split," in said
    at = next(i for i, e in enumerate(entries) if e.task == broken)
    some[at] = entries[at]
    assert not any("finite loss" in x for x in report.warnings(report.summarize(some, tasks)))
    nowhere = [e._replace(final=e.final * np.nan) if e.task == broken else e for e in entries]
    said = report.warnings(report.summarize(nowhere, tasks))
    assert any("with a finite loss on training batches, so it tells nothing" in x for x in said)


def test_results_are_written_by_several_at_once(tmp_path):
    """Whoever reads finds a whole one."""
    path = tmp_path / "x.txt"

    def write(number):
        for _ in range(50):
            kept.whole(path, lambda file: file.write(f"{number}" * 100_000))
            assert len(set(path.read_text())) == 1

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, range(4)))
    assert list(tmp_path.iterdir()) == [path]


def test_a_suite_of_ones_own(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "my_suite.py").write_text(
        "from launch.config import task\n"
        "from launch.suites import Suite, zoo_task\n"
        "MINE = Suite('mine', {'a': task('quadratic', dim=3), 'b': zoo_task('wine_mlp')}, (5,))\n"
        "EMPTY = Suite('mine', {}, (5,))\n"
        "ODD = Suite('mine', {'a': 3}, (5,))\n"
        "UNSORTED = Suite('mine', MINE.tasks, (5, 2))\n"
        "BARE = Suite('mine', MINE.tasks, 10)\n"
        "TRUE = Suite('mine', MINE.tasks, (True, 2))\n"
        "LONG = Suite('mine', MINE.tasks, (5, 2**30 + 1))\n"
        "BUILT = Suite('mine', {'a': MINE.tasks['a'].make()}, (5,))\n"
        "BROKEN = Suite('mine', {'a\\nb': task('quadratic')}, (5,))\n"
        "NUMBERED = Suite('mine', {1: task('quadratic')}, (5,))\n"
        "NUMBER = 3\n"
    )
    found = suites.find_suite("my_suite:MINE")
    assert list(found.tasks) == ["a", "b"] and found.horizons == (5,)
    for name, message in (
        ("my_suite:EMPTY", "whose `tasks` must be a dict of one or more tasks"),
        ("my_suite:ODD", "whose `tasks` must be a dict of one or more tasks"),
        (
            "my_suite:UNSORTED",
            "whose `horizons` must be whole numbers from 1 to 1,073,741,824 in inc",
        ),
        ("my_suite:BARE", "whose `horizons` must be whole numbers from 1 to .*, got 10"),
        ("my_suite:TRUE", "whose `horizons` must be whole numbers from 1 to 1,073,741,824 in inc"),
        ("my_suite:LONG", "whose `horizons` must be whole numbers from 1 to .*1073741825"),
        ("my_suite:BUILT", "launch.suites.zoo_task, got 'a' of type Task.$"),
        ("my_suite:BROKEN", r"whose tasks must have names of one line .*, got 'a\\nb'"),
        ("my_suite:NUMBERED", "whose tasks must have names of one line .*, got 1"),
        ("my_suite:NUMBER", "which must be a launch.suites.Suite .*, got one of type int"),
        ("my_suite:MIEN", "but my_suite has no 'MIEN'. Did you mean 'MINE'"),
        ("no_such_module:MINE", "names the module 'no_such_module'"),
        ("smokke", "or MODULE:NAME for one of your own, got 'smokke'. Did you mean 'smoke'"),
    ):
        with pytest.raises(ValueError, match=f"^--suite .*{message}"):
            suites.find_suite(name)


def test_what_a_suite_had_to_do_with_training_is_said():
    config = cfg.task("reparametrized", base=suites.zoo_task("smoke_mlp"))
    task, both = to_dict(config), to_dict(TaskMixture((config, cfg.task("quadratic"))))
    chosen = {"provenance": {"config": {"validation": "smoke"}}}
    smoke = suites.suite("smoke")
    judged, _ = trained.seen(chosen, smoke)
    assert "--cfg.validation=smoke" in judged and "no test of it" in judged
    for on in (task, both):
        assert trained.seen({"task": on}, smoke) == [
            "It was trained on tasks of this suite: smoke_mlp.",
            "It was trained on data of this suite: digits.",
        ]
    assert trained.seen({"task": task}, suites.suite("heldout")) == []
    (unknown,) = trained.seen({}, smoke)
    assert "not known in full" in unknown
    # One part of a mixture that is not imported hides no other.
    strange = {"task": {"name": "mixture", "tasks": [task, {"name": "no_such_module:it"}]}}
    assert trained.seen(strange, smoke) == [unknown, *trained.seen({"task": task}, smoke)]
    # What it began from was trained too, and what that began from.
    later = {"task": to_dict(cfg.task("quadratic")), "init_from": "there"}
    for before in ({"task": task}, {"task": later["task"], "began_from": {"task": task}}):
        assert trained.seen(later | {"began_from": before}, smoke) == trained.seen(
            {"task": task}, smoke
        )
    assert trained.seen(later | {"began_from": chosen}, smoke) == [judged, unknown]
    (begun,) = trained.seen(later, smoke)
    assert "began from there" in begun and "not recorded" in begun


def test_horizons_outside_those_of_training_are_said():
    drawn = {"horizon": 2000, "provenance": {"config": {"inner": {"min_horizon": 100}}}}
    (said,) = trained.beyond(drawn, [20, 100, 2000, 10000])
    assert said == "At 20 and 10,000 steps it works outside the 100 to 2,000 it was trained for."
    (said,) = trained.beyond({"horizon": 100}, [20, 100, 2000, 10000])
    assert said == "At 20, 2,000 and 10,000 steps it works outside the 100 it was trained for."
    (said,) = trained.beyond({"horizon": 40}, [20, 40])
    assert said == "At 20 steps it works outside the 40 it was trained for."
    assert trained.beyond(drawn, [400]) == [] and trained.beyond({}, [400]) == []


@pytest.mark.parametrize("name", ["adam", "schedule_free_adamw"])
def test_a_sweep_is_its_runs_one_at_a_time(name):
    """Over settings, schedules, seeds, filled-up chunks and blocks: those of a plain optax loop."""
    settings = (BASELINES[name].settings[8], BASELINES[name].settings[22])
    assert settings[0].schedule != settings[1].schedule
    horizon = BLOCK + 20
    run, keys = runner(name, 3), Starts(TASK).keys(7, 2)
    thetas = stacked([s for s in settings for _ in range(2)])
    found = run(thetas, jnp.tile(keys, len(settings)), horizon)
    assert found.curve.shape == (4, POINTS) and found.scores["test"]["loss"].shape == (4,)

    @jax.jit
    def alone(theta, key):
        key_init, key_data = jax.random.split(key)
        key_sample, key_params = jax.random.split(key_init)
        instance = TASK.sample(key_sample)
        params = TASK.init(instance, key_params)
        progress = jnp.arange(horizon) / horizon
        shapes = [jnp.ones(horizon), (1 + jnp.cos(jnp.pi * progress)) / 2]
        shapes.append(jnp.minimum(1.0, 10 * (jnp.arange(horizon) + 1) / horizon))
        rates = theta["value"] * jnp.stack(shapes)[theta["schedule"]]

        def rate(count):
            return rates[count]

        if name == "adam":
            transform, judged = optax.adam(rate), lambda state, params: params
        else:
            base = optax.adamw(rate, b1=0.0, weight_decay=0.0)
            transform = optax.contrib.schedule_free(base, rate, b1=0.9)
            judged = optax.contrib.schedule_free_eval_params

        def body(carry, key):
            params, state = carry
            key_batch, key_loss, _, _ = jax.random.split(key, 4)
            batch = TASK.batch(instance, key_batch, "train")
            grads = jax.grad(TASK.loss)(params, instance, batch, key_loss)
            loss = TASK.loss(judged(state, params), instance, batch, key_loss)
            updates, state = transform.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), loss

        start = (params, transform.init(params))
        (params, state), losses = jax.lax.scan(body, start, jax.random.split(key_data, horizon))
        return losses, TASK.score(judged(state, params), instance, "test")["loss"], params

    for i, (setting, key) in enumerate([(s, k) for s in settings for k in keys]):
        losses, test, last = alone(theta_of(setting), key)
        np.testing.assert_allclose(found.final[i], losses[-horizon // 10 :].mean(), rtol=1e-3)
        parts = [losses[a:b].mean() for a, b in zip(part_edges(horizon), part_edges(horizon)[1:], strict=False)]  # fmt: skip  # noqa: E501
        np.testing.assert_allclose(found.curve[i], parts, rtol=1e-3)
        np.testing.assert_allclose(found.scores["test"]["loss"][i], test, rtol=1e-3)
        if name != "adam":  # The parameters of gradients are others.
            instance = TASK.sample(jax.random.split(jax.random.split(key)[0])[0])
            assert abs(TASK.score(last, instance, "test")["loss"] - test) > 1e-2 * test


def test_runs_are_those_of_an_evaluation_on_one_task():
    found = runner("adam", 3)(stacked([Setting(0.1, "constant")] * 3), Starts(TASK).keys(7, 3), 30)
    one = evaluate.evaluate_baseline("adam", TASK, rates=(0.1,), num_steps=30, num_seeds=3, seed=7)
    np.testing.assert_allclose(found.curve, one.losses, rtol=1e-4)
    np.testing.assert_allclose(found.scores["test"]["loss"], one.test["loss"], rtol=1e-3)


def test_optlist_is_what_is_published():
    """Against the published update, step by step in double precision, all ten at once."""
    num_steps, random = 12, np.random.default_rng(0)
    grads = random.normal(size=(num_steps + 2, 6)) * np.array([1, 1, 1, 1e-3, 1e-3, 30])
    start = random.normal(size=6)

    def published(setting):
        rate, b1, b2, eps, nesterov, decay, warmup, low, constant = setting
        m, v, p, found = np.zeros(6), np.zeros(6), start, []
        for step, g in enumerate(grads):
            t, s, const_steps = step + 1, min(step, num_steps), constant * num_steps
            lowest, late = low * rate, max(min(step, num_steps), constant * num_steps)
            fall = np.cos((late - const_steps) * np.pi / (num_steps - const_steps)) / 2 + 0.5
            lr = (rate - lowest) * fall + lowest
            if warmup and s < num_steps * max(warmup, constant):
                lr = s / (num_steps * max(warmup, constant)) * rate
            m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
            lr *= np.sqrt(1 - b2**t) / (1 - b1**t)
            top = b1 * m + (1 - b1) * g if nesterov else m
            found.append(-lr * (top / (np.sqrt(v) + eps) + decay * p))
            p = p + found[-1]
        return np.stack(found)

    optlist = BASELINES["optlist"]

    @jax.jit
    @jax.vmap
    def ours(theta):
        transform = optlist.optimizer().bind(theta, jnp.int32(num_steps))

        def body(carry, g):
            params, state = carry
            updates, state = transform.update({"p": g}, state, params)
            return (optax.apply_updates(params, updates), state), updates["p"]

        params = {"p": jnp.float32(start)}
        return jax.lax.scan(body, (params, transform.init(params)), jnp.float32(grads))[1]

    assert [str(s) for s in optlist.settings] == [f"{i} of its list" for i in range(10)]
    assert optlist.untuned == optlist.settings[0] and not optlist.at_edge(optlist.settings[0])
    expected = np.stack([published(s) for s in OPTLIST])
    found = ours(stacked(optlist.settings))
    np.testing.assert_allclose(found, expected, rtol=5e-5, atol=1e-9)
    # Warm-ups from 0 as long as the constant phase, and the rate at the end, are all in it.
    still = [s.warmup_fraction > 0 for s in OPTLIST]
    np.testing.assert_array_equal((expected == 0).all(axis=2)[:, 0], still)
    np.testing.assert_array_equal(
        (expected == 0).all(axis=2)[:, -1], [s.min_learning_rate_mult == 0 for s in OPTLIST]
    )


@pytest.mark.parametrize("name", sorted(set(BASELINES) - {"optlist"}))
def test_baselines_are_swept_wide_and_learn(name):
    """At least 14 values, schedules of data, and at optax's own defaults its own optimizer."""
    baseline = BASELINES[name]
    assert len(baseline.values) >= 14 and list(baseline.values) == sorted(baseline.values)
    grid = [s for s in baseline.settings if s.value in baseline.values]
    assert len(grid) == 2 * len(baseline.values) and baseline.untuned in baseline.settings
    assert baseline.at_edge(baseline.settings[0]) and not baseline.at_edge(baseline.settings[1])
    setting = Setting(baseline.default, "constant")
    ours = baseline.optimizer().bind(theta_of(setting), 10)
    theirs = {
        "sgdm": optax.sgd(0.01, momentum=0.9),
        "adam": optax.adam(0.001),
        "adamw": optax.adamw(0.001, weight_decay=0.1),
        "nadamw": optax.nadamw(0.001),
        "lion": optax.lion(0.0001),
        "muon": optax.contrib.muon(0.02),
        "prodigy": optax.contrib.prodigy(),
        "schedule_free_adamw": optax.contrib.schedule_free_adamw(),
    }[name]
    assert theirs is not None and baseline.builder in BUILDERS

    def run(transform):
        def body(carry, t):
            params, state = carry
            grads = jax.tree.map(lambda p: p + jnp.sin(t + p), params)
            updates, state = transform.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), None

        params = {"w": jnp.linspace(-1.0, 1.0, 6).reshape(2, 3), "b": jnp.ones(3)}
        start = (params, transform.init(params))
        return jax.lax.scan(body, start, jnp.arange(5.0))[0][0]

    found, expected = jax.jit(lambda: (run(ours), run(theirs)))()
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), found, expected
    )


def test_survivors_are_the_best_and_the_next_smaller():
    a, b, c = (Setting(x, "constant") for x in (0.1, 1.0, 10.0))
    cosine = Setting(0.5, "cosine")
    low = Setting(0.2, "cosine")
    # By all seeds `c` is the best and `cosine` next; by the first one `low` is among cosines.
    found = {c: [0.0, 0.0], low: [1.0], cosine: [2.0, -1.0], a: [3.0, 0.0], b: [4.0]}
    effort = sweep.Effort(2, 1, 1)
    assert sweep.survivors([found], effort) == [c, b, low]
    assert sweep.survivors([found], effort._replace(kept=2)) == [c, cosine, b, low]
    assert sweep.survivors([{a: [0.0, 0.0], b: [1.0]}], effort) == [a]
    assert sweep.leaders([found]) == [c, low]
    assert sweep.leaders([found, {low: [3.0], a: [0.0]}]) == [a, low]  # What both tried.
    listed = BASELINES["optlist"]  # Neighbours have nothing in common, so all are tried again.
    before = [{s: [float(i)] for i, s in enumerate(listed.settings)}]
    assert [s for s, _ in sweep.first_runs(listed, before, before[0], effort)] == list(
        listed.settings
    )
    one = {a: [0.0, 3.0], b: [1.0], c: [2.0, 0.5]}
    assert sweep.ranked([one], 1) == [a, b, c] and sweep.ranked([one], 2) == [c, a]
    other = {c: [0.0], b: [9.0], a: [9.0, 9.0]}
    assert sweep.ranked([one, other], 1) == [c, a, b] and sweep.ranked([one, other], 2) == [a]
    assert sweep.ranked([one, {b: [9.0]}], 1) == [b]  # What all tasks tried.


@pytest.mark.parametrize("hard", [-2.0, 0.0, 2.0])
def test_what_is_chosen_is_about_the_best_of_a_whole_sweep(hard):
    """Whether the first seed is a hard one or an easy one, for about half of the runs."""
    adam, effort, noise = BASELINES["adam"], sweep.EFFORTS[0], np.random.default_rng(0)
    ends, number = [], 0
    for _ in range(200):
        best = adam.settings[noise.integers(28)]
        true = [
            np.log(s.value / best.value) ** 2 / 3 + 0.3 * (s.schedule != best.schedule)
            for s in adam.settings
        ]
        runs = np.array(true)[:, None] + noise.normal(0, 0.5, (28, effort.seeds))
        runs += np.array([hard, *np.zeros(effort.seeds - 1)])  # Seeds differ for all alike.
        found = {s: [runs[i, 0]] for i, s in enumerate(adam.settings)}
        for_suite = sweep.promising(adam, [found], effort)
        while wanted := sweep.next_runs(adam, found, for_suite, [], effort):
            for setting, seed in wanted:
                assert seed == len(found[setting])
                found[setting].append(runs[adam.settings.index(setting), seed])
        chosen = adam.settings.index(sweep.ranked([found], effort.seeds)[0])
        assert len(found[adam.settings[chosen]]) == effort.seeds
        number += sum(map(len, found.values()))
        ends.append([runs[i].mean() for i in (chosen, runs[:, 0].argmin())] - runs.mean(1).min())
    by_rule, by_one = np.mean(ends, axis=0)
    assert np.mean(np.array(ends)[:, 0] < 1e-9) > 0.95 and by_rule < 0.01 < 0.1 < by_one
    assert number < 0.7 * 200 * 28 * effort.seeds


@pytest.fixture
def evaluated(tmp_path):
    """``run(**changes)``: two tasks, Adam and one untrained optimizer, in seconds."""
    tasks = {
        name: cfg.task("quadratic", dim=d, condition=4.0) for name, d in (("one", 2), ("two", 3))
    }
    learned = {"sgdm (untrained)": contender("sgdm")}

    def run(**changes):
        given = {"tasks": tasks, "contenders": learned, "horizons": (6, 20), "num_seeds": 3}
        given |= {"workdir": tmp_path, "baselines": ("adam",)} | changes
        return command.SuiteEvaluation(**given).run()

    return run, tasks


def test_optimizers_alone(evaluated, tmp_path, capsys):
    """Without baselines: the same runs, their differences, and nothing that Adam is needed for."""
    _, tasks = evaluated
    contenders = {f"{name} (untrained)": contender(name) for name in ("sgdm", "adam")}
    given = {"num_seeds": 3, "choose_by": "training", "data_dir": None}
    suite = Suite("own", tasks, (6,))
    alone, beside = (
        evaluate_suite(suite, contenders, (6,), tmp_path / str(i), baselines=names, **given)
        for i, names in enumerate(((), ("adam",)))
    )
    said = capsys.readouterr().out
    assert "Baselines are tuned" not in said.split("wrote suite.csv")[0]
    for horizon, found in alone["horizons"].items():
        with_adam = {row["label"]: row for row in beside["horizons"][horizon]["rows"]}
        assert len(found["rows"]) == len(found["differences"]) == 2 < len(with_adam)
        for row in found["rows"]:
            assert row["log_loss"] == with_adam[row["label"]]["log_loss"]
            assert row["speed_up"] is None and np.isnan(row["profile_score"])
    for output in OUTPUTS:
        assert (tmp_path / "0" / output).stat().st_size > 100


def test_a_suite_continues_where_it_was_killed(evaluated, monkeypatch, tmp_path):
    run, tasks = evaluated
    del tasks["two"]
    computed, real, stop = [], Runner.__call__, []

    def counted(self, thetas, keys, horizon, *splits):
        if len(computed) in stop:
            raise KeyboardInterrupt
        computed.append(horizon)
        return real(self, thetas, keys, horizon, *splits)

    monkeypatch.setattr(Runner, "__call__", counted)
    monkeypatch.setattr(command.os, "sched_getaffinity", lambda pid: {0})
    run(workdir=tmp_path / "alone")
    alone = list(computed)
    computed.clear()
    first = alone.count(6)  # Its last two are reported, those before are sweeps.
    assert alone == sorted(alone) and first > 3
    for at in (1, first - 1, first + 1):
        stop[:] = [at]
        with pytest.raises(KeyboardInterrupt):
            run()
        assert len(computed) == at
    stop.clear()
    parted = run()
    assert computed == alone  # Each once.
    computed.clear()
    monkeypatch.setattr(command.os, "sched_getaffinity", lambda pid: {0, 1})  # Two at once.
    whole = run(workdir=tmp_path / "whole")
    assert sorted(computed) == alone
    for a, b in zip(parted, whole, strict=True):
        assert a.label == b.label and a.setting == b.setting
        np.testing.assert_array_equal(a.curve, b.curve)
        np.testing.assert_array_equal(a.scores["test"]["loss"], b.scores["test"]["loss"])
    # Another optimizer is added: it alone is run. Other seeds: what is reported is run anew.
    computed.clear()
    run(contenders={"adam (untrained)": contender("adam")})
    assert sorted(computed) == [6, 20]
    computed.clear()
    run(num_seeds=2)
    assert sorted(computed) == [6] * 2 + [20] * 2


def test_few_programs_are_held_at_a_time(evaluated, monkeypatch, tmp_path):
    """Or a suite of many tasks takes all mappings of memory there are; the results are the same."""
    run, _ = evaluated
    expected = run()
    held, real = [], command.SuiteEvaluation._runner

    def counted(self, *given):
        found = real(self, *given)
        held.append(len(self._pool))
        return found

    monkeypatch.setattr(pool, "crowded", lambda: True)
    monkeypatch.setattr(command.SuiteEvaluation, "_runner", counted)
    found = run(workdir=tmp_path / "few")
    assert max(held) == 1 and len(held) > 8
    for a, b in zip(expected, found, strict=True):
        assert a.label == b.label
        np.testing.assert_array_equal(a.curve, b.curve)


def test_how_long_a_job_is_expected_to_take_is_of_its_own_optimizer():
    """A learned one, as slow as forty of Adam's, must not be the last to begin."""
    ground = command._Ground("one", cfg.task("quadratic"), None, 2)
    assert ground.expects("adam") == 0
    ground.took("adam", 2.0)
    ground.took("learned", 80.0)
    assert ground.expects("adam") == 2 and ground.expects("another") == 80


def test_a_process_is_crowded_near_its_limit(monkeypatch):
    assert not pool.crowded()
    monkeypatch.setattr(pool, "SHARE", 1e-6)
    assert pool.crowded() == Path("/proc/self/maps").exists()


def test_nothing_is_chosen_on_what_is_reported(evaluated):
    """The tuned setting is the best of the sweep's own runs; one rate is one for all tasks."""
    run, tasks = evaluated
    entries = [e for e in run(horizons=(20,)) if e.optimizer == "adam"]
    assert [e.column for e in entries[:3]] == list(command.COLUMNS)
    settings = BASELINES["adam"].settings
    losses, seeds = {}, sweep.EFFORTS[0].seeds
    for name, config in tasks.items():
        starts = Starts(config.make())
        keys = starts.keys(command.SEED + evaluate.SELECTION_OFFSET, seeds)
        assert not (
            jax.random.key_data(keys) == jax.random.key_data(starts.keys(SEED, seeds))
        ).any()
        many = runner("adam", 8, config.make())
        thetas = stacked([s for s in settings for _ in range(seeds)])
        found = many(thetas, jnp.tile(keys, 28), 20).scores["train"]["loss"].reshape(28, seeds)
        constant = np.broadcast_to(starts.constant(keys), (28, seeds))
        losses[name] = dict(zip(settings, aggregates.log_loss(found, constant), strict=True))
    # Here as of a whole sweep.
    one = sweep.ranked(list(losses.values()), seeds)[0]
    for e in entries:
        if e.column == command.TUNED:
            assert e.setting == sweep.ranked([losses[e.task]], seeds)[0]
        if e.column == command.ONE_RATE:
            assert e.setting == one


@pytest.mark.parametrize("name", ["adam", "optlist"])
def test_longer_horizons_find_the_best_of_the_whole_sweep(evaluated, monkeypatch, name):
    """Where it has moved by several steps, on one task alone or on all, though few are tried."""
    run, _ = evaluated
    tried = []

    def loss(task, horizon, s):
        best = np.log(0.3 / horizon**1.5) - (task == "two")
        return (np.log(s.value or 1) - best) ** 2 + SCORE[s.schedule]

    def swept(self, ground, name, runs, horizon):
        tried.extend((ground.name, horizon, run) for run in runs)
        return [loss(ground.name, horizon, s) for s, _ in runs]

    SCORE = dict.fromkeys(BASELINES[name].schedules, 1.0) | {BASELINES[name].schedules[-1]: 0.0}
    reported = []
    monkeypatch.setattr(command.SuiteEvaluation, "_sweep", swept)
    monkeypatch.setattr(
        command.SuiteEvaluation,
        "_report",
        lambda self, ground, name, chosen, horizon: (
            reported.append((ground.name, horizon, chosen)) or []
        ),
    )
    run(horizons=(6, 60, 600), baselines=(name,), contenders={})
    for task, horizon, (tuned, one_rate, _) in reported:
        every = {
            x: {s: [loss(x, horizon, s)] for s in BASELINES[name].settings} for x in ("one", "two")
        }
        if name != "optlist" or horizon == 6:  # A list has no neighbours.
            assert tuned == sweep.ranked([every[task]], 1)[0]
            assert one_rate == sweep.ranked(list(every.values()), 1)[0]
    assert len(reported) == 6 and len(set(tried)) == len(tried)


@pytest.mark.parametrize("name", ["adam", "muon", "schedule_free_adamw"])
@pytest.mark.parametrize("apart", [0, 2, 3])
def test_longer_horizons_find_the_best_under_another_schedule(evaluated, monkeypatch, name, apart):
    """Whose best value is steps above; also where the default, off the grid, is the best at first.

    The first seed says all. The second schedule is worse at first, better later.
    """
    run, _ = evaluated
    baseline, chosen = BASELINES[name], []
    other = baseline.schedules[1]

    def loss(horizon, s):
        is_other = s.schedule == other
        steps = 3 * np.log10(s.value / baseline.default) - apart * is_other
        return 0.1 * steps**2 + is_other * (0.05 if horizon == 6 else -0.2)

    def report(self, ground, name, settings, horizon):
        chosen.append((horizon, settings))
        return []

    monkeypatch.setattr(
        command.SuiteEvaluation,
        "_sweep",
        lambda self, ground, name, runs, horizon: [loss(horizon, s) for s, _ in runs],
    )
    monkeypatch.setattr(command.SuiteEvaluation, "_report", report)
    run(horizons=(6, 60, 600), baselines=(name,), contenders={})
    for horizon, (tuned, one_rate, _) in chosen:
        best = min(baseline.settings, key=lambda s: loss(horizon, s))
        assert tuned == one_rate == best, horizon
    assert len(chosen) == 6


def test_what_is_best_on_most_tasks_is_tried_on_all():
    """By the first seed, of what was tried on half of them at least."""
    adam = BASELINES["adam"]
    x, y, z = adam.settings[3], adam.settings[20], adam.settings[25]
    found = [{x: [0.0], y: [-1.0]}, {x: [0.0], y: [-1.0]}, {x: [0.0], z: [-9.0]}, {x: [0.0]}]
    beside = set(adam.beside(x))
    assert set(sweep.unexplored(adam, found)) == beside | {y}
    found[3][z] = [10.0]  # Its mean is no better, on half of the tasks.
    assert set(sweep.unexplored(adam, found)) == beside | {y}
    assert sweep.next_runs(adam, {x: [0.0, 0.0]}, [], [y], sweep.Effort(2, 1, 1))[-1] == (y, 0)


@pytest.mark.parametrize("name", ["adam", "optlist"])
def test_populations_of_a_sweep_are_full(evaluated, monkeypatch, name):
    """A run that is not asked for costs as much as one that is; seeds come in their order."""
    run, _ = evaluated
    tried, noise = {}, np.random.default_rng(0)

    def swept(self, ground, name, runs, horizon):
        where = tried.setdefault((ground.name, horizon), {})
        for setting, seed in runs:
            assert seed == where.get(setting, 0)
            where[setting] = seed + 1
        seeds = sweep.EFFORTS[(6, 60, 600).index(horizon)].seeds
        left = sum(seeds - where.get(s, 0) for s in BASELINES[name].settings)
        listed = name == "optlist" and len(where) < 10  # A list has no neighbours.
        assert len(runs) % command.WIDTH == 0 or left == 0 or listed
        return noise.normal(size=len(runs)).tolist()

    monkeypatch.setattr(command.SuiteEvaluation, "_sweep", swept)
    monkeypatch.setattr(command.SuiteEvaluation, "_report", lambda *_: [])
    run(horizons=(6, 60, 600), baselines=(name,), contenders={})
    assert len(tried) == 6


def test_where_all_diverge_every_setting_is_tried(evaluated, monkeypatch):
    """Losses are capped, so nothing says which way to go."""
    run, _ = evaluated
    grid, cap = BASELINES["adam"].settings, np.log(3.01)
    found = {}

    def swept(self, ground, name, runs, horizon):
        def fits(s):
            return s.value > 0.05 if horizon == 6 else s.value == grid[0].value

        return [-1.0 if fits(s) else cap for s, _ in runs]

    monkeypatch.setattr(command.SuiteEvaluation, "_sweep", swept)

    def report(self, ground, name, chosen, horizon):
        found[horizon] = chosen[0].value
        return []

    monkeypatch.setattr(command.SuiteEvaluation, "_report", report)
    run(horizons=(6, 60), contenders={})
    assert found[60] == grid[0].value


def test_what_is_written(evaluated, tmp_path):
    """CSV, JSON, figure and page of a run in which one optimizer diverges."""
    from launch.evaluation import figure

    run, tasks = evaluated
    entries = run()
    bad = np.array([np.inf, np.nan, 1e9])
    diverging = [
        e._replace(
            optimizer=r"bad </script> $\frac$",
            curve=np.full_like(e.curve, np.inf),
            final=bad,
            scores={split: {"loss": bad} for split in e.scores},
        )
        for e in entries
        if not e.column
    ]
    summary = report.summarize([*entries, *diverging], tasks)
    report.write_csv([*entries, *diverging], tmp_path / "x.csv")
    report.write_json(summary, tmp_path / "x.json")
    figure.plot(summary, "title", tmp_path / "x.png")
    page.write(summary, "title", ["said"], tmp_path / "x.html")
    assert (tmp_path / "x.png").read_bytes()[:4] == b"\x89PNG"
    rows = list(csv.DictReader((tmp_path / "x.csv").open()))
    assert len(rows) == 2 * 2 * 5 * 3  # Horizons, tasks, optimizers, seeds.
    assert sum(int(row["diverged"]) for row in rows if row["optimizer"].startswith("bad")) == 12

    def refuse(constant):
        raise AssertionError(constant)

    document = json.loads((tmp_path / "x.json").read_text(), parse_constant=refuse)
    labels = {row["label"]: row for row in document["horizons"]["20"]["rows"]}
    worst = labels[r"bad </script> $\frac$"]
    assert worst["diverged"] == worst["runs"] == 6
    assert worst["speed_up"]["estimate"] == worst["profile_score"] == 0
    tuned = labels["adam (tuned per task)"]["speed_up"]
    assert tuned["estimate"] > 0 and tuned["high"] <= 1 and tuned["bounds"] == 0
    assert worst["log_loss"]["train"]["estimate"] == pytest.approx(np.log(3.01))
    text = report.table(summary)
    assert "20 steps" in text and "adam (tuned per task)" in text and "6/6" in text
    assert max(map(len, text.splitlines())) <= report.LINE
    (said,) = [x for x in report.claims(summary) if x.startswith("At 20 steps") and ", bad" in x]
    assert (
        "differs, on too few tasks for a claim, from" in said
        and "adam (one rate) +" in said
        and "[" in said
    )
    for d in (d for found in summary["horizons"].values() for d in found["differences"]):
        d["train"]["tasks"] = aggregates.LEAST_TASKS
    (said,) = [x for x in report.claims(summary) if x.startswith("At 20 steps") and ", bad" in x]
    assert "is above adam" in said and "cannot be told" not in said


def test_tables_to_paste_have_every_difference(evaluated, tmp_path):
    """Markdown tables: a row for each of the others, and numbers that are those of the JSON."""
    run, tasks = evaluated
    entries = run()
    entries += [e._replace(optimizer="a|b") for e in entries if not e.column]
    summary = report.summarize(entries, tasks)
    report.write_markdown(summary, tmp_path / "x.md")
    first, second = (tmp_path / "x.md").read_text().strip().split("\n\n")
    lines = [line.strip("| ").split(" | ") for line in first.split("\n")]
    assert lines[0] == [
        "sgdm (untrained) minus",
        "6 steps, training",
        "6 steps, test",
        "20 steps, training",
        "20 steps, test",
    ]
    assert first.split("\n")[1] == "|" + "---|" * 5
    assert {len(line) for line in lines[2:]} == {5} and second.startswith("| a&#124;b minus")
    for label, *cells in lines[2:]:
        for cell, (horizon, split) in zip(
            cells, [(h, s) for h in ("6", "20") for s in ("train", "test")], strict=True
        ):
            (found,) = [
                d[split]
                for d in summary["horizons"][horizon]["differences"]
                if d["ours"] == "sgdm (untrained)" and d["other"] == label.replace("&#124;", "|")
            ]
            numbers = [float(x) for x in re.findall(r"[-+.\d]+", cell)]
            expected = [found["estimate"], found["low"], found["high"]]
            assert numbers == pytest.approx(expected, abs=0.0051)
    assert len(lines) == 2 + 4  # Adam's three columns and the other without a rate.
    assert [report._short(x) for x in (-0.25, 0.254, -1.254, 2.0)] == [
        "-.25",
        "+.25",
        "-1.25",
        "+2.00",
    ]


def test_text_is_narrow_and_says_all():
    """Names of any length, sentences of any length, and no interval on two lines."""
    interval = Interval(-0.123, -1.0, 0.5)
    sentence = f"{'x' * 60} is above " + ", ".join(f"adam {i} {interval}" for i in range(20))
    lines = report.wrapped(sentence).split("\n")
    assert len(lines) > 5 and max(map(len, lines)) <= report.LINE
    assert " ".join(line.strip() for line in lines) == sentence
    assert sum(line.count(str(interval)) for line in lines) == 20
    assert report.shortened("abcdef", 6) == "abcdef" and report.shortened("abcdefg", 6) == "…cdefg"
    assert len(report._line("a/" * 60, ["0"] * 7)) < report.LINE


def test_files_of_another_evaluation_are_not_replaced_in_silence(tmp_path):
    asked, path = {"suite": "smoke", "horizons": [20, 100], "optimizers": ["a"]}, tmp_path / "x"
    assert report.replaced(asked, path) == []
    report.write_json({"asked": asked}, path)
    assert report.replaced(asked, path) == []
    (said,) = report.replaced(asked | {"horizons": [30]}, path)
    assert "(horizons 20, 100) were replaced" in said and "seconds" in said
    path.write_text("{")
    assert "not known which" in report.replaced(asked, path)[0]


def test_folders_have_short_names_that_differ():
    from launch.evaluate import _labelled

    assert list(_labelled(["r/x/optimizer", "r/y/optimizer"])) == ["x/optimizer", "y/optimizer"]
    found = _labelled(["r/x/optimizer", "s/x/optimizer/"])
    assert found == {"r/x/optimizer": "r/x/optimizer", "s/x/optimizer": "s/x/optimizer/"}
    with pytest.raises(ValueError, match="once for each"):
        _labelled(["a", "./a"])


class Parsed(html.parser.HTMLParser):
    """Tags that are open, scripts, and what would load something."""

    def __init__(self):
        super().__init__()
        self.open, self.loading, self.scripts = [], [], []

    def handle_starttag(self, tag, attributes):
        if tag not in ("meta", "link", "img", "input", "br"):
            self.open.append(tag)
        self.loading += [x for x in attributes if x[0] in ("src", "href", "srcset", "action")]
        self.loading += [tag] if tag in ("link", "img", "iframe") else []

    def handle_endtag(self, tag):
        while self.open and self.open.pop() != tag:
            pass

    def handle_data(self, data):
        if self.open and self.open[-1] == "script":
            self.scripts.append(data)


def test_the_page_needs_nothing_from_outside(evaluated):
    run, tasks = evaluated
    entries = [e._replace(optimizer=e.optimizer.replace("(untrained)", "</script>")) for e in run()]
    text = page.page(report.summarize(entries, tasks), "title", ["<b>said</b>"])
    parser = Parsed()
    parser.feed(text)
    assert not parser.loading and not re.search(r"https?:|@import|url\(|fetch\(|XMLHttp", text)
    data, code = parser.scripts  # A name that looks like the end of a script does not end it.
    found = json.loads(data)
    assert found["about"] == ["<b>said</b>"]
    assert "sgdm </script>" in {row["label"] for row in found["horizons"]["6"]["rows"]}
    for used in re.findall(r'at\("(\w+)"\)', code):
        assert f'id="{used}"' in text


def test_a_setting_at_the_edge_is_warned_of(evaluated):
    """And settings may be chosen by another split, which is another sweep."""
    run, tasks = evaluated
    entries = run(horizons=(6,), contenders={}, choose_by="validation")
    adam = BASELINES["adam"]
    for e in entries:
        assert e.edge == (e.column != command.DEFAULT and adam.at_edge(e.setting))
    marked = [e._replace(edge=e.column == command.TUNED and e.task == "two") for e in entries]
    (said,) = (
        x
        for x in report.warnings(report.summarize(marked, tasks, "validation"))
        if "does worse" not in x  # Of three seeds, by chance.
    )
    assert "at 6 steps, adam (tuned per task)" in said and "edge of its grid (two)" in said


def test_a_setting_that_does_worse_than_one_less_tuned_is_warned_of(evaluated):
    """By the split it was chosen by; on a task, and for the suite."""
    run, tasks = evaluated
    entries = run(horizons=(6,), contenders={})
    higher = {
        (command.TUNED, "one"): 3.0,
        (command.ONE_RATE, "one"): 2.0,
        (command.ONE_RATE, "two"): 2.0,
    }

    def changed(split):
        def one(e):
            same = {s: {"loss": np.full(3, 0.5)} for s in ("train", "validation", "test")}
            same[split] = {"loss": np.full(3, 0.1 * higher.get((e.column, e.task), 1.0))}
            return e._replace(scores=same, constant=np.ones(3), edge=False)

        return [one(e) for e in entries]

    for split in ("train", "validation"):
        said = report.warnings(report.summarize(changed(split), tasks, split))
        assert said == [
            "warning: at 6 steps, adam (tuned per task) does worse on one than at its one rate, on "
            "one than at its default; its setting was chosen on other seeds.",
            "warning: at 6 steps, adam (one rate) does worse on the suite than at its default; its "
            "setting was chosen on other seeds.",
        ]
    assert not report.warnings(report.summarize(changed("train"), tasks, "validation"))


def test_claims_say_how_many_runs_diverged(evaluated):
    run, tasks = evaluated
    entries = [
        e._replace(scores=e.scores | {"train": {"loss": np.array([np.nan, 0.1, 0.1])}})
        if not e.column and e.task == "one"
        else e
        for e in run(horizons=(6,))
    ]
    (said,) = report.claims(report.summarize(entries, tasks))
    assert said.endswith("Of its 6 runs 1 diverged.")
    assert "diverged" not in report.claims(report.summarize(run(horizons=(6,)), tasks))[0]


def test_losses_below_zero_still_tell_settings_apart(evaluated):
    """A shifted loss is tuned as well; the report says that its log-losses tell nothing."""
    run, tasks = evaluated
    base = tasks.pop("two").make()

    @dataclasses.dataclass(frozen=True)
    class Shifted(type(cfg.task("quadratic"))):
        by: float = 0.0

        def make(self, data_dir=None):
            def score(*given):
                return {k: v - self.by for k, v in base.score(*given).items()}

            constant = base.constant_loss
            return base._replace(score=score, constant_loss=lambda i: 0 * constant(i) + 2.0)

    chosen = []
    for by in (0.0, 5.0):
        tasks["one"] = Shifted(by=by)
        entries = run(horizons=(20,), contenders={})
        summary = report.summarize(entries, tasks)
        said = [x for x in report.warnings(summary) if "below 0" in x]
        assert said == (["warning: on one " + said[0].split("one ", 1)[1]] if by else [])
        ends = {e.column: np.mean(e.scores["train"]["loss"]) + by for e in entries}
        chosen.append(ends[command.TUNED] / ends[command.DEFAULT])
        assert {e.log_loss("train").max() == np.log(0.01) for e in entries} == {bool(by)}
    assert chosen[1] < 2 * chosen[0] < 0.2, chosen
    np.testing.assert_allclose(  # A line that goes on with the slope it had.
        sweep.judged(np.array([1e-9, 0.0, -1e-9, -2.0, np.nan, -np.inf]), np.ones(6)),
        np.log(0.01) + np.array([1e-7, 0, -1e-7, -200, np.log(301), np.log(301)]),
        rtol=1e-12,
    )


@pytest.mark.parametrize("wrong", ["loss", "state"])
def test_what_a_step_must_not_do_is_said_with_its_name(wrong, tmp_path):
    """By a task or an optimizer of one's own; JAX would say it of nothing in particular."""

    @dataclasses.dataclass(frozen=True)
    class Mine(type(cfg.task("quadratic"))):
        def make(self, data_dir=None):
            if wrong != "loss":
                return TASK
            return TASK._replace(loss=lambda *given: TASK.loss(*given) * jnp.ones(2))

    def bind(theta, num_steps):
        def update(updates, state, params=None, **_):
            return updates, state + 0.5

        return optax.GradientTransformationExtraArgs(lambda params: jnp.int32(0), update)

    mine = command.Contender(learned_optimizer(lambda key: {"x": 1.0}, bind), None, {}, True, True)
    name = {"loss": "the task 'a'", "state": "the optimizer 'b' on the task 'a'"}[wrong]
    with pytest.raises(ValueError, match=rf"^{name}: .*(shape \(2,\)|float32.*from int32)"):
        command.SuiteEvaluation({"a": Mine()}, {"b": mine}, (3,), 2, tmp_path)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"score": lambda p, i, split: {"loss": 1.0} if split == "test" else {}}, "on train; add"),
        ({"score": lambda *_: {"loss": jnp.ones(3)}}, r"loss of shape \(3,\) on train"),
        ({"score": lambda *_: {"loss": 1.0, "more": {"a": 1.0}}}, "more of a dict on train"),
        ({"score": lambda *_: {}["nothing"]}, "^the task 'a': KeyError: 'nothing'"),
        ({"constant_loss": lambda i: jnp.ones(4)}, "constant_loss"),
        ({"constant_loss": lambda i: 0.0}, "^the task 'a': .*above 0"),
    ],
)
def test_what_a_suite_cannot_judge_by_is_said_before_anything_runs(changes, words, tmp_path):
    @dataclasses.dataclass(frozen=True)
    class Mine(type(cfg.task("quadratic"))):
        def make(self, data_dir=None):
            return TASK._replace(**changes)

    with pytest.raises(ValueError, match=words) as raised:
        command.SuiteEvaluation({"a": Mine()}, {}, (3,), 2, tmp_path)
    assert "the task 'a'" in str(raised.value)


def test_what_is_refused_says_what_to_do(tmp_path):
    with pytest.raises(ValueError, match=r"--optimizer must be a folder.*mlp.*got 'nowhere'"):
        contender("nowhere")

    @dataclasses.dataclass(frozen=True)
    class Silent(type(cfg.task("quadratic"))):
        def make(self, data_dir=None):
            return TASK._replace(score=None)

    with pytest.raises(ValueError, match=r"'mine'.*must have a `score`.*--cfg\.task"):
        command.SuiteEvaluation({"mine": Silent()}, {}, (3,), 2, tmp_path)
    with pytest.raises(ValueError, match=r"`contenders` must not be called.*got adam; give"):
        command.SuiteEvaluation({}, {"adam": contender("adam")}, (3,), 2, tmp_path)
    with pytest.raises(ValueError, match=r"the suite must be one of.*got 'smok'.*smoke"):
        suite("smok")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("score", [lambda *given: 1.0, lambda *given: {"accuracy": 1.0}])
def test_a_score_without_a_loss_is_refused(score):
    spoilt = TASK._replace(score=score)
    config = SimpleNamespace(make=lambda data_dir: spoilt)
    with pytest.raises(ValueError, match=r"`score` of the task 'x' must return a dict with its `l"):
        command._Ground("x", config, None, 1)


def test_a_loss_of_whole_numbers_is_refused():
    """On whichever split; other scores may be of any type."""
    for split in ("train", "validation", "test"):

        def score(params, instance, at, of=split):
            return {"loss": jnp.asarray(3, jnp.int32 if at == of else jnp.float32), "right": True}

        config = SimpleNamespace(make=lambda data_dir, s=score: TASK._replace(score=s))
        with pytest.raises(ValueError, match=f"loss that is a real float, got int32 on {split}"):
            command._Ground("x", config, None, 1)


def test_targets_of_twins_and_of_negative_losses_are_reached():
    """A digit more or less decides nothing; a target that is no number is missed by all."""

    def entry(optimizer, column, losses):
        curve = np.tile(losses, (2, 1))
        scores = {split: {"loss": curve[:, -1]} for split in ("train", "validation", "test")}
        constant, size = np.full(2, 1.0), len(losses)
        return command.Entry(
            "t", optimizer, column, None, size, curve, curve[:, -1], scores, constant, 0.0, 0
        )

    falling = np.concatenate([np.linspace(1, 0.1, 60), np.full(60, 0.1)])
    for shift in (0.0, -6.0):
        adam = entry("adam", command.TUNED, falling + shift)
        twin = entry("twin", "", falling + shift + 1e-5)
        for one in (adam, twin):
            assert np.isfinite(report._times([adam, twin], one.label, ["t"])).all()
    broken = entry("adam", command.TUNED, np.full(120, np.nan))
    assert report._times([broken, twin], "twin", ["t"]) == [np.inf]
