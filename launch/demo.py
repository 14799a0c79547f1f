"""The demo: meta-train the controller on four tiny tasks, and try it on six it never saw.

make demo
"""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launch import command_line
from launch.command_line import DATA_DIR, given_workdir
from launch.config import Config
from launch.train import exit_code

TRAINED, UNTRAINED, SHIPPED = "trained here", "the same, untrained", "controller"
# Of other data or another kind than those of the preset. (The shipped controller was not trained on
# them either, but chosen by a suite that has them.)
UNSEEN = (
    "faces_mlp",
    "faces_autoencoder",
    "diabetes_linear",
    "diabetes_mlp",
    "packages_transformer",
    "dixon_price",
)
NUM_SEEDS = 5


def main(config: Config) -> int:
    # Here, not above: what is imported takes seconds, and wrong flags are refused before.
    from launch import loop
    from launch.compiled_programs import keep_compiled_programs
    from launch.evaluation import on_suite, report
    from launch.evaluation.contenders import contender
    from launch.suites import Suite, zoo_task
    from learned_opt.paths import writable_folder

    workdir = writable_folder("--workdir", given_workdir() or "runs/demo")
    began = time.perf_counter()
    outcome = loop.run(config, workdir, DATA_DIR.value)
    if code := exit_code(outcome):
        return code
    trained = time.perf_counter() - began
    keep_compiled_programs()
    horizon = config.inner.horizon
    folders = {TRAINED: workdir / "optimizer", UNTRAINED: workdir / "optimizer_initial"}
    contenders = {label: contender(str(folder)) for label, folder in folders.items()}
    summary = on_suite.evaluate(
        Suite("demo", {name: zoo_task(name) for name in UNSEEN}, (horizon, 5 * horizon)),
        contenders | {SHIPPED: contender(SHIPPED)},
        (horizon, 5 * horizon),
        workdir,
        num_seeds=NUM_SEEDS,
        baselines=["adam"],
        choose_by="training",
        data_dir=DATA_DIR.value,
    )
    said = verdicts(summary)
    write_card(workdir / "optimizer", report.table(summary), said)
    print()
    print(*map(report.wrapped, said), sep="\n")
    print(f"\nmeta-training took   {trained:.0f} s, compiling included")
    print(f"checkpoints          {workdir / 'checkpoints'}")
    print(f"exported optimizer   {workdir / 'optimizer'}")
    print(f"metrics              {workdir / 'metrics.jsonl'}")
    if outcome.wandb_dir:
        print(f"W&B run              {outcome.wandb_dir}")
    print(f"results              {workdir / 'suite.html'}, {workdir / 'suite.png'}")
    return 0


def verdicts(summary: dict[str, Any]) -> list[str]:
    """What meta-training did to the rule it started from, in a sentence a horizon.

    It helped only where the interval of the paired difference is below zero.

    Args:
      summary: of ``on_suite.evaluate``, with ``TRAINED`` and ``UNTRAINED`` among the optimizers.
    """
    from launch.evaluation.aggregates import Interval

    verbs = {-1: "helped", 0: "changed nothing beyond the noise", 1: "did NOT help"}
    said = []
    for horizon, found in summary["horizons"].items():
        rows = {row["label"]: row for row in found["rows"]}
        (change,) = (
            Interval(**d["train"])
            for d in found["differences"]
            if (d["ours"], d["other"]) == (TRAINED, UNTRAINED)
        )
        broken, runs = rows[TRAINED]["diverged"], rows[TRAINED]["runs"]
        also = f" It diverged in {broken} of {runs} runs." if broken else ""
        verb = "cannot be judged" if change.of_few else verbs[change.sign]
        reason = f" ({change.tasks} are too few for a claim)" if change.of_few else ""
        said.append(
            f"Meta-training {verb} on tasks it never saw{reason}, at {horizon} steps: "
            f"training log-loss {change} against the same rule untrained.{also}"
        )
    return said


def write_card(folder: Path, table: str, said: Sequence[str]) -> None:
    """Puts the evaluation into the model card, before its limits, in place of any there was."""
    path = folder / "README.md"
    before, heading, limits = path.read_text().partition("\n## Limits\n")
    before = before.partition("\n## Evaluation\n")[0]
    parts = [
        before.rstrip(),
        f"## Evaluation\n\nOn {', '.join(UNSEEN)}, log-losses:",
        f"```\n{table}\n```",
        "\n".join(f"- {s}" for s in said),
    ]
    temporary = folder / "README.md.tmp"
    temporary.write_text("\n\n".join(parts) + "\n" + heading + limits)
    temporary.replace(path)


def cli() -> None:
    """The installed command."""
    command_line.run(main, preset="demo", doc=__doc__)


if __name__ == "__main__":
    cli()
