"""STAR against its authors' updates and a NumPy transcription of its recipe."""

import jax
import numpy as np
import pytest

import learned_opt
from tests import published
from tests.test_small_fc import outputs


def transcription(theta, shapes):
    """With weight decay 0.1 and both controllers."""
    memories = {name: published.Accumulators(shape) for name, shape in shapes.items()}

    def rule(params, grads, t, loss):
        del loss
        changes = {}
        for name, memory in memories.items():
            d, a, b, c = outputs(theta, grads[name], params[name], t, memory)
            root = (memory.v + 1e-6) ** -0.5
            changes[name] = -1e-3 * d * np.exp(1e-3 * a) * root
            changes[name] -= 2e-3 * np.exp(1e-3 * b) * memory.m.mean(axis=0) * root
            changes[name] -= 0.1 * np.exp(1e-3 * c) * params[name]
        return changes

    return rule


def test_recipe():
    optimizer = learned_opt.star_optimizer(
        nominal_step=2e-3,
        weight_decay=0.1,
        precondition=True,
        nominal_controller=True,
        decay_controller=True,
    )
    published.check_transcription(optimizer, transcription)


def test_recorded_updates():
    optimizer = learned_opt.star_optimizer(weight_decay=0.1, precondition=True)
    published.check_recorded("star", optimizer)


def test_size_of_theta():
    theta = jax.eval_shape(learned_opt.star_optimizer().init, jax.random.key(0))
    assert sum(leaf.size for leaf in jax.tree.leaves(theta)) == 207


@pytest.mark.parametrize("bad", [-1, np.inf, np.nan, "1", None])
@pytest.mark.parametrize("argument", ["nominal_step", "weight_decay", "step_mult"])
def test_bad_arguments(argument, bad):
    with pytest.raises(ValueError, match=rf"^`{argument}` must be .*got "):
        learned_opt.star_optimizer(**{argument: bad})
