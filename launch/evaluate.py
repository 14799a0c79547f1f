"""Compares optimizers with optax baselines whose learning rates were swept.

  python -m launch.evaluate --optimizer=DIR [--optimizer=DIR ...] --workdir=DIR [--cfg.task=NAME]
  python -m launch.evaluate --suite=NAME [--optimizer=DIR_OR_NAME ...] --workdir=DIR [--seeds=N]

On one task: training losses, and the task's score on its test split at the end, of the same inner
runs under every optimizer, at the horizon it was trained for and at 5 times it; writes
`evaluation.json` and `evaluation.png`.

On a suite of tasks (docs/evaluation.md), or MODULE:NAME, one of yours: nine baselines, each at its
best setting for each task, at one setting for the whole suite and at its default; aggregates with
95% intervals, paired differences, and `suite.csv`, `suite.json`, `suite.md`, `suite.png` and
`suite.html`. NAME is an architecture, evaluated untrained.

What is done is kept in WORKDIR/evaluation.parts: run the same command again to continue an
interrupted evaluation, or with one more optimizer to run only that. A result is used again only if
everything that decides it (weights, task, seeds, sweep, software, device) is as it was.
"""

import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags

from launch import command_line
from launch.choices import suggest, to_dict
from launch.command_line import DATA_DIR, WORKDIR, required_workdir
from launch.config import read_task
from launch.path_flags import define_paths
from launch.suites import MAX_HORIZON

if TYPE_CHECKING:
    from tasks import TaskConfig


@dataclass(frozen=True)
class EvaluationConfig:
    """What an evaluation may choose.

    Attributes:
      task: the task to evaluate on; by default that of training.
    """

    task: "TaskConfig | None" = None


_OPTIMIZER = define_paths(
    "optimizer",
    "Folder of a trained optimizer, or the name of one in the package; may be given several times. "
    "With --suite also an architecture, or MODULE:NAME for one of yours: evaluated untrained.",
)
_SUITE = flags.DEFINE_string(
    "suite", None, "Suite of tasks (docs/tasks.md) to evaluate on, or MODULE:NAME for one of yours."
)
_HORIZONS = flags.DEFINE_list(
    "horizons",
    None,
    "Inner steps (default: the training horizon and 5 times it; with --suite those of the suite).",
)
_TRAINED_HORIZON = flags.DEFINE_integer(
    "trained_horizon",
    None,
    "With --suite: evaluate at 1, 5 and 25 times it.",
    lower_bound=1,
    upper_bound=MAX_HORIZON // 25,
)
_SEEDS = flags.DEFINE_integer(
    "seeds", None, "Inner runs per curve (default: 10; with --suite 5).", lower_bound=1
)
_BASELINES = flags.DEFINE_list(
    "baselines",
    None,
    "With --suite: which baselines, adam among them, or `none` (default: all).",
)
_CHOOSE_BY = flags.DEFINE_enum(
    "choose_by",
    "training",
    ["training", "validation"],
    "With --suite: the split by whose loss baselines are tuned.",
)


def main(config: EvaluationConfig) -> int:
    if _SUITE.value is not None:
        return _suite(config, _SUITE.value)
    given = {"--optimizer": _OPTIMIZER.value, "--workdir": WORKDIR.value}
    missing = [f"{flag}=FOLDER" for flag, value in given.items() if not value]
    if missing:
        raise ValueError(f"missing: {', '.join(missing)}.")
    if _TRAINED_HORIZON.value or _CHOOSE_BY.present or _BASELINES.present:
        raise ValueError(
            "--trained_horizon, --choose_by and --baselines are for suites, got no --suite; give "
            "--suite=NAME, or leave them out."
        )
    # Here, not above: what is imported takes seconds, and wrong flags are refused before.
    import learned_opt
    from launch.evaluation.one_task import BASELINES, evaluate, plot, table, verdicts, write
    from launch.trained import check_folder, limits, listed, reads_of
    from learned_opt.paths import writable_file, writable_folder
    from learned_opt.pretrained import trained_folder
    from meta_train.progress import remark

    labelled = _labelled(_OPTIMIZER.value)
    for folder in labelled.values():
        check_folder("--optimizer", folder, or_a_name=False)
    paths = {name: trained_folder(path) for name, path in labelled.items()}
    trained = {name: learned_opt.load_config(path)["training"] for name, path in paths.items()}
    # In messages the paths as they were given: the same short name may be that of many folders.
    by_path = {labelled[name]: card for name, card in trained.items()}
    horizons = _horizons(by_path)
    task_config = task_of(by_path, config.task)
    task, facts = task_config.make(DATA_DIR.value), to_dict(task_config)
    workdir = writable_folder("--workdir", required_workdir())
    for output in ("evaluation.json", "evaluation.png"):
        writable_file("--workdir", workdir / output)
    workdir.mkdir(parents=True, exist_ok=True)
    count = len(horizons) * (len(paths) + len(BASELINES))
    remark(
        f"Compiling and running {count} programs: {len(paths)} trained and {len(BASELINES)} swept "
        f"baselines, each at {listed([f'{h:,}' for h in horizons])} inner steps ..."
    )
    results = evaluate(task, facts, paths, horizons, _SEEDS.value or 10, workdir)
    write(results, workdir, facts, task, paths)
    plot(results, workdir / "evaluation.png", facts, task)
    print(table(results, facts, task))
    print()
    print("\n".join(verdicts(results)))
    print()
    for name, path in paths.items():
        # What no task was chosen for was trained on this one, however its card words it.
        on = trained[name].get("task") if config.task else facts
        reads = reads_of(learned_opt.load(path)[0])
        said = limits(facts, trained[name] | {"task": on}, horizons, reads)
        print(textwrap.fill(f"Limits of {name}: {' '.join(said)}", 100))
    print()
    print(f"wrote {workdir / 'evaluation.json'} and {workdir / 'evaluation.png'}")
    return 0


def _suite(config: EvaluationConfig, name: str) -> int:
    """The evaluation on a suite."""
    from launch.suites import find_suite

    if config.task is not None:
        raise ValueError("--suite and --cfg.task exclude each other, got both; leave one out.")
    given_workdir = required_workdir()
    found = find_suite(name)
    import learned_opt
    from launch.compiled_programs import keep_compiled_programs
    from launch.evaluation.baselines import BASELINES
    from launch.evaluation.contenders import contender
    from launch.evaluation.kept import PARTS
    from launch.evaluation.on_suite import OUTPUTS, evaluate
    from launch.trained import beyond, check_folder, reading, reads_of, seen
    from learned_opt.paths import writable_file, writable_folder

    horizons = _suite_horizons(found.horizons)
    baselines = _suite_baselines(list(BASELINES))
    contenders, limits = {}, []
    for short, given in _labelled(_OPTIMIZER.value or []).items():
        check_folder("--optimizer", given, or_a_name=True)
        one = contender(given)
        label = f"{given} (untrained)" if one.untrained else short
        contenders[label] = one
        trained = None if one.untrained else learned_opt.load_config(given)["training"]
        said = [
            *(beyond(trained, horizons) if trained else ()),
            *(seen(trained, found) if trained else ()),
            *reading(reads_of(one.optimizer)),
        ]
        limits += [f"{label}: {' '.join(said)}"] if said else []
    workdir = writable_folder("--workdir", given_workdir)
    for output in OUTPUTS:
        writable_file("--workdir", workdir / output)
    writable_folder("--workdir", workdir / PARTS)
    workdir.mkdir(parents=True, exist_ok=True)
    keep_compiled_programs()
    evaluate(
        found,
        contenders,
        horizons,
        workdir,
        num_seeds=_SEEDS.value or 5,
        baselines=baselines,
        choose_by=_CHOOSE_BY.value,
        data_dir=DATA_DIR.value,
        limits=limits,
    )
    return 0


def _suite_baselines(known: list[str]) -> list[str]:
    """Those asked for, in the order of ``known``."""
    given = known if _BASELINES.value is None else _BASELINES.value
    if given == ["none"]:
        if not _OPTIMIZER.value:
            raise ValueError("--baselines=none leaves nothing to evaluate; add an --optimizer.")
        return []
    for name in given:
        if name not in known:
            raise ValueError(
                f"--baselines must be of {', '.join(known)}, or `none` alone, got {name!r}."
                f"{suggest(name, known)}"
            )
    if "adam" not in given:
        raise ValueError(
            f"--baselines must have adam, which speed-ups refer to, got {','.join(given)!r}; "
            "add it, or give `none`."
        )
    return [name for name in known if name in given]


def _suite_horizons(of_suite: tuple[int, ...]) -> list[int]:
    if _TRAINED_HORIZON.value and _HORIZONS.value:
        raise ValueError(
            "--trained_horizon and --horizons exclude each other, got both; leave one out."
        )
    if _TRAINED_HORIZON.value:
        return [factor * _TRAINED_HORIZON.value for factor in (1, 5, 25)]
    if _HORIZONS.value is None:
        return list(of_suite)
    return sorted(set(_whole_numbers(_HORIZONS.value)))


def _labelled(paths: list[str]) -> dict[str, str]:
    """Short names of folders: the last two parts of each path, or as many as tell them apart; of
    optimizers in the package their own."""
    from learned_opt.pretrained import available, trained_folder

    parts = [
        (path,)
        if path in available() and str(trained_folder(path)) != path
        else Path(path).absolute().parts[1:]
        for path in paths
    ]
    if len(set(parts)) < len(parts):
        raise ValueError(f"--optimizer must be given once for each optimizer, got {paths}.")
    count = 2
    while len({x[-count:] for x in parts}) < len(parts):
        count += 1
    return {"/".join(x[-count:]): path for x, path in zip(parts, paths, strict=True)}


def _horizons(trained: dict[str, dict[str, Any]]) -> list[int]:
    """``--horizons``, or the one of training and 5 times it."""
    if _HORIZONS.value is None:
        found = sorted({card["horizon"] for card in trained.values() if "horizon" in card})
        if len(found) != 1:
            said = ", ".join(
                f"{path} at {card.get('horizon', 'one that it does not say')}"
                for path, card in trained.items()
            )
            raise ValueError(
                f"--horizons is missing, and the optimizers were not trained at one horizon ({said}"
                "); give --horizons=STEPS,STEPS."
            )
        return [found[0], 5 * found[0]]
    return _whole_numbers(_HORIZONS.value)


def _whole_numbers(words: list[str]) -> list[int]:
    if not words or not all(w.isdecimal() and 0 < int(w) <= MAX_HORIZON for w in words):
        raise ValueError(
            f"--horizons must be whole numbers from 1 to {MAX_HORIZON:,}, separated by commas, got "
            f"{','.join(words)!r}."
        )
    return [int(word) for word in words]


def task_of(trained: dict[str, dict[str, Any]], chosen: Any) -> Any:
    """The task to evaluate on: the chosen one, or that of training.

    Args:
      trained: folder -> how it was trained, from the optimizers' ``config.json``.
      chosen: what the command line says; None if it says nothing.

    Raises:
      ValueError: if nothing is chosen and the optimizers were trained on different tasks, on
        several at once, or do not say on which.
    """
    if chosen is not None:
        return chosen
    from launch.trained import words

    tasks = {
        label: read_task(card["task"], f"{label}/config.json")
        for label, card in trained.items()
        if "task" in card
    }
    found = set(tasks.values())
    if len(tasks) == len(trained) and len(found) == 1 and len(next(iter(found)).parts) == 1:
        return found.pop()
    said = "; ".join(
        f"{label}: {words(to_dict(tasks[label])) if label in tasks else 'it does not say'}"
        for label in trained
    )
    raise ValueError(
        f"The optimizers were not trained on one task ({said}); choose one with --cfg.task=NAME, "
        "and --cfg.task.* for what differs from its defaults."
    )


def cli() -> None:
    """The installed command."""
    command_line.run(main, EvaluationConfig, preset=None, doc=__doc__)


if __name__ == "__main__":
    cli()
