"""Of theta, its step and the meta-gradient now and then: the size leaf by leaf, and histograms."""

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
        for path, leaf in jax.tree_util.tree_leaves_with_path(theta_tree(vector)):
            name = jax.tree_util.keystr(path, simple=True, separator="/") or "theta"
            size = np.sqrt(np.mean(np.square(np.asarray(leaf, np.float64)))) if leaf.size else 0.0
            found[f"{kind}_rms/{name}"] = float(size)
    return found | {
        "theta_histogram": histogram(after),
        "meta_grad_histogram": histogram(grad),
    }


def histogram(values: np.ndarray) -> dict[str, Any] | None:
    """Of the finite ``values``, as ``measure`` says."""
    finite = np.asarray(values, np.float64)[np.isfinite(values)]
    if not finite.size:
        return None
    counts, edges = np.histogram(finite, BINS)
    return {"low": float(edges[0]), "high": float(edges[-1]), "counts": counts.tolist()}
