"""Training as the loss of a task: the parameters are an optimizer's, the batch is whole runs."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from tasks.base import Params, Task

# How many runs the score of a split, and the loss of networks that rest, are a mean of.
SCORE_RUNS = 64


class Rule(NamedTuple):
    """An optimizer with parameters.

    Attributes:
      init: ``key -> theta``.
      start: ``weights -> state``.
      update: ``(theta, state, gradient, step) -> (what is added to the weights, state)``.
    """

    init: Callable[[jax.Array], Params]
    start: Callable[[Params], Any]
    update: Callable[[Params, Any, Params, jax.Array], tuple[Params, Any]]


def unrolled(base: Task, rule: Rule, *, steps: int, runs: int) -> Task:
    """The mean loss of ``base`` after each of ``steps`` steps of ``rule``, over ``runs`` runs.

    The gradient goes through the whole training. A run's examples, those it trains on included, are
    of the split that is asked for, so ``test`` says how the rule trains on data it never saw. The
    constant predictor's loss is that of networks that are never moved; it and the score are means
    over 64 fixed runs.
    """

    def batch(instance, key, split):
        del instance

        def one(key):
            keys = jax.random.split(key, steps + 3)
            own = base.sample(keys[0])
            batches = jax.vmap(lambda k: base.batch(own, k, split))(keys[2:])
            return own, base.init(own, keys[1]), batches

        return jax.vmap(one)(jax.random.split(key, runs))

    def loss(params, instance, batch, key):
        del instance

        def one(own, weights, batches):
            first, rest = (
                jax.tree.map(lambda x: x[0], batches),
                jax.tree.map(lambda x: x[1:], batches),
            )
            gradient = jax.value_and_grad(lambda w, examples: base.loss(w, own, examples, key))

            def step(carry, inputs):
                weights, state, gradients = carry
                index, examples = inputs
                moves, state = rule.update(params, state, gradients, index)
                weights = jax.tree.map(lambda w, m: (w + m).astype(w.dtype), weights, moves)
                found, gradients = gradient(weights, examples)
                return (weights, state, gradients), found

            start = weights, rule.start(weights), gradient(weights, first)[1]
            inputs = jnp.arange(steps), jax.tree.map(lambda x: x[:steps], rest)
            return jnp.mean(jax.lax.scan(step, start, inputs)[1])

        return jnp.mean(jax.vmap(one)(*batch))

    def score_keys():
        return jax.random.split(jax.random.key(0), -(-SCORE_RUNS // runs))

    def score(params, instance, split):
        found = jax.vmap(lambda k: loss(params, instance, batch(instance, k, split), k))(
            score_keys()
        )
        return {"loss": jnp.mean(found)}

    @functools.cache
    def resting():
        def mean(key):  # The same as `loss` where nothing moves.
            def one(own, weights, batches):
                unmoved = jax.vmap(lambda examples: base.loss(weights, own, examples, key))
                return jnp.mean(unmoved(jax.tree.map(lambda x: x[1:], batches)))

            return jnp.mean(jax.vmap(one)(*batch((), key, "train")))

        with jax.ensure_compile_time_eval():
            return jnp.mean(jax.jit(jax.vmap(mean))(score_keys()))

    return Task(
        sample=lambda key: (),
        init=lambda instance, key: rule.init(key),
        batch=batch,
        loss=loss,
        score=score,
        unit=base.unit,
        constant_loss=lambda instance: resting(),
    )
