"""Trains one job for each of several settings and seeds, and compares what came of them.

  python -m launch.sweep --workdir=DIR --vary=cfg.meta.learning_rate=1e-4,1e-3 --seeds=3
                         [--preset=NAME] [--cfg.a.b=value ...] [--jobs=2]
  python -m launch.sweep ... --vary=cfg.estimator.sigma=0.001..0.1 --random=20
  python -m launch.sweep ... --index=$SLURM_ARRAY_TASK_ID

Several --vary make a grid of all their combinations; with --random=N as many settings are drawn
instead, of a list each value alike, of LOW..HIGH by the logarithm. Each run is a job in a folder
of its own, DIR/NAME, started as launch.train would be, with its output in log.txt. The same
command continues what was interrupted and runs only what is missing; --index=K runs one, for arrays
of a scheduler. At the end, and whenever all are done, it prints a table and writes sweep.csv,
sweep.json and sweep.png.

Programs are compiled once for all runs that differ in the seed and the meta-optimizer's learning
rate (but those of hybrid_es), and kept in DIR/compiled.
"""

import sys
from pathlib import Path

from absl import flags

from launch import choices, command_line
from launch.command_line import DATA_DIR, IMPORT, required_workdir
from launch.config import Config

# The module that a run starts.
TRAIN = "launch.train"

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
    "random", None, "Draw so many settings instead of all.", lower_bound=1
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
    given = None if _PLAN.value else required_workdir()
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
    from launch.sweeps import processes
    from learned_opt.paths import writable_folder
    from meta_train.progress import remark

    workdir = writable_folder("--workdir", given)
    chosen = runs if _INDEX.value is None else [runs[_INDEX.value]]
    missing = [run for run in chosen if processes.status(workdir / run.name) is None]
    shared = [f"--preset={flags.FLAGS.preset}", *_shared_words()]
    commands = {
        workdir / run.name: [
            TRAIN, f"--workdir={workdir / run.name}", *shared, *run.words,
        ]
        for run in missing
    }  # fmt: skip
    remark(f"{len(runs)} runs, {len(chosen) - len(missing)} of {len(chosen)} done before.")
    codes, stopped = processes.run_all(commands, _JOBS.value, workdir / "compiled")
    if stopped:
        print("Stopped; every running job has saved. Run again to continue.")
        return 75
    failed = {f: code for f, code in codes.items() if code not in processes.FINAL}
    if _INDEX.value is not None:
        print(f"{runs[_INDEX.value].name}: exit code {codes.get(workdir / chosen[0].name, 0)}")
        return next(iter(failed.values()), 0)
    return _compare(config, runs, workdir, failed)


def _compare(config: Config, runs: list, workdir: Path, failed: dict[Path, int]) -> int:
    from launch.sweeps import processes, results

    metric = _METRIC.value or ("eval/final_loss" if config.eval_every else "meta_loss")
    if len(config.task.parts) > 1 and not _METRIC.value:
        metric = "eval/validation" if config.validation else "meta_loss"
    codes = {run.name: processes.status(workdir / run.name) for run in runs}
    settings = results.summarize(runs, workdir, metric, codes)
    known = results.metrics(workdir / name for name, code in codes.items() if code == 0)
    if known and metric not in known:
        raise ValueError(
            f"--metric must be one of {', '.join(known)}, got {metric!r}."
            f"{choices.suggest(metric, known)} The runs are done: give another one, and the same "
            "command prints its table."
        )
    results.write(runs, settings, metric, workdir)
    results.plot(settings, metric, workdir / "sweep.png")
    print(results.table(settings, metric))
    print(f"\nwrote sweep.csv, sweep.json and sweep.png in {workdir}")
    for folder, code in failed.items():
        print(f"error: {folder.name} ended with exit code {code}: {folder / 'log.txt'}",
              file=sys.stderr)  # fmt: skip
    return 1 if failed else 0


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
