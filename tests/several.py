"""A process of several, as tests start it: joins the others, then runs jobs of ``JOBS``.

python -m tests.several FOLDER PORT COUNT INDEX NAME...
"""

import sys
import time
from pathlib import Path

import jax
import numpy as np

from launch import config as cfg
from launch import hosts, loop
from launch.stopping import EXIT_PREEMPTED
from meta_train import devices, processes
from tasks import TaskMixture
from tests import jobs

STALL_SECONDS = 20
# On four devices each has two pairs, as many as are computed at a time.
PES = jobs.changed(
    num_steps=10,
    eval_every=0,
    checkpoint_every=1,
    keep_checkpoints=12,
    meta=cfg.meta_optimizer("adam", learning_rate=1e-3, schedule="constant"),
    estimator=cfg.estimator("pes", num_particles=16, truncation=4),
)
HYBRID = jobs.changed(
    PES,
    num_steps=8,
    estimator=cfg.estimator(
        "hybrid_es",
        base=cfg.estimator("tbptt", num_particles=8, truncation=4),
        refresh_every=3,
        replay_log=True,
    ),
)
MIXTURE = jobs.changed(
    PES, num_steps=6, task=TaskMixture((cfg.task("quadratic", dim=2), cfg.task("quadratic", dim=3)))
)
JOBS = {
    "pes": PES,
    "hybrid": HYBRID,
    "mixture": MIXTURE,
    "hangs": PES,
    "odd": jobs.changed(PES, estimator=cfg.estimator("pes", num_particles=10, truncation=4)),
}


def run(name, folder, num_devices):
    """Runs that job, or continues it."""
    config = jobs.changed(JOBS[name], num_devices=num_devices)
    # The others may be compiled by many processes on few cores.
    stall = STALL_SECONDS if name == "hangs" else 300
    return loop.run(config, Path(folder) / name, stall_seconds=stall)


def stand_still():
    """From its fourth step on, in the last process."""
    if jax.process_index() == jax.process_count() - 1:
        loop.Pending.add = lambda self, step, metrics: step < 4 or time.sleep(600)


def main():
    folder, port, count, index, *names = sys.argv[1:]
    devices.configure_cpu_devices(0)
    processes.join(f"127.0.0.1:{port}", int(count), int(index), 60)
    here = Path(folder) if index == "0" else Path(folder) / "never_made"
    for name in names:
        if name == "hangs":
            stand_still()
        try:
            with hosts.ending_together(lost=EXIT_PREEMPTED):
                run(name, here, 0)
        except processes.AgreedError as error:
            print(f"refused: {error}")
    print(processes.first_has({"x": np.array([-0.0, float(index)])})["x"])


if __name__ == "__main__":
    main()
