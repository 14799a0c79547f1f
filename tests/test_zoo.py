"""The zoo, its suites and its page: what is held out, and that what is written is so."""

import json
import re
from pathlib import Path

import jax
import numpy as np
import pytest

from launch import normalization, tuned_adam, zoo
from launch.choices import to_dict
from launch.suites import SUITES, ZOO, suite, zoo_task
from tasks import BatchFraction, Linear, RecurrentLM, Reparametrized
from tasks.data.bundled import IMAGES, TABLES, TEXTS
from tasks.data.symbols import VOCABULARY

PAGE = (Path(__file__).parent.parent / "docs/tasks.md").read_text()
# Arguments that are no part of the architecture.
TRAINING = ("dataset", "batch_size", "label_noise", "init_scale", "standardize", "loss", "noise")


def architecture(config):
    """The family, and the arguments that make its network or its landscape, as one word."""
    tree = to_dict(config.unwrapped)
    return {json.dumps({k: v for k, v in tree.items() if k not in TRAINING}, sort_keys=True)}


def sources(config):
    """What the data are: one name for all sizes and colours of the same pictures."""
    known = IMAGES | TABLES | TEXTS
    return {known[name].what.split(",")[0] if name in known else name for name in named(config)}


def named(config):
    return set(zoo.datasets_of(config))


def union(names, function):
    return set().union(*(function(t) for name in names for t in suite(name).tasks.values()))


TRAINED = ("train_small", "train_wide")


def test_nothing_held_out_is_trained_on():
    """Of sources of data: no two of the three kinds of suites share one."""
    kinds = [union(names, sources) for names in (TRAINED, ["validation"], ["heldout"])]
    assert not any(kinds[a] & kinds[b] for a, b in ((0, 1), (0, 2), (1, 2)))
    # The published recipe has MNIST: no data set in common.
    assert not union(["celo4"], named) & union(["heldout", "validation"], named)
    # And no architecture.
    assert not union([*TRAINED, "celo4", "validation"], architecture) & union(
        ["heldout"], architecture
    )
    assert len(union(["heldout"], sources)) >= 4


def test_suites_have_the_sizes_they_should():
    sizes = {name: len(suite(name).tasks) for name in SUITES}
    assert sizes["celo4"] == 4 and 20 <= sizes["train_wide"] <= 40
    assert 10 <= sizes["heldout"] <= 12 and sizes["smoke"] == 3
    assert set(suite("train_small").tasks) < set(suite("train_wide").tasks)
    for name in SUITES:
        assert list(suite(name).horizons) == sorted(set(suite(name).horizons))
    members = {member for name in SUITES for member in suite(name).tasks}
    assert members == set(ZOO)
    longest = [suite(name).horizons[-1] for name in ("train_wide", "heldout")]
    assert longest[1] > longest[0]


def test_celo4_is_the_published_network():
    for config in suite("celo4").tasks.values():
        task = config.make()
        params = jax.eval_shape(task.init, (), jax.random.key(0))
        assert [layer["w"].shape for layer in params] == [(64, 32), (32, 10)]
        assert config.batch_size == 64


@pytest.mark.parametrize("name", ZOO)
def test_tasks_of_the_zoo_can_be_made(name):
    """Traced only, as far as its arguments and data decide: the start and a batch."""
    task = zoo_task(name).make()

    def run(key):
        instance = task.sample(key)
        return task.init(instance, key), task.batch(instance, key, "train")

    assert jax.tree.leaves(jax.eval_shape(run, jax.random.key(0)))
    assert task.score is not None and task.constant_loss is not None


@pytest.mark.parametrize(
    ("get", "message"),
    [
        (lambda: suite("held_out"), r"one of celo4, .*got 'held_out'. Did you mean 'heldout'"),
        (lambda: zoo_task("digit_mlp"), "got 'digit_mlp'. Did you mean 'digits_mlp'"),
        (lambda: tuned_adam.missing(["digit_mlp"]), "got 'digit_mlp'. Did you mean 'digits_mlp'"),
    ],
)
def test_unknown_names_are_named(get, message):
    with pytest.raises(ValueError, match=message):
        get()


def test_operations_are_counted():
    """Of a logistic regression most are in two products; a loop counts as often as it runs."""
    found = zoo.facts_of(Linear("wine", batch_size=1000))
    assert found.parameters == 13 * 3 + 3 and found.datasets == ("wine",)
    products = 2 * 2 * 1000 * 13 * 3  # Forward, and for the weights.
    assert products < found.flops < 1.6 * products
    for cell, gates in (("gru", 3), ("lstm", 4)):
        task = RecurrentLM(cell=cell, width=16, hidden_size=32, length=8, batch_size=4)
        found = zoo.facts_of(task)
        # The embedding's inputs have no derivative; all else has two products backwards.
        embedding, others = VOCABULARY * 16, gates * (16 + 32) * 32 + 32 * VOCABULARY
        products = 8 * 4 * 2 * (2 * embedding + 3 * others)
        assert products < found.flops < 1.25 * products, cell


def test_the_page_is_what_the_command_writes():
    """Names, families, suites and data in full; numbers for one task of each kind of data."""
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*) \|$", PAGE, re.M))
    assert set(rows) == {*ZOO, *SUITES, *IMAGES, *TABLES, *TEXTS, "digits"}
    for name, (family, _) in ZOO.items():
        cells = rows[name].split(" | ")
        assert cells[0] == f"`{family}`"
        assert cells[1] == ", ".join(s for s in SUITES if name in suite(s).tasks)
        datasets = zoo.datasets_of(zoo_task(name))
        assert cells[4] == (", ".join(f"`{d}`" for d in datasets) or "generated")
        record = normalization.record_of(zoo_task(name))
        adam = f"{record['adam']['train']['loss']:.4g}" if record else "not run"
        assert cells[6].removesuffix(" *") == adam
        at_edge = record and record["adam"]["train"]["learning_rate"] in (1e-4, 10)
        assert cells[6].endswith(" *") == bool(at_edge)
    for name in ("smoke_mlp", "tumours_logistic", "digits_vae"):
        cells, found = rows[name].split(" | "), zoo.facts(name)
        assert cells[2] == f"{found.parameters:,}" and cells[8] == found.unit
        np.testing.assert_allclose(float(cells[5]), found.constant, rtol=1e-3)
        np.testing.assert_allclose(float(cells[3].replace(",", "")), found.flops, rtol=0.1)


def test_records_of_adam_are_of_the_tasks_as_they_are():
    """Each names its command, is of a task that has not changed since, and beats the constant."""
    for name, record in normalization.records().items():
        config = zoo_task(name)
        assert normalization.record_of(config) == record
        assert record["settings"]["command"] == f"python -m launch.tuned_adam {name}"
        assert record["settings"]["steps"] == tuned_adam.NUM_STEPS
        assert record["adam"]["train"]["loss"] < record["constant"]
        for split, losses in record["losses"].items():
            best = min(loss for loss in losses if loss is not None)
            np.testing.assert_allclose(best, record["adam"][split]["loss"], atol=1e-6)


def test_losses_are_put_between_constant_and_adam():
    config = suite("smoke").tasks["smoke_logistic"]
    record = normalization.record_of(config)
    adam = record["adam"]["test"]["loss"]
    losses = np.array([record["constant"], adam, (record["constant"] + adam) / 2])
    found = normalization.normalized(losses, config, "test")
    np.testing.assert_allclose(found, [1, 0, 0.5], atol=1e-6)
    wrapped = Reparametrized(BatchFraction(config))
    np.testing.assert_allclose(normalization.normalized(losses, wrapped, "test"), found)
    with pytest.raises(ValueError, match=r"`config` must be a task of the zoo .*tuned_adam NAME"):
        normalization.normalized(1.0, Reparametrized(Linear("wine")))


def test_tuning_finds_adams_best_rate(monkeypatch):
    """On a quadratic, in few steps: the best of the rates, as optax's Adam has it."""
    monkeypatch.setattr(tuned_adam, "BLOCK", 20)
    found = tuned_adam.tune("smoke_quadratic", num_steps=40)
    losses = [loss for loss in found["losses"]["test"] if loss is not None]
    assert len(losses) == found["settings"]["rates"] == 21
    assert found["adam"]["test"]["loss"] == pytest.approx(min(losses), abs=1e-6)
    best = found["adam"]["test"]["learning_rate"]
    assert 0.01 < best < 2 and found["adam"]["test"]["loss"] < 0.3 * found["constant"]
    assert found["task"] == to_dict(zoo_task("smoke_quadratic"))
