"""Folders of trained optimizers, as words on the command line."""

from collections.abc import Iterator, Sequence
from typing import Any

from launch.choices import suggest


def check_folder(flag: str, given: str, or_a_name: bool) -> None:
    """Refuses what is neither a folder nor, where that is meant too, an architecture's name.

    Args:
      flag: what the word was given to.
      given: the word; a name of ``learned_opt.available()`` stands for its folder.
      or_a_name: whether names of ``learned_opt.OPTIMIZERS`` will do.

    Raises:
      ValueError: with what may have been meant: a name, a folder beside it, or one inside.
    """
    import learned_opt
    from learned_opt.pretrained import trained_folder

    folder, names = trained_folder(given), sorted(learned_opt.OPTIMIZERS)
    is_name = given in names or (":" in given and not folder.exists())
    if (is_name and or_a_name) or (folder / "theta.safetensors").exists():
        return
    inside = [str(path.parent) for path in sorted(folder.glob("optimizer*/theta.safetensors"))]
    if folder.is_dir() and not inside:
        return  # What is wrong with it says who reads it.
    if inside:
        hint = f" Did you mean {inside[0]!r}?"
    elif given in names:
        hint = " That is an architecture; untrained ones are evaluated with --suite=NAME."
    else:
        beside = [str(path) for path in folder.parent.glob("*") if path.is_dir()]
        hint = suggest(given, [*beside, *names, *learned_opt.available()])
    shipped = ", ".join(learned_opt.available())
    what = f", one in the package ({shipped})"
    what += f", or an architecture: one of {', '.join(names)} or MODULE:NAME" if or_a_name else ""
    reason = "is the folder of a job" if inside else "is no folder"
    raise ValueError(
        f"{flag} must be the folder of a trained optimizer{what}, got {given!r}, which {reason}."
        f"{hint}"
    )


def limits(
    facts: dict[str, Any], training: dict[str, Any], horizons: list[int], reads: dict[str, bool]
) -> list[str]:
    """What the numbers of an evaluation do not say of a trained optimizer, a sentence each.

    Args:
      facts: the task evaluated on, from ``choices.to_dict``.
      training: how it was trained, from its ``config.json``.
      horizons: those evaluated.
      reads: whether it reads the loss (``value``) and ``num_steps``.
    """
    trained, on = training.get("horizon"), training.get("task")
    length = f"{trained} inner steps" if trained else "a number of steps that was not recorded"
    if on == facts:
        first = (
            f"It was trained on {words(facts)} alone, for {length}, and is evaluated on that task: "
            "its own training data, and the test split nobody trained on."
        )
    else:
        first = (
            f"It was trained on {words(on)}, for {length}, and is evaluated on another task, "
            f"{words(facts)}."
        )
    return [
        first,
        *beyond(training, horizons),
        f"Nothing is known beyond {max(horizons)} steps, nor of other networks, data sets or batch "
        "sizes: it may diverge there.",
        "The baselines have a constant learning rate, the best of a sweep; it has no rate to tune.",
        *reading(reads),
    ]


def seen(training: dict[str, Any], suite: Any) -> list[str]:
    """What of a suite had a part in the training, so that the suite is no test of it.

    Args:
      training: how it was trained, from its ``config.json``.
      suite: a ``launch.suites.Suite``.
    """
    from launch.config import read_task
    from launch.zoo import datasets_of

    said: list[str] = []
    parts: list[Any] = []
    chain = list(_trainings(training))
    if any(_config_of(one).get("validation") == suite.name for one in chain):
        said.append(
            f"It was judged by this suite in training (--cfg.validation={suite.name}), and may be "
            "the best of many by it: this is no test of it."
        )
    known_whole = True
    for tree in (tree for one in chain for tree in _tasks_in(one.get("task"))):
        try:
            parts += read_task(tree, "config.json").parts
        except (TypeError, KeyError, ValueError):  # A task of somebody's that is not imported.
            known_whole = False
    if (begin := chain[-1].get("init_from")) and not chain[-1].get("began_from"):
        said.append(f"It began from {begin}; on what that was trained is not recorded.")
    elif not known_whole:
        said.append("On what it was trained is not known in full: not recorded, or not imported.")
    trained = {part.unwrapped for part in parts}
    of_tasks = [name for name, task in suite.tasks.items() if task.unwrapped in trained]
    known = {name for part in parts for name in datasets_of(part)}
    of_data = sorted(known & {name for task in suite.tasks.values() for name in datasets_of(task)})
    if of_tasks:
        said.append(f"It was trained on tasks of this suite: {', '.join(of_tasks)}.")
    if of_data:
        said.append(f"It was trained on data of this suite: {', '.join(of_data)}.")
    return said


def _trainings(training: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """How it was trained, and what it began from, as far back as that is recorded."""
    while True:
        yield training
        before = training.get("began_from")
        if not isinstance(before, dict):
            return
        training = before


def _tasks_in(tree: Any) -> list[Any]:
    """A recorded task, or those of a mixture, each by itself."""
    inside = tree.get("tasks") if isinstance(tree, dict) else None
    return [x for one in inside for x in _tasks_in(one)] if isinstance(inside, list) else [tree]


def _config_of(training: dict[str, Any]) -> dict[str, Any]:
    """The configuration of the job."""
    provenance = training.get("provenance")
    config = provenance.get("config") if isinstance(provenance, dict) else None
    return config if isinstance(config, dict) else {}


def beyond(training: dict[str, Any], horizons: list[int]) -> list[str]:
    """Which horizons are longer than those of training, or shorter.

    Args:
      training: how it was trained, from its ``config.json``.
    """
    longest = training.get("horizon")
    if not isinstance(longest, int) or not longest:
        return []
    shortest = (_config_of(training).get("inner") or {}).get("min_horizon") or longest
    outside = [f"{h:,}" for h in horizons if not shortest <= h <= longest]
    if not outside:
        return []
    known = f"{longest:,}" if shortest == longest else f"{shortest:,} to {longest:,}"
    return [f"At {listed(outside)} steps it works outside the {known} it was trained for."]


def reading(reads: dict[str, bool]) -> list[str]:
    """What has to be given to it in use."""
    said = []
    if reads["value"]:
        said.append("It reads the loss: give each update `value=loss`.")
    if reads["num_steps"]:
        said.append("It reads the length of the run: give `bind` the right `num_steps`.")
    return said


def reads_of(optimizer: Any) -> dict[str, bool]:
    """Whether updates depend on the loss (``value``), and on ``num_steps``, found by tracing."""
    from learned_opt.inspection import inspect

    names = ("value", "num_steps")
    try:
        found = inspect(optimizer).reads
    except Exception:  # One's own may take none of the networks it could be asked about.
        return dict.fromkeys(names, False)
    return {name: found[name].used for name in names}


def words(task: Any) -> str:
    """A task in a line; of several, how many."""
    if not isinstance(task, dict):
        return str(task or "a task that was not recorded")
    if "tasks" in task:
        return in_short(task)
    from launch.evaluation.one_task import describe

    return describe(task)


def counted(number: int, noun: str) -> str:
    """``3 tasks``, ``1 task``."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def listed(words: Sequence[str]) -> str:
    """``a, b and c``."""
    *first, last = words
    return f"{', '.join(first)} and {last}" if first else last


def in_short(task: Any) -> str:
    """The name of a recorded task and its data; of several, how many; of a wrapped one the base."""
    while isinstance(task, dict) and "base" in task:
        task = task["base"]
    if not isinstance(task, dict):
        return str(task)
    if "tasks" in task:
        return counted(len(task["tasks"]), "task")
    data = str(task.get("dataset") or "").replace(",", ", ")
    return f"{task['name']}{f' on {data}' if data else ''}"
