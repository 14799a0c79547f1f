"""Evaluation: fair sweeps, the same runs for all, honest words, and nothing lost on the way."""

import json
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import learned_opt
from launch import choices, demo, trained
from launch import config as cfg
from launch import evaluate as evaluate_command
from launch.choices import to_dict
from launch.evaluate import EvaluationConfig, task_of
from launch.evaluation import one_task as command
from learned_opt import learnable_adam, learnable_sgdm
from meta_train import evaluate
from meta_train.evaluate import FINAL, Curves, Estimate
from tasks import TaskMixture, quadratic_family

TASK = quadratic_family(dim=4, noise=0.05)
SIZE = {"num_steps": 30, "num_seeds": 3, "seed": 7}


def test_curve_is_a_plain_optax_loop():
    """The curve of a bound optimizer equals a hand-written training loop."""
    optimizer = learnable_sgdm(0.1, 0.5)
    theta = optimizer.init(jax.random.key(0))
    curves = evaluate.evaluate_learned("sgdm", TASK, optimizer, theta, **SIZE)
    for seed, key in enumerate(jax.random.split(jax.random.key(7), 3)):
        key_init, key_data = jax.random.split(key)
        key_sample, key_params = jax.random.split(key_init)
        instance = TASK.sample(key_sample)
        params = TASK.init(instance, key_params)
        transform = optax.sgd(0.1, momentum=0.5)
        state = transform.init(params)
        for step, step_key in enumerate(jax.random.split(key_data, 30)):
            key_batch, key_loss, _, _ = jax.random.split(step_key, 4)
            batch = TASK.batch(instance, key_batch, "train")
            loss, grads = jax.value_and_grad(TASK.loss)(params, instance, batch, key_loss)
            np.testing.assert_allclose(loss, curves.losses[seed, step], rtol=1e-4)
            updates, state = transform.update(grads, state)
            params = optax.apply_updates(params, updates)
        found = TASK.score(params, instance, "test")["loss"]
        np.testing.assert_allclose(found, curves.test["loss"][seed], rtol=1e-3)


def test_sweep_picks_the_best_rate_on_other_runs_than_it_reports():
    rates = (1e-4, 1e-2, 0.1, 0.5, 1e3)
    swept = evaluate.evaluate_baseline("adam", TASK, rates=rates, **SIZE)
    chosen_on = SIZE | {"seed": SIZE["seed"] + evaluate.SELECTION_OFFSET}
    finals, runs = {}, {}
    for rate in rates:
        optimizer = learnable_adam(rate)
        theta = optimizer.init(jax.random.key(0))
        finals[rate] = evaluate.evaluate_learned("adam", TASK, optimizer, theta, **chosen_on).final
        runs[rate] = evaluate.evaluate_learned("adam", TASK, optimizer, theta, **SIZE)
    best = min(finals, key=finals.get)
    assert swept.learning_rate == best
    np.testing.assert_allclose(swept.losses, runs[best].losses, rtol=1e-3, atol=1e-6)
    assert abs(swept.final - finals[best]) > 1e-3 * finals[best]  # Other runs indeed.
    assert len(evaluate.LEARNING_RATES) >= 12


def test_baselines_keep_the_rules_of_learned_optimizers():
    """The same steps on bfloat16, beside tensors without elements and none at all."""

    def init(instance, key):
        half = TASK.init(instance, key).astype(jnp.bfloat16)
        return {"w": half, "empty": jnp.zeros((0, 2)), "none": None, "small": jnp.bfloat16(0.5)}

    def loss(params, instance, batch, key):
        w = params["w"].astype(jnp.float32) + params["small"].astype(jnp.float32)
        return TASK.loss(w, instance, batch, key)

    task = TASK._replace(init=init, loss=loss, score=None)
    baseline = evaluate.evaluate_baseline("adam", task, rates=(0.1,), **SIZE)
    optimizer = learnable_adam(0.1)
    theta = optimizer.init(jax.random.key(0))
    learned = evaluate.evaluate_learned("adam", task, optimizer, theta, **SIZE)
    np.testing.assert_allclose(baseline.losses, learned.losses, rtol=1e-4)
    assert baseline.losses[:, -1].max() < baseline.losses[:, 0].min()


def test_final_is_the_last_tenth():
    losses = np.arange(40.0).reshape(2, 20)
    assert evaluate.Curves("x", losses).final == np.mean([18, 19, 38, 39])


def curves(name, finals, tests=None, rate=None):
    """One step a run, so that the final training loss is that step's."""
    test = {} if tests is None else {"accuracy": np.zeros(len(tests)), "loss": np.array(tests)}
    return Curves(name, np.array(finals, float)[:, None], rate, test)


def test_differences_are_paired_by_run():
    """Large differences between runs cancel: mean and standard error of 1, 2, 3 less 1, 1, 4."""
    ours, other = curves("a", [101, 202, 303], [1, 2, 3]), curves("b", [100, 201, 299], [1, 1, 4])
    assert ours.runs.keys() == {"mean training loss", FINAL, "test loss", "test accuracy"}
    found = evaluate.difference(ours, other)
    assert found[FINAL] == pytest.approx((2.0, 1.0))
    assert found["test loss"] == pytest.approx((0.0, 1 / 3**0.5))
    assert evaluate.is_tie(Estimate(2.0, 1.0)) and evaluate.is_tie(Estimate(-2.0, 1.0))
    assert not evaluate.is_tie(Estimate(2.1, 1.0)) and not evaluate.is_tie(Estimate(-2.1, 1.0))
    assert evaluate.is_tie(Estimate(5.0, float("nan")))  # One run tells nothing.
    assert np.isnan(evaluate.estimate(np.array([3.0])).error)


def test_verdicts_say_beats_ties_and_loses():
    ours = curves("mine", [1.0, 2.0, 3.0, 4.0], [1.0, 2.0, 3.0, 4.0])
    level = curves("level", [1.1, 1.9, 3.1, 3.9], [0.5, 1.4, 2.5, 3.5])
    above = curves("above", [2.0, 3.1, 4.0, 5.1], [1.5, 2.6, 3.5, 4.5])
    said = command.verdict(ours, [level, above], 7)
    assert "At 7 inner steps, mine" in said
    assert "in final training loss it ties with level, beats above" in said
    assert "in test loss it loses to level, beats above" in said
    diverged = curves("mine", [1.0, np.inf, 3.0, np.nan])
    assert "diverges in 2 of 4 runs" in command.verdict(diverged, [level], 7)
    assert "beats, by not diverging, mine" in command.verdict(
        level, [curves("mine", [1.0, np.inf, 3.0, 1.0], [1.0] * 4)], 7
    )
    assert "cannot be told" in command.verdict(curves("a", [1.0]), [curves("b", [2.0])], 7)


READS = {"value": True, "num_steps": False}


def test_limits_say_what_is_known():
    one, other = {"name": "mlp", "dim": 3}, {"name": "conv"}
    said = trained.limits(one, {"task": one, "horizon": 100}, [100], READS)
    assert said[0].startswith("It was trained on mlp (dim 3) alone, for 100 inner steps")
    assert not any("outside" in s for s in said)
    assert said[-1] == "It reads the loss: give each update `value=loss`."
    said = trained.limits(
        other,
        {"task": {"tasks": [one, other]}, "horizon": 100},
        [100, 500],
        {"value": False, "num_steps": True},
    )
    assert said[0] == (
        "It was trained on 2 tasks, for 100 inner steps, and is evaluated on another task, conv ()."
    )
    assert said[1] == "At 500 steps it works outside the 100 it was trained for."
    assert "Nothing is known beyond 500 steps" in said[2] and "`num_steps`" in said[-1]
    assert "not recorded" in trained.limits(one, {}, [9], READS)[0]
    found = {name: trained.reads_of(learned_opt.OPTIMIZERS[name]()) for name in ("l3rs", "sgdm")}
    assert found == {
        "l3rs": {"value": True, "num_steps": True},
        "sgdm": {"value": False, "num_steps": False},
    }
    # One that takes no network of the sizes asked about.
    assert not any(trained.reads_of(learned_opt.per_tensor_sgdm(num_tensors=99)).values())


@pytest.mark.parametrize(
    ("low", "high", "tasks", "said"),
    [
        (-0.3, -0.1, 6, "Meta-training helped on tasks it never saw, at 9 steps"),
        (-0.3, 0.1, 6, "changed nothing beyond the noise"),
        (0.1, 0.3, 6, "did NOT help"),
        (-0.3, -0.1, 5, "cannot be judged on tasks it never saw (5 are too few for a claim), at 9"),
    ],
)
def test_the_demo_says_whether_meta_training_helped(low, high, tasks, said):
    change = {"estimate": (low + high) / 2, "low": low, "high": high, "tasks": tasks}
    rows = [
        {"label": demo.TRAINED, "diverged": 1, "runs": 15},
        {"label": demo.UNTRAINED, "diverged": 9, "runs": 15},
    ]
    other = {"ours": demo.UNTRAINED, "other": demo.TRAINED, "train": {}}
    ours = {"ours": demo.TRAINED, "other": demo.UNTRAINED, "train": change}
    summary = {
        "horizons": {"9": {"rows": rows, "differences": [other, ours]}},
    }
    (sentence,) = demo.verdicts(summary)
    assert said in sentence and f"[{low:+.3f}, {high:+.3f}]" in sentence
    assert sentence.endswith("It diverged in 1 of 15 runs.")


def test_the_card_has_the_evaluation_once_before_its_limits(tmp_path):
    optimizer = learnable_adam()
    learned_opt.save(tmp_path, "adam", {}, optimizer.init(jax.random.key(0)))
    before, _, limits = (tmp_path / "README.md").read_text().partition("## Limits")
    assert before and limits  # Of every card.
    for number in (1, 2):
        demo.write_card(tmp_path, f"table {number}", ["it ties."])
    card = (tmp_path / "README.md").read_text()
    assert card.startswith(before.rstrip()) and card.endswith(f"## Limits{limits}")
    assert card.count("## Evaluation") == card.count("## Limits") == 1
    assert "table 2" in card and "table 1" not in card and "- it ties." in card


def drawn(name, num_steps, num_seeds, rate=None):
    """Runs as one would find them; ``bad`` diverges."""
    draw = np.random.default_rng([*name.encode(), num_steps, num_seeds])
    losses = draw.uniform(0.1, 1.0, (num_seeds, num_steps)).astype(np.float32)
    test = {"loss": draw.uniform(0.1, 1.0, num_seeds).astype(np.float32)}
    if name == "bad":
        losses[0, 1:], losses[1, -1], test["loss"][0] = np.inf, np.nan, -np.inf
    return Curves(name, losses, rate, test)


@pytest.fixture
def setting(tmp_path, monkeypatch):
    """Two trained optimizers, one of which diverges, and two baselines.

    Returns the command's core, the optimizers' folders, the list of what it has computed, and a
    dict whose ``at`` names where it is interrupted.
    """
    paths = {name: tmp_path / name for name in ("good", "bad")}
    for path in paths.values():
        learned_opt.save(path, "sgdm", {}, learnable_sgdm().init(jax.random.key(len(path.name))))
    theta = learnable_sgdm(0.3).init(jax.random.key(0))
    learned_opt.save(paths["bad"], "sgdm", {}, theta)
    computed: list = []
    failing: dict = {}

    def runs(rate, name, *what, num_steps, num_seeds, seed):
        assert seed == command.SEED and what[0] is TASK
        if name == failing.get("at"):
            raise KeyboardInterrupt
        computed.append((name, num_steps))
        return drawn(name, num_steps, num_seeds, rate)

    monkeypatch.setattr(command, "evaluate_learned", partial(runs, None))
    monkeypatch.setattr(command, "evaluate_baseline", partial(runs, 0.1))
    facts = to_dict(cfg.task("quadratic"))

    def run(folder, seeds=3, facts=facts):
        folder.mkdir(exist_ok=True)
        results = command.evaluate(TASK, facts, paths, [4, 9], seeds, folder)
        command.write(results, folder, facts, TASK, paths)
        return results, (folder / "evaluation.json").read_bytes()

    return run, paths, computed, failing


def test_an_interrupted_evaluation_continues(setting, tmp_path, capsys):
    """It computes nothing twice, and writes to the byte what one never stopped writes."""
    run, paths, computed, failing = setting
    _, whole = run(tmp_path / "whole")
    every = [(n, h) for h in (4, 9) for n in ("good", "bad", "adam", "sgdm")]
    assert computed == every
    assert not (tmp_path / "whole" / command.PARTS).exists()

    def stopped_at(name, folder):
        computed.clear()
        failing["at"] = name
        with pytest.raises(KeyboardInterrupt):
            run(folder)
        failing.clear()
        computed.clear()

    stopped_at("sgdm", tmp_path / "parted")
    assert not (tmp_path / "parted/evaluation.json").exists()
    assert run(tmp_path / "parted")[1] == whole
    assert computed == every[3:]

    # Other settings begin anew; of another optimizer, only its own results.
    stopped_at("sgdm", tmp_path / "seeds")
    run(tmp_path / "seeds", seeds=2)
    assert computed == every
    stopped_at("sgdm", tmp_path / "facts")
    run(tmp_path / "facts", facts=to_dict(cfg.task("quadratic", dim=4)))
    assert computed == every
    stopped_at("sgdm", tmp_path / "weights")
    learned_opt.save(paths["good"], "sgdm", {}, learnable_sgdm(0.2).init(jax.random.key(0)))
    run(tmp_path / "weights")
    assert computed == [every[0], *every[3:]]

    # A damaged part is computed again.
    stopped_at("sgdm", tmp_path / "damaged")
    parts = sorted((tmp_path / "damaged" / command.PARTS).iterdir())
    assert len(parts) == 3
    for part, damage in zip(parts, (lambda b: b[:-40], lambda b: b"", lambda b: b), strict=True):
        part.write_bytes(damage(part.read_bytes()))
    capsys.readouterr()
    run(tmp_path / "damaged")
    assert len(computed) == len(every) - 1
    warnings = [x for x in capsys.readouterr().err.splitlines() if x.startswith("warning: ")]
    assert len(warnings) == 2
    for part, warning in zip(parts[:2], sorted(warnings), strict=True):
        assert warning.endswith(f" {part} is damaged; it is computed again.")


def test_what_is_written_has_units_and_no_infinity(setting, tmp_path):
    run, _, _, _ = setting
    results, text = run(tmp_path / "out")

    def refuse(constant):
        raise AssertionError(constant)

    found = json.loads(text, parse_constant=refuse)
    assert found["task"] == {
        "name": "quadratic",
        "dim": 10,
        "condition": 100.0,
        "noise": 0.1,
        "batch_size": 1,
    }
    assert found["unit"] == "squared error"
    good, bad, adam, _ = found["results"]["9"]
    assert bad[FINAL]["mean"] is None and None in bad["losses"][0]
    for row in (good, adam):
        for measure in ("mean training loss", FINAL, "test loss"):
            assert row[measure]["unit"] == "squared error"
            np.testing.assert_allclose(
                row[measure]["mean"], np.mean(row["runs"][measure]), rtol=1e-4
            )
            assert row[measure]["standard_error"] > 0
    np.testing.assert_allclose(
        good["minus"]["adam"][FINAL]["mean"],
        good[FINAL]["mean"] - adam[FINAL]["mean"],
        rtol=1e-5,
    )
    facts = to_dict(cfg.task("quadratic"))
    table = command.table(results, facts, TASK)
    assert "Task: quadratic (dim 10, condition 100.0" in table and "digits" not in table
    assert "Losses in squared error" in table and "nats" not in table
    assert "9 inner steps, 3 runs" in table
    assert table.count("  minus adam") == 4  # Two optimizers, two horizons.
    assert command.table(results, facts, TASK, beside=["bad"]).count("  minus bad") == 2
    assert len(command.verdicts(results)) == 4
    broken = {
        horizon: [c._replace(test={"loss": c.test["loss"] * np.nan}) for c in curves]
        for horizon, curves in results.items()
    }
    warning, *others = command.verdicts(broken)
    assert len(others) == 4 and "the test loss of the task is not finite in any run" in warning


def test_a_score_has_the_unit_its_task_says_or_none(tmp_path):
    """Also one whose name ends like a loss; and the table speaks of what has one."""
    test = {name: np.ones(3) for name in ("loss", "accuracy", "perplexity", "auxiliary loss")}
    results = {
        20: [Curves("a", np.ones((3, 20)), None, test), Curves("b", np.ones((3, 20)), 0.1, test)]
    }
    task = TASK._replace(unit="volts", score_units={"accuracy": "share of examples"})
    command.write(results, tmp_path, {"name": "mine"}, task, {})
    (entry, _) = json.loads((tmp_path / "evaluation.json").read_text())["results"]["20"]
    assert {
        name: x["unit"] for name, x in entry.items() if isinstance(x, dict) and "unit" in x
    } == {
        "mean training loss": "volts",
        FINAL: "volts",
        "test loss": "volts",
        "test accuracy": "share of examples",
        "test perplexity": None,
        "test auxiliary loss": None,
    }
    assert entry["minus"]["b"][FINAL]["unit"] == "volts"
    table = command.table(results, {"name": "mine"}, task)
    assert "Losses in volts, accuracy as share of examples; mean" in " ".join(table.split())


def test_the_figure_says_task_horizon_runs_and_band(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(command.plt, "close", drawn.append)
    losses = np.abs(np.random.default_rng(0).normal(size=(3, 20))) + 0.1
    results = {20: [Curves("a", losses), Curves("adam", losses, 0.1)]}
    command.plot(
        results, tmp_path / "x.png", {"name": "mine", "dim": 3}, TASK._replace(unit="volts")
    )
    (figure,) = drawn
    said = figure.get_suptitle().replace("\n", " ")
    assert "mine (dim 3)" in said and "3 inner runs" in said and "band: middle 80%" in said
    (axis,) = figure.axes
    assert axis.get_ylabel() == "training loss (volts)" and axis.get_title() == "horizon 20"


def test_the_task_is_that_of_training_or_the_chosen_one(monkeypatch):
    mlp = cfg.task("mlp", activation="tanh", hidden_sizes=(7,))
    flat = {"dim": 10, "condition": 100.0, "noise": 0.1}  # Old cards had the fields of all tasks.
    own = {"a": {"task": to_dict(mlp)}, "b": {"task": to_dict(mlp) | flat}}
    quadratic = cfg.task("quadratic", dim=3)
    assert task_of(own, None) == mlp and task_of(own, quadratic) == quadratic
    mixture = TaskMixture(tasks=(mlp, quadratic))
    several = own | {"q": {"task": to_dict(quadratic)}}
    for cards in (
        several,
        {"silent": {}},
        own | {"silent": {}},
        {"m": {"task": to_dict(mixture)}},
    ):
        with pytest.raises(ValueError, match=r"choose one with --cfg\.task"):
            task_of(cards, None)
        assert task_of(cards, quadratic) == quadratic
    # By the folders as they were given, of which two may have one short name.
    with pytest.raises(ValueError, match=r"a/job/optimizer: mlp .*; b/job/optimizer: quadratic "):
        task_of({"a/job/optimizer": own["a"], "b/job/optimizer": several["q"]}, None)
    monkeypatch.setattr(evaluate_command, "_HORIZONS", SimpleNamespace(value=None))
    with pytest.raises(ValueError, match=r"a/optimizer at 3, b/optimizer at 5\); give --horizons"):
        evaluate_command._horizons({"a/optimizer": {"horizon": 3}, "b/optimizer": {"horizon": 5}})
    # Words for a task that is not chosen.
    node, _ = choices.take_words(["--cfg.task.dim=3"], "cfg")
    with pytest.raises(ValueError, match=r"--cfg\.task\.dim needs --cfg\.task=NAME"):
        choices.apply_words(EvaluationConfig(), node, "cfg")
