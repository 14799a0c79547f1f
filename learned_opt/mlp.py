"""The per-parameter MLP optimizer: one small network, applied to every parameter alike."""

import itertools
import math
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from learned_opt import features as feat
from learned_opt.arguments import check_between, check_flag, check_sizes
from learned_opt.base import LearnedOptimizer, learned_optimizer

NUM_FEATURES = 2 + len(feat.MOMENTUM_DECAYS)  # Gradient, parameter, momenta.
NUM_TIME_FEATURES = len(feat.TIMESCALES)

# Columns the network sees at a time. Of its value: with the hidden layers of so few, all fits in
# the fastest cache, and the first and last layer are sums that are fused with what is around them.
# Of its derivatives: few large products.
_BLOCK = 608
_BLOCK_OF_DERIVATIVES = 2560

# Tensors of up to so many parameters together are normalized side by side; a larger one block by
# block, so that memory does not grow by all its features.
_LARGEST_PART = 32768

Layers = tuple[tuple[jax.Array, jax.Array], ...]  # Kernels ``[in, out]`` and biases ``[out]``.


class Features(NamedTuple):
    """Eight features of every parameter, as they are formed block by block.

    Attributes:
      rows: arrays ``[*, P]`` of eight rows in all.
      scale: ``[8, 1]``, what the rows are multiplied by; None: nothing.
    """

    rows: tuple[jax.Array, ...]
    scale: jax.Array | None = None

    def of_columns(self, start, size: int) -> jax.Array:
        """``[8, size]``."""
        parts = [jax.lax.dynamic_slice(x, (0, start), (len(x), size)) for x in self.rows]
        rows = parts[0] if len(parts) == 1 else jnp.concatenate(parts)
        return rows if self.scale is None else self.scale * rows


class Rule(NamedTuple):
    """Scales of the update, and whether hidden layers multiply in bfloat16."""

    step_mult: float
    exp_mult: float
    bfloat16: bool = False

    def step(self, direction: jax.Array, magnitude: jax.Array) -> jax.Array:
        return -self.step_mult * direction * jnp.exp(self.exp_mult * magnitude)

    def hidden(self, kernel: jax.Array, x: jax.Array) -> jax.Array:
        """The product; sums are as wide as ever."""
        if not self.bfloat16:
            return kernel @ x
        narrow = kernel.astype(jnp.bfloat16), x.astype(jnp.bfloat16)
        return jnp.matmul(*narrow, preferred_element_type=jnp.result_type(kernel, x))


class PerParameterMLP(nn.Module):
    """Features of ``n`` columns and ``[11]`` time features to ``[n]`` steps.

    Features are ``[8, n]``; or ``Features``, of which some columns are meant. The eleven time
    features are the same for every parameter, so their product with the first kernel is a bias,
    computed once instead of once per parameter.
    """

    hidden_sizes: Sequence[int] = (32, 32)
    step_mult: float = 1e-3
    exp_mult: float = 1e-3
    bfloat16: bool = False

    @nn.compact
    def __call__(
        self,
        features: jax.Array | Features,
        time_features: jax.Array,
        columns: tuple[int, int] | None = None,
    ) -> jax.Array:
        if not isinstance(features, Features):
            columns = 0, features.shape[1]
            features = Features((features,))
        sizes = (NUM_FEATURES + NUM_TIME_FEATURES, *self.hidden_sizes, 2)
        layers = []
        for i, (fan_in, fan_out) in enumerate(itertools.pairwise(sizes)):
            stddev = fan_in**-0.5
            kernel = self.param(
                f"kernel_{i}", nn.initializers.truncated_normal(stddev), (fan_in, fan_out)
            )
            layers.append((kernel, self.param(f"bias_{i}", nn.initializers.zeros, (fan_out,))))
        kernel, bias = layers[0]
        layers[0] = kernel[:NUM_FEATURES], bias + time_features @ kernel[NUM_FEATURES:]
        assert columns is not None
        rule = Rule(self.step_mult, self.exp_mult, self.bfloat16)
        return _steps(tuple(layers), features, rule, columns)


@partial(jax.custom_jvp, nondiff_argnums=(2, 3))
def _steps(layers: Layers, features: Features, rule: Rule, columns: tuple[int, int]) -> jax.Array:
    """``-step_mult * d * exp(exp_mult * m)`` of the network's outputs d and m, ``[n]``.

    Sums differentiate badly (backpropagation takes 2.8 times as long), so derivatives are those
    of the products.
    """
    by_blocks, by_products = (partial(f, rule, columns) for f in (_by_blocks, _by_products))
    blockwise = jax.custom_batching.custom_vmap(by_blocks)

    @blockwise.def_vmap
    def _(size, batched, layers, features):
        axes = jax.tree.map(lambda is_batched: 0 if is_batched else None, tuple(batched))
        own_layers = 0 in jax.tree.leaves(axes[0])
        if size == 1:
            first = jax.tree.map(lambda x, i: x[0] if i else x, (layers, features), tuple(batched))
            return blockwise(*first)[None], True
        # With one kernel for all runs, products of blocks would be taken with a transposed factor
        # (twice the time), those of whole networks are not.
        return jax.vmap(by_blocks if own_layers else by_products, axes)(layers, features), True

    return blockwise(layers, features)


@_steps.defjvp
def _(rule, columns, primals, tangents):
    return jax.jvp(partial(_by_products, rule, columns), primals, tangents)


def _by_blocks(rule, where, layers: Layers, features: Features) -> jax.Array:
    (first, first_bias), *hidden, (last, last_bias) = layers
    begin, end = where
    columns = end - begin
    num_blocks = max(1, round(columns / _BLOCK))
    size = min(columns, math.ceil(columns / num_blocks / feat.LANES) * feat.LANES)
    hidden = _transposed(hidden)

    # Slices that would end beyond the last column begin earlier: such columns are computed twice.
    def block(i, steps):
        # Where the last block begins is said here: in the arrays there may be columns after it.
        at = jnp.minimum(i * size, columns - size)
        x = features.of_columns(begin + at, size)
        total = first_bias[:, None] + sum(first[j][:, None] * x[j] for j in range(NUM_FEATURES))
        h = jax.nn.relu(total)
        for kernel, bias in hidden:
            h = jax.nn.relu(rule.hidden(kernel, h) + bias[:, None])
        direction, magnitude = (
            jnp.sum(last[:, j, None] * h, axis=0) + last_bias[j] for j in range(2)
        )
        step = rule.step(direction, magnitude)
        return jax.lax.dynamic_update_slice(steps, step, (at,))

    # The edge of a loop is also where the compiler stops fusing: without it, it computes the last
    # layer again for whatever uses the step.
    steps = jnp.zeros(columns, jnp.result_type(*jax.tree.leaves((features, layers))))
    return jax.lax.fori_loop(0, num_blocks, block, steps)


def _by_products(rule, where, layers: Layers, features: Features) -> jax.Array:
    (first, first_bias), *hidden, (last, last_bias) = _transposed(layers)

    def network(block):
        block = jax.nn.relu(first @ block + first_bias[:, None])
        for kernel, bias in hidden:
            block = jax.nn.relu(rule.hidden(kernel, block) + bias[:, None])
        return last @ block + last_bias[:, None]

    begin, end = where
    outputs = feat.map_blocks(
        network, features.of_columns(begin, end - begin), _BLOCK_OF_DERIVATIVES
    )
    # Split, not indexed: the derivative is a concatenation, not a sum of padded rows.
    direction, magnitude = jnp.split(outputs, 2)
    return rule.step(direction, magnitude).reshape(-1)


def _transposed(layers):
    # On their own: XLA takes a slower routine for products that transpose.
    return [(jax.lax.optimization_barrier(kernel.T), bias) for kernel, bias in layers]


class MLPOptimizerState(NamedTuple):
    """State of the MLP optimizer.

    Attributes:
      steps: int32 scalar, updates done.
      momenta: ``[6, P]``, a row per decay, the parameters in the order of ``jax.tree.leaves``.
    """

    steps: jax.Array
    momenta: jax.Array


def mlp_optimizer(
    hidden_sizes: Sequence[int] = (32, 32),
    step_mult: float = 1e-3,
    exp_mult: float = 1e-3,
    bfloat16: bool = False,
) -> LearnedOptimizer:
    """The per-parameter MLP optimizer ("LOLv2"): 19 features, 1,762 meta-parameters.

    For every parameter, the gradient, the parameter and six momenta are divided by their
    root mean square over the tensor; with eleven ``tanh`` time features they pass through
    an MLP with ReLU to a direction ``d`` and a magnitude ``m``, and the update is
    ``-step_mult * d * exp(exp_mult * m)``. ``num_steps`` is not used.

    A parameter whose gradient is exactly zero moves all the same: the network has no reason to
    answer zero features with a zero direction. ``mask_zero_gradients`` holds it still.

    Args:
      hidden_sizes: width of each hidden layer.
      step_mult: scale of the update.
      exp_mult: scale of the log-magnitude.
      bfloat16: whether the products of hidden layers are of bfloat16 (sums are not): for processors
        that multiply it. The meta-gradient of PES is then off by 1.1%, at most 1.5%: little beside
        its noise, but it does not average out; one without (AMD EPYC, AVX2) takes 1.35 times as
        long (`python -m launch.benchmark --cases=bfloat16 --cores=1`, 2026-11-26, JAX 0.10).

    Raises:
      ValueError: if a size is no whole number above 0, a multiplier not positive and finite, or
        ``bfloat16`` no boolean.

    Source: Metz et al. 2019 (arXiv 1810.10180); the recipe of ``mlp_lopt`` in
    google/learned_optimization.
    """
    check_sizes(hidden_sizes=hidden_sizes)
    check_between(0, math.inf, step_mult=step_mult, exp_mult=exp_mult)
    check_flag(bfloat16=bfloat16)
    module = PerParameterMLP(tuple(hidden_sizes), step_mult, exp_mult, bfloat16)

    def init(key):
        return module.init(key, jnp.zeros((NUM_FEATURES, 1)), jnp.zeros(NUM_TIME_FEATURES))

    def bind(theta, num_steps):
        del num_steps

        def init_fn(params):
            return MLPOptimizerState(jnp.zeros([], jnp.int32), feat.init_momenta(params))

        def update_fn(updates, state, params=None, **extra):
            del extra
            if params is None:
                raise ValueError(
                    "The MLP optimizer reads the parameters: call `update(grads, state, params)`."
                )
            momenta = feat.update_momenta(state.momenta, updates)
            grads, weights = jax.tree.leaves(updates), jax.tree.leaves(params)
            time = feat.time_embedding(state.steps, momenta.dtype)
            end, steps = 0, []
            for part in _parts([grad.size for grad in grads]):
                begin, end = end, end + sum(grad.size for grad in grads[part])
                if end - begin > _LARGEST_PART:
                    features = _features_of_one(grads, weights, momenta, (begin, end))
                    step = module.apply(theta, features, time, (begin, end))
                else:
                    own = momenta[:, begin:end]
                    features = feat.normalized_features(grads[part], weights[part], own)
                    step = module.apply(theta, features, time)
                steps += feat.unflatten(step, grads[part])
            steps = jax.tree.unflatten(jax.tree.structure(updates), steps)
            return steps, MLPOptimizerState(state.steps + 1, momenta)

        return optax.GradientTransformationExtraArgs(init_fn, update_fn)

    return learned_optimizer(init, bind, moves_without_gradient=True)


def _parts(sizes: Sequence[int]) -> list[slice]:
    """Leaves side by side, as many as are small enough together; a large one alone."""
    starts, total = [0], 0
    for i, size in enumerate(sizes):
        if total and size and total + size > _LARGEST_PART:
            starts, total = [*starts, i], 0
        total += size
    return [slice(*ends) for ends in itertools.pairwise([*starts, len(sizes)])]


def _features_of_one(grads, params, momenta, columns: tuple[int, int]) -> Features:
    """Of the tensor that is in these columns: what ``features.normalized_features`` gives."""
    rows = feat.flat(grads)[None], feat.flat(params)[None], momenta
    # One row after the other: the compiler writes to memory what a mean is taken of.
    squares = [jax.lax.map(lambda row: jnp.mean(jnp.square(row[slice(*columns)])), x) for x in rows]
    return Features(rows, jax.lax.rsqrt(1e-5 + jnp.concatenate(squares)[:, None]))
