"""Optimizers on all tasks of a suite: run, summed up, written and printed."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launch.evaluation import figure, page, report
from launch.evaluation.aggregates import LEAST_TASKS, Interval
from launch.evaluation.contenders import Contender
from launch.evaluation.suite import CHOOSE_BY, SuiteEvaluation
from launch.suites import Suite
from launch.trained import counted, listed
from meta_train.progress import remark

# The files in the working directory.
OUTPUTS = ("suite.csv", "suite.json", "suite.md", "suite.png", "suite.html")
# What is printed of all paired differences.
COMPARED = (
    "Below, each optimizer is compared with Adam and with the best baseline as tuned per task, at "
    "one rate and at its default; all its other pairs are in suite.md and suite.html."
)


def evaluate(
    found: Suite,
    contenders: dict[str, Contender],
    horizons: Sequence[int],
    workdir: Path,
    *,
    num_seeds: int,
    baselines: Sequence[str],
    choose_by: str,
    data_dir: str | None,
    limits: Sequence[str] = (),
) -> dict[str, Any]:
    """The summary of ``report.summarize``, also written to ``workdir`` and printed.

    Args:
      contenders: label -> the optimizer.
      baselines: names in ``baselines.BASELINES``; ``adam`` is among them, or there are none.
      choose_by: the split whose loss they are tuned by.
      limits: sentences to print and write with the results.
    """
    evaluated = [counted(len(contenders), "optimizer")] if contenders else []
    evaluated += [counted(len(baselines), "swept baseline")] if baselines else []
    on = counted(len(found.tasks), "task")
    remark(
        f"Evaluating {' and '.join(evaluated)} on {on} at "
        f"{', '.join(f'{h:,}' for h in horizons)} inner steps; each is compiled for each task "
        "first ..."
    )
    entries = SuiteEvaluation(
        found.tasks,
        contenders,
        horizons,
        num_seeds,
        workdir,
        data_dir=data_dir,
        choose_by=choose_by,
        baselines=baselines,
    ).run()
    summary = report.summarize(entries, found.tasks, CHOOSE_BY[choose_by])
    title = f"Suite {found.name}: {on}, {counted(num_seeds, 'seed')}"
    about = [f"Baselines are tuned by their {choose_by} loss on other seeds."] if baselines else []
    about += [f"{name}: fresh theta of seed 0." for name, x in contenders.items() if x.untrained]
    if baselines:
        about.append(
            f"Speed-ups refer to Adam's runs of up to {horizons[-1]:,} steps, the longest horizon "
            "asked for, and may differ with another; >= where Adam never got there in more than a "
            "quarter of the runs. The score is relative to the fastest here."
        )
    if found.rescaled:
        about.append(
            "Every second instance has its weights in other units (the task `reparametrized`); "
            "the losses of Adam that the normalized ones refer to are of the plain tasks."
        )
    about += [*limits, *report.warnings(summary)]
    any_row = next(iter(summary["horizons"].values()))["rows"][0]
    if Interval(**any_row["log_loss"]["train"]).of_few:
        about.append(
            f"With fewer than {LEAST_TASKS} tasks (or of one task, seeds) no difference is "
            "claimed, whatever its interval: so few agree in sign by chance too often."
        )
    said = [*report.claims(summary), *report.claims(summary, "test")]
    summary |= {"suite": found.name, "title": title, "about": about, "claims": said}
    summary["asked"] = {
        "suite": found.name,
        "horizons": list(horizons),
        "seeds": num_seeds,
        "choose_by": choose_by,
        "optimizers": list(contenders),
        "baselines": list(baselines),
    }
    replaced = report.replaced(summary["asked"], workdir / "suite.json")
    report.write_csv(entries, workdir / "suite.csv")
    report.write_json(summary, workdir / "suite.json")
    report.write_markdown(summary, workdir / "suite.md")
    figure.plot(summary, title, workdir / "suite.png")
    page.write(summary, title, about, workdir / "suite.html")
    print(title, report.table(summary), sep="\n")
    if contenders and baselines:
        about = [*about, "", COMPARED]
    if said:
        about = [*about, "", *said]
    print(*map(report.wrapped, [*about, "", *replaced]), sep="\n")
    print(f"wrote {listed(OUTPUTS)} in {workdir}")
    return summary
