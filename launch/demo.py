"""The demo: meta-train, compare with swept baselines, say plainly how it went.

make demo
"""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from launch import command_line
from launch.choices import to_dict
from launch.command_line import DATA_DIR, WORKDIR
from launch.config import Config
from launch.train import exit_code

if TYPE_CHECKING:
    from meta_train.evaluate import Curves

BEFORE, AFTER = "MLP optimizer before meta-training", "MLP optimizer after meta-training"
NUM_SEEDS = 20


def main(config: Config) -> int:
    # Here, not above: what is imported takes seconds, and wrong flags are refused before.
    from launch import loop
    from launch.evaluation import one_task
    from learned_opt.paths import writable_folder

    workdir = writable_folder("--workdir", WORKDIR.value or "runs/demo")
    began = time.perf_counter()
    outcome = loop.run(config, workdir, DATA_DIR.value)
    if code := exit_code(outcome):
        return code
    trained = time.perf_counter() - began
    task, facts = config.task.make(DATA_DIR.value), to_dict(config.task)
    horizon = config.inner.horizon
    optimizers = {AFTER: workdir / "optimizer", BEFORE: workdir / "optimizer_initial"}
    horizons = [horizon, 5 * horizon]
    results = one_task.evaluate(
        task, facts, optimizers, horizons, NUM_SEEDS, workdir, DATA_DIR.value
    )
    one_task.write(results, workdir, facts, task, optimizers)
    one_task.plot(results, workdir / "curves.png", facts, task)
    table = one_task.table(results, facts, task, beside=[BEFORE])
    runs = {horizon: {c.name: c for c in curves} for horizon, curves in results.items()}
    said = [verdict(runs[horizon][BEFORE], runs[horizon][AFTER], horizon)]
    said += one_task.verdicts({h: [c for c in r if c.name != BEFORE] for h, r in results.items()})
    write_card(workdir / "optimizer", table, said, limits(facts, horizon, horizons))
    print(f"\n{table}\n")
    print("\n".join(said))
    print(f"\nLimits: {' '.join(limits(facts, horizon, horizons))}\n")
    print(f"meta-training took   {trained:.0f} s")
    print(f"checkpoints          {workdir / 'checkpoints'}")
    print(f"exported optimizer   {workdir / 'optimizer'}")
    print(f"metrics              {workdir / 'metrics.jsonl'}")
    if outcome.wandb_dir:
        print(f"W&B run              {outcome.wandb_dir}")
    print(f"curves               {workdir / 'curves.png'}")
    return 0


def verdict(before: "Curves", after: "Curves", num_steps: int) -> str:
    """What meta-training did to the optimizer it started from, in a sentence."""
    from meta_train.evaluate import FINAL, difference, is_tie

    change = difference(after, before)[FINAL]
    numbers = f"final training loss at {num_steps} inner steps: {before.final:.4f} before, "
    numbers += (
        f"{after.final:.4f} after (paired difference {change.mean:.4f} +- {change.error:.4f})"
    )
    if is_tie(change):
        return f"Meta-training changed nothing beyond the noise; {numbers}."
    helped = "helped" if change.mean < 0 else "did NOT help"
    return f"Meta-training {helped}; {numbers}."


def limits(facts: dict, trained: int, horizons: Sequence[int]) -> list[str]:
    """What the numbers do not say, a sentence each."""
    from launch.evaluation import one_task

    return [
        f"It was trained on {one_task.describe(facts)} alone, for {trained} inner steps, and is "
        "evaluated on that task: its own training data, and the test split nobody trained on.",
        f"At more than {trained} steps it works outside what it was trained for; nothing is known "
        f"beyond {max(horizons)}.",
        "Nothing is known of other networks, data sets or batch sizes: it may diverge there.",
        "The baselines have a constant learning rate, the best of a sweep; it has no rate to tune.",
    ]


def write_card(folder: Path, table: str, said: Sequence[str], limits: Sequence[str]) -> None:
    """Puts the evaluation into the model card, in place of any there was."""
    path = folder / "README.md"
    card = path.read_text()
    for section in ("\n## Evaluation\n", "\n## Limits\n"):
        card = card.partition(section)[0]
    parts = [
        card.rstrip(),
        "## Evaluation",
        f"```\n{table}\n```",
        "\n".join(f"- {s}" for s in said),
    ]
    parts += ["## Limits", "\n".join(f"- {sentence}" for sentence in limits)]
    temporary = folder / "README.md.tmp"
    temporary.write_text("\n\n".join(parts) + "\n")
    temporary.replace(path)


def cli() -> None:
    """The installed command."""
    command_line.run(main, preset="demo", doc=__doc__)


if __name__ == "__main__":
    cli()
