"""Settings x seeds -> scores."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np

from meta_train.progress import progress


def sweep(
    score: Callable[[Any, int], Any], settings: Iterable[Any], num_seeds: int, name: str = "runs"
) -> Any:
    """``score(setting, seed)`` of every pair, with leaves stacked to ``[settings, seeds, ...]``.

    Args:
      score: returns numbers or arrays in any tree.
      name: what the progress bar says.
    """
    pairs = [(setting, seed) for setting in settings for seed in range(num_seeds)]
    scores = [score(*pair) for pair in progress(pairs, desc=name, leave=False)]

    def stack(*leaves):
        return np.stack(leaves).reshape(-1, num_seeds, *np.shape(leaves[0]))

    return jax.tree.map(stack, *scores)
