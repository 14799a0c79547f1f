"""Celo and Celo-Adam against their authors' updates, at their published theta, and transcribed."""

import jax
import jax.flatten_util
import numpy as np
import pytest

import learned_opt
from launch import config as cfg
from launch import job
from tests import published
from tests.systems import leaves_equal

DECAYS = [0.9, 0.99, 0.999]


def size(theta):
    return sum(leaf.size for leaf in jax.tree.leaves(theta))


def celo(phase, theta, shapes):
    layers = published.layers_of(theta["params"]["rule"])
    scheduler = published.Controller(theta["params"]["scheduler"], len(shapes))
    memories = {name: published.Accumulators(shape) for name, shape in shapes.items()}
    progress = published.Progress(6)

    def rule(params, grads, t, loss):
        x = np.tile(progress.features(t, loss), (len(shapes), 1))
        rates = 0.1 * np.exp(scheduler.update(x)[0]) if phase != 1 else np.ones(len(shapes))
        changes = {}
        for rate, (name, memory) in zip(rates, memories.items(), strict=True):
            g, p = np.clip(grads[name], -1000, 1000), params[name]
            memory.update(g, DECAYS, 0.999, DECAYS)
            axes = tuple(range(1, p.ndim + 1))
            x = published.thirty_inputs(g, p, memory, axes, 1e-5, 1e-6)
            d, m, _ = published.network(layers, x)
            changes[name] = -rate * 1e-3 * d * np.exp(1e-3 * m) * np.sqrt(np.mean(p**2) + 1e-9)
        return changes

    return rule


def celo_adam(theta, shapes):
    scheduler = published.Controller(theta["params"], 1)
    moments, progress = dict.fromkeys(shapes, (0.0, 0.0)), published.Progress(6)

    def rule(params, grads, t, loss):
        del params
        rate = 1e-3 * 0.1 * np.exp(scheduler.update(progress.features(t, loss)[None])[0][0])
        changes = {}
        for name, (m, v) in moments.items():
            g = np.clip(grads[name], -1000, 1000)
            moments[name] = m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
            m, v = m / (1 - 0.9 ** (t + 1)), v / (1 - 0.999 ** (t + 1))
            changes[name] = -rate * m / (1e-8 + np.sqrt(v + 1e-10))
        return changes

    return rule


@pytest.mark.parametrize("phase", [0, 1])
def test_recipe(phase):
    optimizer = learned_opt.celo_optimizer(hidden_size=5, phase=phase)
    shapes = published.SHAPES if phase == 0 else {"matrix": (2, 3)}
    published.check_transcription(optimizer, lambda *given: celo(phase, *given), shapes=shapes)


def test_recipe_with_adam():
    optimizer = learned_opt.celo_adam_optimizer(hidden_size=5)
    # Bias correction divides by 1 - 0.999^t, which single precision knows to 3e-5.
    published.check_transcription(optimizer, celo_adam, single=5e-5)


@pytest.mark.parametrize(("name", "count"), [("celo", 37_089), ("celo_adam", 36_865)])
def test_recorded_updates(name, count):
    optimizer = learned_opt.OPTIMIZERS[name]()
    assert size(jax.eval_shape(optimizer.init, jax.random.key(0))) == count
    published.check_recorded(name, optimizer)


@pytest.mark.parametrize(
    ("name", "argument", "bad"),
    [
        ("celo", "hidden_size", 0),
        ("celo", "phase", 3),
        ("celo", "phase", True),
        ("celo", "step_mult", 0.0),
        ("celo_adam", "eps", -1.0),
        ("celo_adam", "hidden_size", 1.5),
    ],
)
def test_bad_arguments(name, argument, bad):
    with pytest.raises(ValueError, match=rf"^`{argument}` must be .*got "):
        learned_opt.OPTIMIZERS[name](**{argument: bad})


@pytest.mark.parametrize("name", ["celo", "celo_adam", "velo_s"])
def test_reads_the_loss(name):
    optimizer = learned_opt.OPTIMIZERS[name](hidden_size=3)
    transform = optimizer.bind(optimizer.init(jax.random.key(0)), 10)
    with pytest.raises(ValueError, match=r"reads the parameters and the loss: call .*value=loss"):
        transform.update(np.ones(3), transform.init(np.ones(3)), np.ones(3))


@pytest.mark.parametrize(("phase", "held"), [(0, []), (1, ["scheduler"]), (2, ["rule"])])
def test_phases_train_their_part_from_where_the_other_ended(phase, held, tmp_path):
    arguments = {"hidden_size": 2, "step_mult": 1e-3, "exp_mult": 1e-3, "phase": 1}
    optimizer = learned_opt.celo_optimizer(hidden_size=2)
    theta = jax.tree.map(np.asarray, optimizer.init(jax.random.key(7)))
    learned_opt.save(tmp_path, "celo", arguments, theta)
    config = cfg.Config(
        task=cfg.task("quadratic"),
        optimizer=cfg.optimizer("celo", hidden_size=2, phase=phase),
        meta=cfg.meta_optimizer("adamw", learning_rate=1.0),
        init_from=str(tmp_path),
    )
    made = job.build(config, None)
    assert leaves_equal(made.trainable.start(), theta)
    begin = jax.flatten_util.ravel_pytree(theta)[0]
    state = made.meta_optimizer.init(begin)
    moved = made.theta_tree(made.meta_optimizer.update(1 + 0 * begin, state, begin)[0])["params"]
    for part, steps in moved.items():
        for step in jax.tree.leaves(steps):
            assert np.all((step == 0) == (part in held))
