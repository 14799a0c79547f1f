"""The demo: meta-train, compare with swept baselines, say plainly how it went.

make demo
"""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from launch import command_line
from launch.choices import to_dict
from launch.command_line import DATA_DIR, given_workdir
from launch.config import Config
from launch.train import exit_code

if TYPE_CHECKING:
    import numpy as np

    from meta_train.evaluate import Curves
    from tasks import Task

BEFORE, AFTER = "MLP optimizer before meta-training", "MLP optimizer after meta-training"
NUM_SEEDS = 20


def main(config: Config) -> int:
    # Here, not above: what is imported takes seconds, and wrong flags are refused before.
    from launch import loop
    from launch.evaluation import one_task
    from launch.trained import limits, reads_of
    from learned_opt.paths import writable_folder

    workdir = writable_folder("--workdir", given_workdir() or "runs/demo")
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
    constant = constant_losses(task, NUM_SEEDS)
    said = [verdict(runs[horizon][BEFORE], runs[horizon][AFTER], horizon, constant)]
    said += one_task.verdicts({h: [c for c in r if c.name != BEFORE] for h, r in results.items()})
    training = {"task": facts, "horizon": horizon}
    known = limits(facts, training, horizons, reads_of(config.optimizer.make()))
    write_card(workdir / "optimizer", table, said, known)
    print(f"\n{table}\n")
    print("\n".join(said))
    print(f"\nLimits: {' '.join(known)}\n")
    print(f"meta-training took   {trained:.0f} s")
    print(f"checkpoints          {workdir / 'checkpoints'}")
    print(f"exported optimizer   {workdir / 'optimizer'}")
    print(f"metrics              {workdir / 'metrics.jsonl'}")
    if outcome.wandb_dir:
        print(f"W&B run              {outcome.wandb_dir}")
    print(f"curves               {workdir / 'curves.png'}")
    return 0


def constant_losses(task: "Task", num_seeds: int) -> "np.ndarray | None":
    """The loss of a constant prediction in each run, ``[num_seeds]``; None if the task has none."""
    import numpy as np

    from launch.evaluation import SEED
    from launch.evaluation.runs import Starts

    if task.constant_loss is None:
        return None
    starts = Starts(task)
    return np.asarray(starts.constant(starts.keys(SEED, num_seeds)))


def verdict(
    before: "Curves", after: "Curves", num_steps: int, constant: "np.ndarray | None" = None
) -> str:
    """What meta-training did to the optimizer it started from, in a sentence.

    It helped only where the paired difference is beyond two standard errors below zero, and the
    loss beyond as many below that of a constant prediction.

    Args:
      before, after: of the same runs.
      constant: the loss of a constant prediction in each of them; None if there is none.
    """
    import numpy as np

    from meta_train.evaluate import FINAL, difference, estimate, is_tie

    at = f"final training loss at {num_steps} inner steps"
    broken = int(np.sum(~np.isfinite(after.runs[FINAL])))
    if broken:
        return (
            f"Meta-training did NOT help: the optimizer diverges in {broken} of "
            f"{len(after.losses)} runs of {num_steps} inner steps."
        )
    change = difference(after, before)[FINAL]
    if np.isnan(change.error) and np.isfinite(change.mean):
        return f"Whether meta-training helped cannot be told from one run ({at})."
    paired = f"paired difference {change.mean:.4f} +- {change.error:.4f}"
    numbers = f"{at}: {before.final:.4f} before, {after.final:.4f} after ({paired})"
    diverged = np.isinf(change.mean)
    if is_tie(change) and not diverged:
        return f"Meta-training changed nothing beyond the noise; {numbers}."
    if change.mean > 0:
        return f"Meta-training did NOT help; {numbers}."
    if constant is not None:
        above = estimate(after.runs[FINAL] - constant)
        if above.mean > 0 or is_tie(above):
            return (
                f"Meta-training lowered the loss, but not below that of a constant prediction "
                f"({np.mean(constant):.4f}), so the optimizer does not train the network yet; "
                f"{numbers}."
            )
    return f"Meta-training helped; {numbers}."


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
