"""The tasks of the zoo in a table, and their facts: size, operations, data, scale of the loss.

    python -m launch.zoo > docs/tasks.md

Everything but tuned Adam's losses (see ``launch.tuned_adam``) is found by tracing the tasks and
looking at their data; nothing is trained.
"""

import functools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from launch import command_line


class Facts(NamedTuple):
    """What is known of a task before anything is trained.

    Attributes:
      parameters: how many numbers are trained.
      flops: floating-point operations of the loss and its gradient on one batch, as XLA counts them
        with all loops unrolled.
      unit: of the loss.
      constant: the loss of a constant prediction, the mean over instances; None if unknown.
      datasets: names of the data sets; empty: generated.
    """

    parameters: int
    flops: float
    unit: str
    constant: float | None
    datasets: tuple[str, ...]


# Instances over which a constant predictor's loss is a mean.
INSTANCES = 256


@functools.cache
def facts(name: str) -> Facts:
    """The facts of a task of the zoo.

    Raises:
      ValueError: if there is none of that name.
    """
    from launch.suites import zoo_task

    return facts_of(zoo_task(name))


def facts_of(config: Any, data_dir: str | None = None) -> Facts:
    """The facts of any task."""
    import jax
    import jax.numpy as jnp

    from launch.studies.shared.cost import unrolled_scans

    task, key = config.make(data_dir), jax.random.key(0)

    def drawn(key):
        instance = task.sample(key)
        return task.init(instance, key), instance, task.batch(instance, key, "train")

    params, instance, batch = jax.eval_shape(drawn, key)
    with unrolled_scans():
        # A fresh function each time: the trace cache does not see how scans are unrolled.
        gradient = jax.jit(jax.value_and_grad(lambda *given: task.loss(*given)))
        analysis: Any = gradient.lower(params, instance, batch, key).cost_analysis()
    constant = None
    if task.constant_loss is not None:
        losses = jax.vmap(lambda key: task.constant_loss(task.sample(key)))
        constant = float(jnp.mean(losses(jax.random.split(key, INSTANCES))))
    return Facts(
        sum(leaf.size for leaf in jax.tree.leaves(params)),
        float(analysis["flops"]),
        task.unit,
        constant,
        datasets_of(config),
    )


def datasets_of(config: Any) -> tuple[str, ...]:
    """The data sets that a task names, or the task in it."""
    while hasattr(config, "base"):
        config = config.base
    named = getattr(config, "dataset", None)
    return tuple(named.split(",")) if named else ()


def _tasks() -> Iterator[tuple[str, ...]]:
    """A row for each task of the zoo."""
    from launch.normalization import record_of
    from launch.suites import SUITES, ZOO, suite, zoo_task
    from meta_train.progress import progress

    yield (
        "task",
        "family",
        "in suites",
        "parameters",
        "operations a step",
        "data",
        "constant's loss",
        "tuned Adam's: train",
        "test",
        "unit",
    )
    for name, (family, _) in progress(ZOO.items(), desc="tasks", unit="task"):
        found, record = facts(name), record_of(zoo_task(name))
        adam = record and {split: _tuned(x) for split, x in record["adam"].items()}
        yield (
            f"`{name}`",
            f"`{family}`",
            ", ".join(word for word in SUITES if name in suite(word).tasks),
            f"{found.parameters:,}",
            f"{found.flops:,.0f}",
            ", ".join(f"`{dataset}`" for dataset in found.datasets) or "generated",
            "-" if found.constant is None else f"{found.constant:.4g}",
            adam["train"] if adam else "not run",
            adam["test"] if adam else "not run",
            found.unit,
        )


def _tuned(found: dict[str, float]) -> str:
    """Adam's loss, with a star where a better rate may lie beyond those tried."""
    from meta_train.evaluate import LEARNING_RATES

    at_edge = not LEARNING_RATES[0] < found["learning_rate"] < LEARNING_RATES[-1]
    return f"{found['loss']:.4g}{' *' if at_edge else ''}"


def _data() -> Iterator[tuple[str, ...]]:
    """A row for each data set that needs no download."""
    from tasks.data.bundled import IMAGES, TABLES, TEXTS, load_texts
    from tasks.data.images import load_images
    from tasks.data.pool import load_pool

    yield "data", "what", "train, validation, test", "from", "licence"
    sizes = load_images("digits").labels
    digits = "handwritten digits, grey, 8x8", "UCI (Alpaydin, Kaynak 1998), in scikit-learn"
    rows = [("digits", *digits, "CC BY 4.0 (scikit-learn: BSD)", [len(x) for x in sizes.values()])]
    for name, source in (IMAGES | TABLES).items():
        numbers = [sum(x) for x in load_pool(name).sizes.values()]
        rows.append((name, source.what, source.origin, source.licence, numbers))
    for name, text in TEXTS.items():
        numbers = [sum(x) for x in load_texts((name,)).sizes.values()]
        rows.append((name, text.what, text.origin, text.licence, numbers))
    for name, what, origin, licence, numbers in rows:
        yield f"`{name}`", what, " / ".join(f"{n:,}" for n in numbers), origin, licence


def _suites() -> Iterator[tuple[str, ...]]:
    from launch.suites import SUITES, suite

    yield "suite", "tasks", "horizons"
    for name in SUITES:
        found = suite(name)
        steps = ", ".join(f"{horizon:,}" for horizon in found.horizons)
        yield f"`{name}`", f"{len(found.tasks)}", steps


def markdown(rows: Iterable[Sequence[str]]) -> str:
    """A table whose first row is its head."""
    cells = ([cell.replace("|", "&#124;") for cell in row] for row in rows)
    lines = ["| " + " | ".join(row) + " |" for row in cells]
    head = "|" + "---|" * (lines[0].count("|") - 1)
    return "\n".join([lines[0], head, *lines[1:]])


INTRODUCTION = """# Tasks

Written by `python -m launch.zoo`. A task of the zoo is a family (`--cfg.task=FAMILY`) with the
arguments that `launch/suites.py` gives it; suites are sets of them. Operations are those of the
loss and its gradient on one batch. The constant's loss is that of the best constant prediction on
the training split (for language models the unigram entropy; where nothing is predicted, the loss of
the start; for training as a task, that of networks that never move), the mean over instances.

In the suites `train_small` and `train_wide` every second instance has its weights in other units
(the task `reparametrized`); the table is of the plain tasks. In Python
`launch.suites.zoo_task(NAME)` and `launch.suites.suite(NAME).tasks` are configurations, whose
`make()` is the task; `launch.normalization.normalized(loss, config)` puts a loss on the scale
below. [A suite of your own](extend.md#a-suite-and-data).

Tuned Adam's loss is that after 10,000 steps at the best of 21 constant rates, each split at its own
best rate, the mean of two seeds, or of six where instances differ; a star where that rate is the
first or the last of them, 0.0001 or 10. `python -m launch.tuned_adam`
finds it for the tasks not run yet. `launch.normalization` puts losses between the two: 1 is the
constant, 0 is Adam."""
SPLITS = """## Data

None needs a download. No example, patch of a picture's cell, or document is in two splits; what
else is known of them (writers, persons) is in the modules of `tasks/data`. Texts differ with the
version of Python; this table is of 3.11."""


def page() -> str:
    """The whole of docs/tasks.md."""
    suites = "## Suites\n\n" + markdown(_suites())
    return "\n\n".join(
        [INTRODUCTION, suites, "## Zoo\n\n" + markdown(_tasks()), SPLITS, markdown(_data())]
    )


def main(argv: list[str]) -> int:
    if argv:
        raise ValueError(f"give no names, got {argv}; the page is of all tasks.")
    print(page())
    return 0


if __name__ == "__main__":
    command_line.run_plain(main, __doc__)
