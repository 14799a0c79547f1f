"""Steps that stay right for a wider network: muP, without a change of the model."""

import warnings
from typing import Any

import jax
import numpy as np
import optax

from learned_opt.arguments import check_flag

Params = Any


class WideNetworkWarning(UserWarning):
    """A network is wider than those that an optimizer was trained on."""


def scale_by_width(
    transform: optax.GradientTransformation,
    base_params: Params,
    *,
    model_scales_output: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """``transform``, with the update of each tensor times what its width calls for.

    For a network wider than those an optimizer was trained or tuned on, whose updates have a size
    that does not depend on the width (Adam and the networks here do so; SGD and
    Muon do not):
    ``tx = scale_by_width(optimizer.bind(theta, num_steps), base_params)``. An axis is wide where
    it differs from ``base_params``, the same network at the width of training. The multiplier is

    - ``base fan_in / fan_in`` for a tensor with a wide axis before its last one: hidden and output
      weights; ``fan_in`` is the first such axis;
    - 1 for all others: input weights, embeddings, biases and scales.

    So hidden activations and outputs move as much in every width. It is the muP of Adam for a
    model in its standard form whose output weights start at 0, or at ``1 / fan_in``; a model that
    multiplies its output by ``base / width`` itself, as muLO's tasks do, sets
    ``model_scales_output``, and output weights keep their updates.

    Args:
      base_params: parameters of the base network, or what ``jax.eval_shape`` makes of its ``init``:
        only shapes are read. Axes are in the order of Flax: ``[..., inputs, outputs]``.
      model_scales_output: whether output weights (one wide axis, not the last) are left alone.

    Raises:
      ValueError: on a flag that is no bool; from ``init`` and ``update``, by the name of the leaf,
        if ``base_params`` has another structure or a leaf another number of axes.

    Source: Yang and Hu et al. 2021 (arXiv 2203.03466), table 3; Therien et al. 2024 (muLO, arXiv
    2406.00153), whose multiplier of hidden weights is this one at a base of one unit.
    """
    check_flag(model_scales_output=model_scales_output)
    inner = optax.with_extra_args_support(transform)

    def multiplier(path, x, base):
        if x.ndim != len(np.shape(base)):
            where = f" at {jax.tree_util.keystr(path)}" if path else ""
            raise ValueError(
                f"`base_params` must be the parameters of the same network, got a leaf of shape "
                f"{np.shape(base)} for {x.shape}{where}."
            )
        if 0 in np.shape(base) and 0 not in x.shape:
            where = f" at {jax.tree_util.keystr(path)}" if path else ""
            raise ValueError(
                f"`base_params` must have no axis of size 0 where the parameters have none, got "
                f"shape {np.shape(base)} for {x.shape}{where}."
            )
        wide = [
            i
            for i, sizes in enumerate(zip(x.shape, np.shape(base), strict=True))
            if sizes[0] != sizes[1]
        ]
        is_output = len(wide) == 1
        if not wide or wide[0] == x.ndim - 1 or (is_output and model_scales_output):
            return 1.0
        return np.shape(base)[wide[0]] / x.shape[wide[0]]

    def multipliers(params):
        given, expected = (jax.tree.structure(tree) for tree in (base_params, params))
        if given != expected:
            raise ValueError(
                f"`base_params` must have the structure of the parameters, got {given} for "
                f"{expected}."
            )
        return jax.tree_util.tree_map_with_path(multiplier, params, base_params)

    def init(params):
        multipliers(params)
        with warnings.catch_warnings():  # What it warns of is what this is for.
            warnings.simplefilter("ignore", WideNetworkWarning)
            return inner.init(params)

    def update(updates, state, params=None, **extra):
        steps, state = inner.update(updates, state, params, **extra)
        return jax.tree.map(lambda m, s: m * s, multipliers(updates), steps), state

    return optax.GradientTransformationExtraArgs(init, update)
