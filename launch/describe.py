"""What learned optimizers cost and read; without a name, all of them in a table.

    python -m launch.describe [NAME ...] [--import=MODULE]

NAME is a registered optimizer, MODULE:NAME one of your own, or the folder of an exported one. All
answers are found by tracing the optimizer; nothing is computed.
"""

import os
from typing import TYPE_CHECKING, Any

from launch import command_line

if TYPE_CHECKING:
    from learned_opt import LearnedOptimizer

_COLUMNS = ("name", "theta", "bytes", "parameters", "loss", "num_steps", "without gradient")


def describe(name: str) -> str:
    """Everything about one optimizer, in lines.

    Raises:
      ValueError: if there is none of that name, or the folder holds no trained optimizer.
    """
    from learned_opt.inspection import LARGE, SMALL, inspect

    optimizer, training = _find(name)
    found = inspect(optimizer)
    lines = [("meta-parameters", f"{found.num_meta_parameters:,}")]
    lines += [
        (
            "state" if size == SMALL else "",
            f"{found.state_bytes[size]:.2f} bytes a parameter (Adam {found.adam_bytes[size]:.2f}) "
            f"for a network of {size:,} parameters in {_tensors(found.num_tensors)}",
        )
        for size in (SMALL, LARGE)
    ]
    for key, words in _READ.items():
        reading = found.reads[key]
        lines.append((f"reads {words}", _answer(reading)))
    lines.append(("without gradient", "moves" if found.moves_without_gradient else "rests"))
    if found.num_tensors != 4:
        lines.append(("takes", f"networks of {_tensors(found.num_tensors)}"))
    horizon = "not trained" if training is None else _horizon(training)
    lines.append(("trained for", horizon))
    return "\n".join([name, *(f"  {label:<22}{text}" for label, text in lines)])


_READ = {"params": "the parameters", "value": "the loss", "num_steps": "num_steps"}


def _tensors(count: int) -> str:
    return f"{count} tensor{'s' if count != 1 else ''}"


def _answer(reading: Any) -> str:
    if reading.used:
        return "yes" if reading.needed else "yes, where it is given"
    return "no"


def _horizon(training: dict[str, Any]) -> str:
    if training.get("horizon") is None:
        return "a horizon that was not recorded"
    task = training.get("task")
    name = task.get("name") if isinstance(task, dict) else task
    return f"{training['horizon']:,} steps{f' of {name}' if name else ''}"


def _find(name: str) -> tuple["LearnedOptimizer", dict[str, Any] | None]:
    """The optimizer, and how it was trained if it was."""
    import learned_opt
    from launch.choices import KINDS, find, suggest
    from launch.trained import check_folder

    if name not in learned_opt.OPTIMIZERS and os.path.isdir(os.path.expanduser(name)):
        check_folder("NAME", name, or_a_name=True)
        return learned_opt.load(name)[0], learned_opt.load_config(name)["training"]
    if name not in learned_opt.OPTIMIZERS and ":" not in name:
        raise ValueError(
            f"NAME must be one of {', '.join(sorted(learned_opt.OPTIMIZERS))}, MODULE:NAME for one "
            f"of your own, or the folder of an exported optimizer, got {name!r}."
            f"{suggest(name, learned_opt.OPTIMIZERS)}"
        )
    try:
        made = find(KINDS["OptimizerConfig"], name)().make()
    except ValueError as error:
        raise ValueError(f"NAME {error}") from None
    if not isinstance(made, learned_opt.LearnedOptimizer):
        raise ValueError(f"NAME {name!r} must make a LearnedOptimizer, got {type(made).__name__}.")
    return made, None


def table() -> str:
    """A row for each registered optimizer; bytes are those of the state a parameter."""
    import learned_opt
    from learned_opt.inspection import LARGE, inspect

    rows: list[tuple[str, ...]] = [_COLUMNS]
    for name, make in learned_opt.OPTIMIZERS.items():
        made = make()
        found = inspect(made.make() if isinstance(made, learned_opt.OptimizerConfig) else made)
        rows.append(
            (
                name,
                f"{found.num_meta_parameters:,}",
                f"{found.state_bytes[LARGE]:.2f}",
                *(_answer(found.reads[key]) for key in _READ),
                "moves" if found.moves_without_gradient else "rests",
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    note = (
        f"bytes: of the state, for each parameter of a network of {LARGE:,} parameters in 4 "
        f"tensors (Adam {found.adam_bytes[LARGE]:.2f}; smaller networks take more, see "
        "`describe NAME`); parameters, loss, num_steps: whether it reads them."
    )
    return "\n".join([*lines, "", note])


def main(argv: list[str]) -> int:
    command_line.import_modules()
    print("\n\n".join(map(describe, argv)) if argv else table())
    return 0


def cli() -> None:
    """The installed command."""
    command_line.run_plain(main, __doc__)


if __name__ == "__main__":
    cli()
