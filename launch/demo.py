"""The demo: meta-train, compare with swept baselines, say plainly how it went.

make demo
"""

import time

from launch import command_line, evaluate, loop, train
from launch import config as cfg
from launch.command_line import DATA_DIR, WORKDIR
from learned_opt.paths import writable_folder

BEFORE, AFTER = "MLP optimizer before meta-training", "MLP optimizer after meta-training"


def main(config: cfg.Config) -> int:
    workdir = writable_folder("--workdir", WORKDIR.value or "runs/demo")
    began = time.perf_counter()
    outcome = loop.run(config, workdir, DATA_DIR.value)
    if code := train.exit_code(outcome):
        return code
    trained = time.perf_counter() - began
    task = config.task.make(DATA_DIR.value)
    horizon = config.inner.horizon
    optimizers = {AFTER: workdir / "optimizer", BEFORE: workdir / "optimizer_initial"}
    results = evaluate.evaluate(task, optimizers, [horizon, 5 * horizon], num_seeds=20)
    evaluate.write(results, workdir, config.task, optimizers)
    evaluate.plot(results, workdir / "curves.png")
    print()
    print(evaluate.table(results))
    print()
    final = {curves.name: curves.final for curves in results[horizon]}
    print(verdict(final[BEFORE], final[AFTER], final["adam"], horizon))
    print()
    print(f"meta-training took   {trained:.0f} s")
    print(f"checkpoints          {workdir / 'checkpoints'}")
    print(f"exported optimizer   {workdir / 'optimizer'}")
    print(f"metrics              {workdir / 'metrics.jsonl'}")
    if outcome.wandb_dir:
        print(f"W&B run              {outcome.wandb_dir}")
    print(f"curves               {workdir / 'curves.png'}")
    return 0


def verdict(before: float, after: float, adam: float, horizon: int) -> str:
    """What the demo showed, in a sentence; ``after <= adam`` is what it sets out to reach."""
    against_self = (
        f"Meta-training took the final loss from {before:.4f} to {after:.4f}"
        if after < before
        else f"Meta-training did NOT help: final loss {before:.4f} before, {after:.4f} after"
    )
    against_adam = (
        f"it reaches Adam at its best learning rate ({adam:.4f})"
        if after <= adam
        else f"it does NOT reach Adam at its best learning rate ({adam:.4f})"
    )
    return f"{against_self}; at {horizon} inner steps {against_adam}."


if __name__ == "__main__":
    command_line.run(main, preset="demo")
