"""What Adam reaches on the tasks of the zoo, at its best constant rate after 10,000 steps.

    python -m launch.tuned_adam [NAME ...] [--missing]

NAME is a task of the zoo or a suite; without one, all tasks, those with fewest operations first.
Tasks that are in tuned_adam.json already are left out, and each is written when it is done, so
the command can be stopped and run again. With --missing, it prints the tasks that are not there
yet, one a line, and runs none. All rates and seeds of a task are one compiled program: 42 times
10,000 training steps, or 126 times where instances differ.
"""

import os
import sys
import time

from absl import flags

from launch import command_line
from launch.choices import suggest

NUM_STEPS, SEED = 10_000, 0
# Of a task that is one problem, and of one whose instances differ.
NUM_SEEDS = {False: 2, True: 6}
# Steps of the compiled program; between blocks the progress is printed.
BLOCK = 500

MISSING = flags.DEFINE_bool(
    "missing", False, "Print which of these tasks have not been run yet, one a line; run none."
)


def tune(name: str, num_steps: int = NUM_STEPS) -> dict:
    """The record of a task: everything found, and what decides it.

    Losses are those of ``Task.score`` after the last step, means over the seeds, each with its own
    instance, start and batches; the best rate is chosen on them, for each split on its own.
    """
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax

    from launch.choices import to_dict
    from launch.suites import zoo_task
    from meta_train.evaluate import LEARNING_RATES
    from meta_train.progress import progress
    from tasks import SPLITS

    config = zoo_task(name)
    task = config.make()
    constant_loss = task.constant_loss
    if task.score is None or constant_loss is None:
        raise ValueError(f"the task {name!r} must have a score and a constant predictor's loss.")
    drawn = bool(jax.tree.leaves(jax.eval_shape(task.sample, jax.random.key(0))))
    num_seeds = NUM_SEEDS[drawn]
    keys = jax.random.split(jax.random.key(SEED), num_seeds)
    rates = jnp.asarray(LEARNING_RATES, jnp.float32)

    def per_run(function):
        """Over rates (of the first argument) and seeds (of all)."""
        return jax.vmap(jax.vmap(function, (0, 0)), (0, None))

    def start(_, key):
        key_sample, key_init = jax.random.split(key)
        instance = task.sample(key_sample)
        params = task.init(instance, key_init)
        return instance, params, optax.scale_by_adam().init(params)

    def step(rate, key, state, number):
        instance, params, moments = state
        key_batch, key_loss = jax.random.split(jax.random.fold_in(key, number))
        batch = task.batch(instance, key_batch, "train")
        grads = jax.grad(task.loss)(params, instance, batch, key_loss)
        updates, moments = optax.scale_by_adam().update(grads, moments)
        params = jax.tree.map(lambda p, u: (p - rate * u).astype(p.dtype), params, updates)
        return instance, params, moments

    grid = jnp.broadcast_to(rates[:, None], (len(rates), num_seeds))
    run_keys = jax.random.split(jax.random.key(SEED + 1), num_seeds)
    state = jax.jit(lambda: per_run(start)(grid, keys))()

    @jax.jit
    def block(state, first):
        one = jax.vmap(jax.vmap(step, (0, 0, 0, None)), (0, None, 0, None))

        def body(state, number):
            return one(grid, run_keys, state, number), None

        return jax.lax.scan(body, state, first + jnp.arange(min(BLOCK, num_steps)))[0]

    begun = time.monotonic()
    with progress(total=num_steps, desc=name, unit="step") as bar:
        for first in range(0, num_steps, BLOCK):
            state = jax.block_until_ready(block(state, first))
            bar.update(min(BLOCK, num_steps - first))

    @jax.jit
    def scores(state):
        def one(run):
            instance, params = run
            return {split: task.score(params, instance, split)["loss"] for split in SPLITS}

        flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), state[:2])
        return jax.lax.map(one, flat)  # One after another: whole splits take memory.

    shape = (len(rates), num_seeds)
    found = {
        split: np.asarray(losses).reshape(shape).mean(axis=1)
        for split, losses in scores(state).items()
    }
    constants = jax.vmap(lambda key: constant_loss(task.sample(jax.random.split(key)[0])))
    best = {split: int(np.nanargmin(losses)) for split, losses in found.items()}
    return {
        "task": to_dict(config),
        "constant": float(np.mean(constants(keys))),
        "adam": {
            split: {"loss": float(found[split][i]), "learning_rate": float(LEARNING_RATES[i])}
            for split, i in best.items()
        },
        "losses": {
            split: [round(float(x), 6) if np.isfinite(x) else None for x in losses]
            for split, losses in found.items()
        },
        "settings": {
            "command": f"python -m launch.tuned_adam {name}",
            "steps": num_steps,
            "seeds": num_seeds,
            "rates": len(LEARNING_RATES),
            "jax": jax.__version__,
            "python": "{}.{}".format(*sys.version_info),
            "seconds": round(time.monotonic() - begun),
        },
    }


def missing(names: list[str]) -> list[str]:
    """Which of these tasks and suites are not in the file, those with fewest operations first.

    Raises:
      ValueError: on a name that is neither.
    """
    from launch.normalization import record_of
    from launch.suites import SUITES, ZOO, suite, zoo_task
    from launch.zoo import facts
    from meta_train.progress import progress

    wanted: dict[str, None] = {}
    for name in names or ZOO:
        if name not in (*SUITES, *ZOO):
            raise ValueError(
                f"NAME must be a suite ({', '.join(SUITES)}) or a task of the zoo "
                f"({', '.join(ZOO)}), got {name!r}.{suggest(name, (*SUITES, *ZOO))}"
            )
        wanted |= dict.fromkeys(suite(name).tasks if name in SUITES else [name])
    left = [name for name in wanted if record_of(zoo_task(name)) is None]
    if len(left) > 1:  # To count operations, each is traced with its loops unrolled.
        operations = {
            name: facts(name).flops for name in progress(left, desc="counting operations")
        }
        left.sort(key=operations.__getitem__)
    return left


def main(argv: list[str]) -> int:
    from launch.normalization import FILE, records
    from meta_train import strict_json
    from meta_train.progress import remark

    left = missing(argv)
    if MISSING.value:
        print("".join(f"{name}\n" for name in left), end="")
        return 0
    for number, name in enumerate(left, 1):
        remark(f"{name}, task {number} of {len(left)}: compiling ...")
        records.cache_clear()
        found = records() | {name: tune(name)}
        ready = FILE.with_suffix(".tmp")
        ready.write_text(strict_json.dumps(found, indent=1, sort_keys=True) + "\n")
        os.replace(ready, FILE)
        print(f"{name}: {strict_json.dumps(found[name]['adam'])}")
    print(f"{len(left)} tasks run; the results are in {FILE}.")
    return 0


if __name__ == "__main__":
    command_line.run_plain(main, __doc__)
