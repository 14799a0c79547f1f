"""Small whole jobs in the tests' own process, and ways to damage their files."""

import dataclasses
import hashlib
import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax

from launch import config as cfg
from launch import loop
from launch.job import Job
from launch.trainables import Trainable
from meta_train import devices, trainer
from meta_train.checks import lost_share
from meta_train.estimators import GradientEstimator

# Learnable SGD on a quadratic: compiles in a second, a step takes a fraction of a millisecond.
SMALL = cfg.Config(
    num_steps=12,
    num_devices=1,
    log_every=1,
    eval_every=5,
    eval_seeds=1,
    checkpoint_every=4,
    wandb_mode="disabled",
    task=cfg.task("quadratic", dim=3, batch_size=2),
    optimizer=cfg.optimizer("sgdm", learning_rate=0.01),
    inner=cfg.InnerConfig(horizon=8),
    estimator=cfg.estimator("pes", num_particles=4, truncation=4),
)


def changed(config=SMALL, **parts):
    """``config`` with other values; those of a part as a dict."""
    return dataclasses.replace(
        config,
        **{
            name: dataclasses.replace(getattr(config, name), **value)
            if isinstance(value, dict)
            else value
            for name, value in parts.items()
        },
    )


def run(workdir, **parts):
    """Runs or continues the job."""
    return loop.run(changed(**parts), workdir)


def toy(config, data_dir=None):
    """A job with everything but inner training: for the loop and its files; compiles at once.

    Its loss is ``theta^2`` with noise; a particle's state is what it drew so far; with a learning
    rate from 1 no particle is finite. Instead of
    ``launch.job.build``: ``monkeypatch.setattr(loop, "build", toy)``.
    """
    del data_dir

    def estimate(theta, drawn, key):
        noise = jax.vmap(lambda i: jax.random.normal(jax.random.fold_in(key, i)))(jnp.arange(2))
        grad, loss = 2 * theta + noise.mean(), jnp.sum(theta**2) + noise.mean()
        finite = jnp.float32(config.optimizer.learning_rate < 1)
        metrics = {"loss": loss, "finite": finite, "grad_sq_norm": jnp.sum(grad**2) + 1}
        metrics["unperturbed"] = lost_share(theta, config.estimator.sigma)
        return finite * grad, drawn + noise, metrics

    def export(path, theta, step):
        path.mkdir(exist_ok=True)
        np.savez(path / "theta.npz", theta=theta, step=step)

    estimator = GradientEstimator(lambda theta, key: jnp.zeros(2), estimate)
    optimizer, axes = optax.adam(0.1), trainer.state_axes(estimator)
    step = trainer.make_step(estimator, optimizer, devices.device_mean)
    init = partial(trainer.init_state, estimator, optimizer, lambda key: jnp.ones(3), config.seed)
    return Job(
        config,
        1,
        Trainable("optimizer", None, lambda: None, None, None, export),
        np.asarray,
        init,
        jax.jit(init),
        devices.population_map(step, 1, axes),
        axes,
        estimator,
        optimizer,
        jax.jit(lambda theta: {"eval/mean_loss": jnp.sum(theta**2)}),
    )


def rows(workdir):
    """Rows of ``metrics.jsonl`` without the times."""
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [
        {k: v for k, v in json.loads(line).items() if not k.startswith("time/")} for line in lines
    ]


def contents(folder):
    """Every file below, with the digest of what is in it."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def _flip(path):
    data = bytearray(path.read_bytes())
    place = len(data) // 2
    place -= data[place] == ord("\n")  # Without the end of a row two rows are lost, not one.
    data[place] ^= 1
    path.write_bytes(bytes(data))


def _truncate(path):
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


DAMAGES = {
    "one bit flipped": _flip,
    "truncated": _truncate,
    "emptied": lambda path: path.write_bytes(b""),
    "deleted": lambda path: path.unlink(),
}
