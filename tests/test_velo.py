"""VeLO against its authors' updates and a NumPy transcription of its recipe."""

import jax
import numpy as np
import pytest

import learned_opt
from tests import published

DECAYS = [0.9, 0.99, 0.999]


def log_size(x):
    return 0.5 * np.clip(np.log(1e-8 + abs(10 * x)), -5, 5)


def velo(theta, shapes):
    bank = theta["params"]["networks"]
    controller = published.Controller(theta["params"]["controller"], len(shapes))
    memories = {name: published.Accumulators(shape) for name, shape in shapes.items()}
    progress = published.Progress(6)

    def features(run, p, memory):
        scale = 1 / np.sqrt(max(1e-9, np.mean(p**2)))
        m, v = scale * memory.m.reshape(3, -1), scale * memory.v.ravel()
        mean = m.mean(axis=1, keepdims=True)
        spread_m, spread_v = np.mean((m - mean) ** 2, axis=1), np.mean((v - mean) ** 2, axis=1)
        rank = np.arange(5) == sum(n > 1 for n in p.shape)
        sizes = [log_size(x) for x in (v.mean(keepdims=True), spread_m, spread_v)]
        return np.concatenate([run, sizes[0], rank, *sizes[1:]])

    def rule(params, grads, t, loss):
        run = progress.features(t, loss)
        x = np.stack([features(run, params[name], memory) for name, memory in memories.items()])
        assert x.shape == (len(shapes), 30)
        rates, controls = controller.update(x)
        changes = {}
        for rate, control, (name, memory) in zip(rates, controls, memories.items(), strict=True):
            weights = {
                key: 100 * np.mean(control.reshape(-1, *[1] * (w.ndim - 1)) * w, axis=0)
                for key, w in bank.items()
            }
            g, p = np.clip(grads[name], -1000, 1000), params[name]
            memory.update(g, DECAYS, 0.999, DECAYS)
            axes = tuple(range(1, p.ndim + 1))
            x = published.thirty_inputs(g, p, memory, axes, 1e-5, 1e-6)
            d, m, _ = published.network(published.layers_of(weights), x)
            changes[name] = -rate * 1e-3 * d * np.exp(1e-3 * m) * np.sqrt(np.mean(p**2) + 1e-9)
        return changes

    return rule


def test_recipe():
    optimizer = learned_opt.velo_optimizer(hidden_size=5, num_networks=3)
    # The outputs of a random theta are differences of large numbers, and roundings of the LSTM's
    # state grow with the run: 1e-5 of the first update, 3e-4 of the sixth.
    published.check_transcription(optimizer, velo, single=1e-3)


def test_recorded_updates():
    optimizer = learned_opt.velo_optimizer(64, 32, network_mult=1.0, step_mult=1.0)
    published.check_recorded("velo_s", optimizer)


@pytest.mark.parametrize(("name", "count"), [("velo", 2_320_385), ("velo_s", 46_337)])
def test_size_of_theta(name, count):
    theta = jax.eval_shape(learned_opt.OPTIMIZERS[name]().init, jax.random.key(0))
    assert sum(leaf.size for leaf in jax.tree.leaves(theta)) == count


@pytest.mark.parametrize("argument", ["hidden_size", "num_networks", "network_mult", "exp_mult"])
def test_bad_arguments(argument):
    with pytest.raises(ValueError, match=rf"^`{argument}` must be .*got "):
        learned_opt.velo_optimizer(**{argument: 0})
