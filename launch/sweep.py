"""Trains one job for each of several settings and seeds, and compares what came of them.

  python -m launch.sweep --workdir=DIR --vary=cfg.meta.learning_rate=1e-4,1e-3 --seeds=3
                         [--preset=NAME] [--cfg.a.b=value ...] [--jobs=2]
  python -m launch.sweep ... --vary=cfg.estimator.sigma=0.001..0.1 --random=20
  python -m launch.sweep ... --vary=cfg.estimator.sigma=0.001..0.1 --search=20
  python -m launch.sweep ... --index=$SLURM_ARRAY_TASK_ID

Several --vary make a grid of all their combinations; with --random=N as many settings are drawn
instead, of a list each value alike, of LOW..HIGH by the logarithm; with --search=N Optuna proposes
them, four at a time, from what the runs before came to. Each run is a job in a folder
of its own, DIR/NAME, started as launch.train would be, with its output in log.txt. The same
command continues what was interrupted and runs only what is missing; --index=K runs one, for arrays
of a scheduler. At the end, and whenever all are done, it prints a table and writes sweep.csv,
sweep.json and sweep.png.

Programs are compiled once for all runs that differ in the seed and the meta-optimizer's learning
rate (but those of hybrid_es), and kept in DIR/compiled.
"""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from absl import flags

from launch import choices, command_line
from launch.command_line import DATA_DIR, IMPORT, required_workdir
from launch.config import Config

if TYPE_CHECKING:
    from launch.sweeps.plan import Run

# The module that a run starts.
TRAIN = "launch.train"
# Settings that may be drawn: every one is checked before any runs.
MOST = 10_000

_VARY = flags.DEFINE_multi_string(
    "vary", [], "Field to vary and its values: cfg.a.b=VALUE,VALUE,...; may be given several times."
)
_SEEDS = flags.DEFINE_integer(
    "seeds",
    None,
    "Runs of each setting (default: 1).",
    lower_bound=1,
    # Another command has it too, and tests import both.
    allow_override=True,
)
_RANDOM = flags.DEFINE_integer(
    "random",
    None,
    "Draw so many settings instead of all.",
    lower_bound=1,
    upper_bound=MOST,
)
_SEARCH = flags.DEFINE_integer(
    "search",
    None,
    "Try so many settings, proposed by Optuna from the results so far.",
    lower_bound=1,
    upper_bound=MOST,
)
_JOBS = flags.DEFINE_integer(
    "jobs", 1, "Runs at a time; the processors are shared out among them.", lower_bound=1
)
_INDEX = flags.DEFINE_integer("index", None, "Do this run of the plan only.", lower_bound=0)
_PLAN = flags.DEFINE_bool("plan", False, "Print the runs and their numbers, and exit.")
_METRIC = flags.DEFINE_string(
    "metric",
    None,
    "What is compared, the lower the better (default: eval/final_loss; without evaluations "
    "meta_loss).",
)


def main(config: Config) -> int:
    if (_METRIC.value or "").startswith("eval/") and not _is_evaluated(config):
        raise ValueError(
            f"--metric={_METRIC.value} is measured every --cfg.eval_every outer steps, got "
            f"eval_every={config.eval_every} and num_steps={config.num_steps}; set eval_every from "
            "1 to num_steps, or leave --metric out."
        )
    given = None if _PLAN.value else required_workdir()
    if _SEARCH.value:
        _check_search()
        return _search(config, given or "", _SEARCH.value)
    from launch.sweeps.plan import plan

    runs = plan(config, _VARY.value, _SEEDS.value or 1, _RANDOM.value)
    if _INDEX.value is not None and _INDEX.value >= len(runs):
        raise ValueError(
            f"--index must be below the number of runs, {len(runs)}, got {_INDEX.value}."
        )
    if given is None:
        print("\n".join(f"{run.number:4}  {run.name}" for run in runs))
        return 0
    # Here, not above: what is imported takes seconds, and wrong flags are refused before.
    from learned_opt.paths import writable_folder

    workdir = writable_folder("--workdir", given)
    chosen = runs if _INDEX.value is None else [runs[_INDEX.value]]
    if _METRIC.value and len(chosen) > 1:
        # A word that nothing is called by is known when one run is done, not when all are.
        failed, stopped = _run(chosen[:1], workdir, "the first run")
        if not (failed or stopped):
            _metric(config, chosen[:1], workdir)
    failed, stopped = _run(chosen, workdir, f"{len(runs)} runs")
    if stopped:
        return 75
    if _INDEX.value is not None:
        name = chosen[0].name
        print(f"{name}: exit code {failed.get(name, _codes(chosen, workdir)[name])}")
        return next(iter(failed.values()), 0)
    return _compare(config, runs, workdir, failed)


def _check_search() -> None:
    for name, value in (("random", _RANDOM.value), ("index", _INDEX.value)):
        if value is not None:
            raise ValueError(
                f"--{name}={value} and --search={_SEARCH.value}: what a search runs depends on the "
                "results before; leave one out."
            )
    if _PLAN.value:
        raise ValueError("--plan cannot know the runs of --search, which depend on results.")


def _search(config: Config, given: str, wanted: int) -> int:
    from launch.sweeps.search import Search

    seeds = _SEEDS.value or 1
    try:
        search = Search(config, _VARY.value, seeds, wanted)
    except ImportError as error:
        raise ValueError(str(error)) from None
    from launch.sweeps import results
    from learned_opt.paths import writable_folder
    from meta_train.progress import remark

    workdir = writable_folder("--workdir", given)
    runs: list[Run] = []
    while asked := search.ask():
        first = len(runs) // seeds + 1
        runs += asked
        what = f"settings {first} to {len(search.settings)} of {wanted}"
        failed, stopped = _run(asked, workdir, what)
        if stopped:
            return 75
        metric = _metric(config, asked, workdir)
        if failed:  # What would come next cannot be known.
            return _compare(config, runs, workdir, failed)
        search.tell(results.scores(asked, workdir, metric, _codes(asked, workdir)))
    if len(search.settings) < wanted:
        remark(f"--vary has no more than these {len(search.settings)} settings.")
    return _compare(config, runs, workdir, {})


def _run(runs: list["Run"], workdir: Path, what: str) -> tuple[dict[str, int], bool]:
    """Runs those that are not done: the codes of those that failed, and whether a signal came."""
    from launch.sweeps import processes
    from meta_train.progress import remark

    shared = [f"--preset={flags.FLAGS.preset}", *_shared_words()]
    commands = {
        workdir / run.name: [
            TRAIN, f"--workdir={workdir / run.name}", *shared, *run.words,
        ]
        for run in runs
    }  # fmt: skip
    missing = {f: words for f, words in commands.items() if processes.status(f, words) is None}
    before = len(runs) - len(missing)
    remark(f"{what}{f', {before} of them done before' if before else ''}.")
    codes, stopped = processes.run_all(missing, _JOBS.value, workdir / "compiled")
    if stopped:
        print("Stopped; every running job has saved. Run again to continue.")
    return {f.name: code for f, code in codes.items() if code not in processes.FINAL}, stopped


def _codes(runs: list["Run"], workdir: Path) -> dict[str, int | None]:
    from launch.sweeps import processes

    return {run.name: processes.status(workdir / run.name) for run in runs}


def _is_evaluated(config: Config) -> bool:
    return 0 < config.eval_every <= config.num_steps


def _metric(config: Config, runs: list["Run"], workdir: Path) -> str:
    """What is compared.

    Raises:
      ValueError: if none of the runs that are done has it.
    """
    from launch.sweeps import results

    evaluated = _is_evaluated(config)
    metric = _METRIC.value or ("eval/final_loss" if evaluated else "meta_loss")
    if len(config.task.parts) > 1 and not _METRIC.value:
        metric = "eval/validation" if config.validation and evaluated else "meta_loss"
    codes = _codes(runs, workdir)
    known = results.metrics(workdir / name for name, code in codes.items() if code == 0)
    if known and metric not in known:
        raise ValueError(
            f"--metric must be one of {', '.join(known)}, got {metric!r}."
            f"{choices.suggest(metric, known)} Runs that are done stay so: give another one, and "
            "the same command goes on."
        )
    return metric


def _compare(config: Config, runs: list["Run"], workdir: Path, failed: dict[str, int]) -> int:
    from launch.sweeps import results

    codes = _codes(runs, workdir)
    if failed and 0 not in codes.values():  # What is there may be of runs that were done.
        _say_failed(failed, workdir)
        return 1
    metric = _metric(config, runs, workdir)
    settings = results.summarize(runs, workdir, metric, codes)
    results.write(runs, settings, metric, workdir)
    results.plot(settings, metric, workdir / "sweep.png")
    print(results.table(settings, metric))
    print(f"\nwrote sweep.csv, sweep.json and sweep.png in {workdir}")
    _say_failed(failed, workdir)
    return 1 if failed else 0


def _say_failed(failed: dict[str, int], workdir: Path) -> None:
    for name, code in failed.items():
        log = workdir / name / "log.txt"
        lines = log.read_text(errors="replace").strip().split("\n")
        begins = [i for i, line in enumerate(lines) if line.startswith("error: ")]
        said = " ".join(lines[begins[-1] if begins else -1 :]).removeprefix("error: ")
        print(f"error: {name} ended with exit code {code}: {said} ({log})", file=sys.stderr)


def _shared_words() -> list[str]:
    """The words of this command that every run gets."""
    node, _ = choices.take_words(sys.argv[1:], "cfg")
    words = choices.words_of(node, "cfg")
    words += [f"--import={name}" for name in IMPORT.value]
    return words + ([f"--data_dir={DATA_DIR.value}"] if DATA_DIR.value else [])


def cli() -> None:
    """The installed command."""
    command_line.run(main, doc=__doc__)


if __name__ == "__main__":
    cli()
