"""Tables of scikit-learn: two classifications and a regression.

Splits: 70 / 15 / 15%, by class where there are classes; rows equal to an earlier one are left out.
Columns have mean 0 and variance 1 over the training rows, and so has the target of a regression.
"""

import functools

import numpy as np

from tasks.data.splits import Raw, Source, stratified


def read(name: str) -> tuple[Raw, int]:
    """Rows float32 ``[N, columns]``; 0 classes for a regression."""
    import sklearn.datasets

    table = getattr(sklearn.datasets, f"load_{name}")()
    columns, classes = np.asarray(table.data, np.float64), len(getattr(table, "target_names", ()))
    strata = table.target if classes else np.zeros(len(columns))
    raw = stratified(columns, table.target, {"validation": 0.15, "test": 0.15}, strata)
    center, spread = (getattr(raw["train"][0], f)(axis=0) for f in ("mean", "std"))
    mean, deviation = (0, 1) if classes else (raw["train"][1].mean(), raw["train"][1].std())
    dtype = np.int32 if classes else np.float32
    return {
        split: (
            ((x - center) / spread).astype(np.float32),
            ((y - mean) / deviation).astype(dtype),
        )
        for split, (x, y) in raw.items()
    }, classes


DATASETS = {
    name: Source(functools.partial(read, name), what, origin, "CC BY 4.0 (scikit-learn: BSD)")
    for name, what, origin in (
        ("breast_cancer", "tumours, 30 columns, 2 classes", "UCI, Wolberg et al. 1993"),
        ("wine", "wines, 13 columns, 3 classes", "UCI, Aeberhard and Forina 1992"),
    )
} | {
    "diabetes": Source(
        functools.partial(read, "diabetes"),
        "patients, 10 columns, a regression",
        "Efron, Hastie, Johnstone, Tibshirani 2004, in scikit-learn",
        "BSD-3-Clause (scikit-learn)",
    )
}
