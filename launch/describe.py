"""What learned optimizers cost and read; without a name, all of them in a table.

    python -m launch.describe [NAME ...] [--import=MODULE]
    python -m launch.describe --table > docs/optimizers.md

NAME is a registered optimizer, MODULE:NAME one of your own, or the folder of an exported one. All
answers are found by tracing the optimizer; nothing is computed.
"""

import inspect as python_inspect
import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags

from launch import command_line

if TYPE_CHECKING:
    from learned_opt import LearnedOptimizer

_TABLE = flags.DEFINE_bool("table", False, "Print docs/optimizers.md.")

_COLUMNS = ("name", "theta", "bytes", "parameters", "loss", "num_steps", "without gradient")


def describe(name: str) -> str:
    """Everything about one optimizer, in lines.

    Raises:
      ValueError: if there is none of that name, or the folder holds no trained optimizer.
    """
    from launch.trained import counted
    from learned_opt.inspection import LARGE, SMALL, inspect

    optimizer, training = _find(name)
    found = inspect(optimizer)
    lines = [("meta-parameters", f"{found.num_meta_parameters:,}")]
    lines += [
        (
            "state" if size == SMALL else "",
            f"{found.state_bytes[size]:.2f} bytes a parameter (Adam {found.adam_bytes[size]:.2f}) "
            f"for a network of {size:,} parameters in {counted(found.num_tensors, 'tensor')}",
        )
        for size in (SMALL, LARGE)
    ]
    for key, words in _READ.items():
        reading = found.reads[key]
        lines.append((f"reads {words}", _answer(reading)))
    lines.append(("without gradient", "moves" if found.moves_without_gradient else "rests"))
    if found.num_tensors != 4:
        lines.append(("takes", f"networks of {counted(found.num_tensors, 'tensor')}"))
    horizon = "not trained" if training is None else _horizon(training)
    lines.append(("trained for", horizon))
    return "\n".join([name, *(f"  {label:<22}{text}" for label, text in lines)])


_READ = {"params": "the parameters", "value": "the loss", "num_steps": "num_steps"}


def _answer(reading: Any) -> str:
    if reading.used:
        return "yes" if reading.needed else "yes, where it is given"
    return "no"


def _horizon(training: dict[str, Any]) -> str:
    if training.get("horizon") is None:
        return "a horizon that was not recorded"
    from launch.trained import in_short

    of = f" of {in_short(training['task'])}" if training.get("task") else ""
    return f"{training['horizon']:,} steps{of}"


def _find(name: str) -> tuple["LearnedOptimizer", dict[str, Any] | None]:
    """The optimizer, and how it was trained if it was."""
    import learned_opt
    from launch.choices import KINDS, find, suggest
    from launch.trained import check_folder

    trained = os.path.isdir(os.path.expanduser(name)) or name in learned_opt.available()
    if name not in learned_opt.OPTIMIZERS and trained:
        check_folder("NAME", name, or_a_name=True)
        return learned_opt.load(name)[0], learned_opt.load_config(name)["training"]
    if name not in learned_opt.OPTIMIZERS and ":" not in name:
        raise ValueError(
            f"NAME must be one of {', '.join(sorted(learned_opt.OPTIMIZERS))}, MODULE:NAME for one "
            f"of your own, a trained one of the package ({', '.join(learned_opt.available())}), or "
            f"the folder of an exported optimizer, got {name!r}."
            f"{suggest(name, [*learned_opt.OPTIMIZERS, *learned_opt.available()])}"
        )
    try:
        cls = find(KINDS["OptimizerConfig"], name)
    except ValueError as error:
        raise ValueError(f"NAME {error}") from error.__cause__
    made = cls().make()
    if not isinstance(made, learned_opt.LearnedOptimizer):
        raise ValueError(f"NAME {name!r} must make a LearnedOptimizer, got {type(made).__name__}.")
    return made, None


def rows() -> Iterator[tuple[str, ...]]:
    """The columns, then a row for each registered optimizer; bytes are of the state a parameter."""
    import learned_opt
    from learned_opt.inspection import LARGE, inspect

    yield _COLUMNS
    for name, make in learned_opt.OPTIMIZERS.items():
        made = make()
        found = inspect(made.make() if isinstance(made, learned_opt.OptimizerConfig) else made)
        yield (
            name,
            f"{found.num_meta_parameters:,}",
            f"{found.state_bytes[LARGE]:.2f}",
            *(_answer(found.reads[key]) for key in _READ),
            "moves" if found.moves_without_gradient else "rests",
        )


def table() -> str:
    """``rows`` side by side."""
    from learned_opt import learnable_adam
    from learned_opt.inspection import LARGE, inspect

    adam = inspect(learnable_adam()).adam_bytes[LARGE]
    lines = list(rows())
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    ]
    note = (
        f"bytes: of the state, for each parameter of a network of {LARGE:,} parameters in 4 "
        f"tensors (Adam {adam:.2f}; smaller networks take more, see "
        "`describe NAME`); parameters, loss, num_steps: whether it reads them."
    )
    return "\n".join([*text, "", note])


INTRODUCTION = """# Learned optimizers

Written by `python -m launch.describe --table`. Chosen by `--cfg.optimizer=NAME`, or made by their
functions in `learned_opt`. *theta*: meta-parameters. *Bytes*: of the state, for each parameter of
a network of a million (Adam 8). *Parameters*, *loss* (`value=loss`), `num_steps`: whether updates
read them. *Without gradient*: whether a parameter moves whose gradient has always been 0.

*Recorded*: the largest error over twelve updates that the authors' own code computed on a fixed
problem, over the largest update of the tensor, beyond the rounding of the recorded parameters; from
`LEARNED_OPT_RECORDED_ERRORS=$PWD/launch/recorded_errors.json python -m pytest -n 0 -k recorded
-m "slow or not slow"`, where the recordings are (2026-11-26, CPU, float32). All others are held to
a transcription of their recipe in NumPy."""

SPEED = """## Time and memory

From `python -m launch.benchmark --cases=optimizers --into=launch/benchmarks/optimizers.json` with a
theta as drawn. Times are over those of `optax.adam` in the same run, in turns, of a whole training
step (batch, gradient, update) of a 64-32-10 network on the digits at batch 64, alone and 32 of them
side by side with a theta each, of a million parameters (64-960-960-10) and of a Transformer of 50
tensors; *update*: of the update alone at a million. *Memory*: what that update allocates, over the
bytes of the state. *Compile*: of the program of the million, over Adam's."""


def page() -> str:
    """The whole of docs/optimizers.md."""
    from launch.zoo import markdown

    return "\n\n".join(
        [INTRODUCTION, markdown(_facts()), SPEED, measured_on(), markdown(_speeds())]
    )


def _facts() -> Iterator[tuple[str, ...]]:
    import learned_opt

    errors = recorded_errors()
    found = rows()
    yield *next(found), "recorded", "source"
    for name, *cells in found:
        yield f"`{name}`", *cells, errors.get(name, "-"), source(learned_opt.OPTIMIZERS[name])


def recorded_errors() -> dict[str, str]:
    """``optimizer -> error`` as last printed by the tests."""
    path = Path(__file__).with_name("recorded_errors.json")
    found = json.loads(path.read_text()) if path.is_file() else {}
    return {name: f"{error:.1e}" if error else "0" for name, error in found.items()}


def source(make: Callable) -> str:
    """The publication that an optimizer's docstring names."""
    words = " ".join((python_inspect.getdoc(make) or "").split())
    named = re.search(r"Source: (.*?)(?:;|\.(?= [A-Z]|$)|(?<=\)),)", words)
    return named[1].replace("``", "`") if named else "-"


def measured_on() -> str:
    """The machines and days of the benchmark's file."""
    from launch.benchmarks import optimizers

    found = {
        "{machine}, {cores} core(s), JAX {jax}, {date}".format(**line)
        for lines in optimizers.read().values()
        for line in lines.values()
    }
    return f"Measured on {'; '.join(sorted(found))}." if found else "Not measured yet."


def _speeds() -> Iterator[tuple[str, ...]]:
    from launch.benchmarks import optimizers

    yield "name", *optimizers.RUNS, "update", "memory", "compile"
    found = optimizers.read()
    for name in optimizers.MEASURED:
        lines = found.get(name, {})
        large = lines.get("million", {})
        steps = [_number(lines.get(run, {}).get("step_over_adam")) for run in optimizers.RUNS]
        others = ("update_over_adam", "update_memory_over_state", "compile_over_adam")
        yield f"`{name}`", *steps, *(_number(large.get(key)) for key in others)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}" if value < 10 else f"{value:.0f}"


def main(argv: list[str]) -> int:
    command_line.import_modules()
    print(page() if _TABLE.value else "\n\n".join(map(describe, argv)) or table())
    return 0


def cli() -> None:
    """The installed command."""
    command_line.run_plain(main, __doc__)


if __name__ == "__main__":
    cli()
