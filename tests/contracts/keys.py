"""The contract of every estimator on keys: in a whole job, each has one use."""

import collections
import dataclasses
import sys

import jax
import numpy as np
import pytest

from launch.job import build
from meta_train import devices
from tests.contracts.estimators import ESTIMATORS, HYBRIDS, small_job

# All that a key can be used for; also what derives other keys from it.
DRAWS = ("normal", "uniform", "bits", "bernoulli", "rademacher", "choice", "permutation")
USES = (*DRAWS, "split", "fold_in")
SLOW = pytest.mark.slow


@pytest.fixture
def uses_of(monkeypatch):
    """``{key: uses}`` of all that is compiled from here on, as it runs.

    A use is a function of ``jax.random`` and the line that called it. Numbers folded into one key
    make as many other keys of it, so they are part of that use's name, and not the line. Nor is
    the line that splits a key: the same split twice gives the same keys, each with its own use.
    """
    found = collections.defaultdict(set)

    def spied(name):
        function = getattr(jax.random, name)

        def spy(key, *args, **kwargs):
            caller = sys._getframe(1)
            use = name, caller.f_code.co_filename, caller.f_lineno

            def note(key, *number):
                key = tuple(np.ravel(key).tolist())
                if name == "fold_in":
                    found[key].add(name)
                    found[key, int(number[0])].add(use)
                elif name == "split":
                    found[key].add((name, int(args[0]) if args else 2))
                else:
                    found[key].add(use)

            if jax.dtypes.issubdtype(key.dtype, jax.dtypes.prng_key) and key.ndim == 0:
                number = [jax.numpy.uint32(x) for x in args[:1] if name == "fold_in"]
                jax.debug.callback(note, jax.random.key_data(key), *number)
            return function(key, *args, **kwargs)

        return spy

    for name in USES:
        monkeypatch.setattr(jax.random, name, spied(name))
    return found


def with_values(estimator, **values):
    """The estimator, and the one it is built on, with these values where they have the field."""
    fields = {field.name for field in dataclasses.fields(estimator)}
    own = {name: value for name, value in values.items() if name in fields}
    if "base" in fields:
        own["base"] = with_values(estimator.base, **values)
    return dataclasses.replace(estimator, **own)


# Their keys are those of `artbp` and `pes`, and they draw nothing of their own.
ALIKE = ("bptt", "full_es", "rtrl", "tbptt", "truncated_es")


@pytest.mark.parametrize(
    ("name", "hybrid", "sampler"),
    [(name, {}, "normal") for name in ESTIMATORS if name not in ALIKE]
    + [("hybrid_es", HYBRIDS[0], "normal"), ("reparam_es", {}, "orthogonal")]
    + [pytest.param(name, {}, "normal", marks=SLOW) for name in ALIKE]
    + [pytest.param("hybrid_es", hybrid, "normal", marks=SLOW) for hybrid in HYBRIDS[1:]]
    + [pytest.param("pes", {}, "orthogonal", marks=SLOW)],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else value,
)
def test_every_key_has_one_use(name, hybrid, sampler, uses_of):
    """From the seed on: no two draws share a key, nor a draw and what is derived from its key."""
    config = small_job(name, inner={"min_horizon": 4}, hybrid=hybrid)
    few = with_values(config.estimator, num_particles=16, sampler=sampler)
    job = build(dataclasses.replace(config, estimator=few, num_devices=1), None)
    state = devices.place(jax.jit(job.init)(), job.num_devices, job.axes)
    num_used = []
    for _ in range(2):
        state, metrics = job.step(state)
        jax.block_until_ready(metrics)
        jax.effects_barrier()
        num_used.append(len(uses_of))
    assert 10 < num_used[0] < num_used[1]
    assert not {key: uses for key, uses in uses_of.items() if len(uses) > 1}
