"""Compares trained optimizers with optax baselines whose learning rates were swept.

  python -m launch.evaluate --optimizer=DIR [--optimizer=DIR ...] --workdir=DIR [--cfg.task=NAME]

Training losses, and the task's score on its test split at the end, of the same inner runs under
every optimizer, at the horizon it was trained for and at 5 times it; writes `evaluation.json`
and `evaluation.png`. What is done is kept in WORKDIR/evaluation.parts until then: run the same
command again to continue an interrupted evaluation. A result is used again only if everything
that decides it (weights, task, seeds, sweep, software, device) is as it was.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags

from launch import command_line
from launch.choices import to_dict
from launch.command_line import DATA_DIR, WORKDIR
from launch.config import read_task
from launch.path_flags import define_paths

if TYPE_CHECKING:
    from tasks import TaskConfig


@dataclass(frozen=True)
class EvaluationConfig:
    """What an evaluation may choose.

    Attributes:
      task: the task to evaluate on; by default that of training.
    """

    task: "TaskConfig | None" = None


_OPTIMIZER = define_paths("optimizer", "Folder of a trained optimizer; may be given several times.")
_HORIZONS = flags.DEFINE_list(
    "horizons", None, "Inner steps (default: the training horizon and 5 times it)."
)
_SEEDS = flags.DEFINE_integer("seeds", 10, "Inner runs per curve.", lower_bound=1)


def main(config: EvaluationConfig) -> int:
    # Here, not above: what is imported takes seconds, and wrong flags are refused before.
    import learned_opt
    from launch.evaluation import evaluate, plot, table, verdicts, write
    from learned_opt.paths import writable_folder

    given = {"--optimizer": _OPTIMIZER.value, "--workdir": WORKDIR.value}
    missing = [f"{flag}=FOLDER" for flag, value in given.items() if not value]
    if missing:
        raise ValueError(f"missing: {', '.join(missing)}.")
    names = [_short_name(path) for path in _OPTIMIZER.value]
    if len(set(names)) < len(names):
        names = [str(Path(path).absolute()) for path in _OPTIMIZER.value]
    paths = {name: Path(path) for name, path in zip(names, _OPTIMIZER.value, strict=True)}
    trained = {name: learned_opt.load_config(path)["training"] for name, path in paths.items()}
    horizons = _horizons(trained)
    task_config = task_of(trained, config.task)
    task, facts = task_config.make(DATA_DIR.value), to_dict(task_config)
    workdir = writable_folder("--workdir", WORKDIR.value)
    workdir.mkdir(parents=True, exist_ok=True)
    results = evaluate(task, facts, paths, horizons, _SEEDS.value, workdir, DATA_DIR.value)
    write(results, workdir, facts, task, paths)
    plot(results, workdir / "evaluation.png", facts, task)
    print(table(results, facts, task))
    print()
    print("\n".join(verdicts(results)))
    print()
    print(f"wrote {workdir / 'evaluation.json'} and {workdir / 'evaluation.png'}")
    return 0


def _horizons(trained: dict[str, dict[str, Any]]) -> list[int]:
    """``--horizons``, or the one of training and 5 times it."""
    if not _HORIZONS.value:
        found = sorted({card["horizon"] for card in trained.values() if "horizon" in card})
        if len(found) != 1:
            raise ValueError(
                f"The optimizers were trained at horizons {found or 'unknown'}; give --horizons."
            )
        return [found[0], 5 * found[0]]
    if not all(h.isdecimal() and int(h) > 0 for h in _HORIZONS.value):
        raise ValueError(f"--horizons must be whole numbers above 0, got {_HORIZONS.value}.")
    return [int(h) for h in _HORIZONS.value]


def task_of(trained: dict[str, dict[str, Any]], chosen: Any) -> Any:
    """The task to evaluate on: the chosen one, or that of training.

    Args:
      trained: label -> how it was trained, from the optimizers' ``config.json``.
      chosen: what the command line says; None if it says nothing.

    Raises:
      ValueError: if nothing is chosen and the optimizers were trained on different tasks, on
        several at once, or do not say on which.
    """
    if chosen is not None:
        return chosen
    from launch.evaluation import describe

    tasks = {
        label: read_task(card["task"], f"{label}/config.json")
        for label, card in trained.items()
        if "task" in card
    }
    found = set(tasks.values())
    if len(tasks) == len(trained) and len(found) == 1 and len(next(iter(found)).parts) == 1:
        return found.pop()
    said = "; ".join(
        f"{label}: {describe(to_dict(tasks[label])) if label in tasks else 'it does not say'}"
        for label in trained
    )
    raise ValueError(
        f"The optimizers were not trained on one task ({said}); choose one with --cfg.task=NAME, "
        "and --cfg.task.* for what differs from its defaults."
    )


def _short_name(path: str) -> str:
    """The last two parts of the path: the job and the folder inside it."""
    return "/".join(Path(path).absolute().parts[-2:])


def cli() -> None:
    """The installed command."""
    command_line.run(main, EvaluationConfig, preset=None, doc=__doc__)


if __name__ == "__main__":
    cli()
