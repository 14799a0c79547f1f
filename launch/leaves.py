"""Leaf by leaf: names, and of theta, its step and the meta-gradient the sizes; histograms."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

BINS = 32


def measure(
    theta_tree: Callable[[Any], Any], before: np.ndarray, after: np.ndarray, grad: np.ndarray
) -> dict[str, Any]:
    """Metrics of an outer step: ``KIND_rms/LEAF`` and ``KIND_histogram``.

    Args:
      theta_tree: from a vector ``[P]`` to theta's pytree.
      before, after: theta around the step, ``[P]``.
      grad: the meta-gradient, ``[P]``.

    Returns:
      Numbers, and histograms of the finite entries (None where there are none): ``counts`` of
      ``BINS`` bins of equal width between ``low`` and ``high``.
    """
    found: dict[str, Any] = {}
    for kind, vector in (("theta", after), ("update", after - before), ("meta_grad", grad)):
        for name, leaf in named(theta_tree(vector)):
            size = np.sqrt(np.mean(np.square(np.asarray(leaf, np.float64)))) if leaf.size else 0.0
            found[f"{kind}_rms/{name or 'theta'}"] = float(size)
    return found | {
        "theta_histogram": histogram(after),
        "meta_grad_histogram": histogram(grad),
    }


def named(tree: Any) -> list[tuple[str, Any]]:
    """The leaves of a pytree in its order, each with its path as ``a/b``; alone, with none."""
    return [
        (jax.tree_util.keystr(path, simple=True, separator="/"), leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    ]


def histogram(values: np.ndarray) -> dict[str, Any] | None:
    """Of the finite ``values``, as ``measure`` says."""
    finite = np.asarray(values, np.float64)[np.isfinite(values)]
    if not finite.size:
        return None
    counts, edges = np.histogram(finite, BINS)
    return {"low": float(edges[0]), "high": float(edges[-1]), "counts": counts.tolist()}
