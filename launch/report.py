"""Writes one page about a job, while it runs or after; about several, over each other.

  python -m launch.report --workdir=DIR [--workdir=DIR2 ...] [--out=FILE]

Meta-loss, evaluations, meta-gradient, learning rate and speed over the outer steps, task by task
and leaf by leaf; what the learned optimizer does, layer by layer, in an inner run of the newest
checkpoint's theta; the comparison with baselines where one was made in a folder of the job;
checkpoints, configuration, environment. The page needs no network. Without --out it is
report.html in the (first) folder. Nothing else there is changed.
"""

import datetime
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from absl import flags

from launch import command_line
from launch.command_line import DATA_DIR
from launch.path_flags import define_path

if TYPE_CHECKING:
    from launch.run_report.behaviour import Behaviour
    from launch.run_report.folder import JobFolder

_OUT = define_path("out", "The page's file; by default report.html in the (first) folder.")
_RUN = flags.DEFINE_bool(
    "behaviour", True, "Run theta once to show what it does; compiles, for seconds to a minute."
)


def main(argv: list[str]) -> int:
    if argv:
        raise ValueError(f"unexpected words {argv}; every option is --name=value.")
    given = command_line.workdirs()
    names = short(given)
    from launch.run_report.folder import check, read
    from learned_opt.paths import writable_file

    for path in given:
        check(Path(path))
    out = writable_file("--out", _OUT.value or Path(given[0]) / "report.html")
    if out.suffix not in (".html", ".htm"):
        raise ValueError(
            f"--out must be a page, NAME.html, got {str(out)!r}: another file could be one of the "
            "job's own; give it that ending."
        )
    # Here, not above: what is imported takes seconds, and wrong flags are refused before.
    from launch.evaluation.kept import whole
    from launch.evaluation.report import table
    from launch.run_report import body

    command_line.import_modules()
    now = time.time()
    jobs = [read(Path(path), name, now) for path, name in zip(given, names, strict=True)]
    behaviours = {job.name: _behaviour(job) for job in jobs} if _RUN.value else {}
    suites = {
        f"{job.name}/{path}": "\n".join([found["title"], table(found)])
        for job in jobs
        for path, found in job.evaluations.items()
        if "horizons" in found
    }
    written = f"{datetime.datetime.now():%Y-%m-%d %H:%M:%S}"
    page = body.page(jobs, behaviours, suites, written)
    out.parent.mkdir(parents=True, exist_ok=True)
    whole(out, lambda file: file.write(page))
    for job in jobs:
        if job.damaged_lines:
            print(
                f"warning: {job.damaged_lines} lines of {job.path / 'metrics.jsonl'} are damaged, "
                "and not in the page.",
                file=sys.stderr,
            )
        total = job.config.get("num_steps", 0)
        print(f"{job.name}: outer step {job.step:,} of {total:,}")
    print(f"wrote {out}")
    return 0


def short(paths: list[str]) -> list[str]:
    """Names of folders: as many of their last parts as tell them apart."""
    parts = [Path(path).absolute().parts[1:] for path in paths]
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-count:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    raise ValueError(f"--workdir must name each job once, got {', '.join(paths)}.")


def _behaviour(job: "JobFolder") -> "Behaviour | str":
    """What theta does, or a sentence that says why that is not shown."""
    from launch.compiled_programs import keep_compiled_programs
    from launch.config import read_config
    from launch.run_report import behaviour
    from meta_train.progress import remark

    if not job.config:
        return "The job has not written its configuration yet."
    keep_compiled_programs()
    remark(f"Running theta of {job.name} once ...")
    try:
        config = read_config(job.config)
        found = behaviour.of_job(config, job.path, DATA_DIR.value)
    except ValueError as error:
        return f"Not shown: {error}"
    return found or "There is no checkpoint yet, or theta is no optimizer."


def cli() -> None:
    """The installed command."""
    command_line.run_plain(main, __doc__)


if __name__ == "__main__":
    cli()
