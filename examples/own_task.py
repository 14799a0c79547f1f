"""A task of your own: regression on sine waves of random phase.

Train on it from the folder of the repository (or copy the file to where you work, and leave out
`examples.`):

    python -m launch.train --workdir=runs/waves --cfg.task=examples.own_task:waves \\
        --cfg.task.width=32

The arguments of the function, each with a default, are the fields of the configuration, and the
docstring is what `--help` says of them. Everything runs inside `jit`, `vmap` and `scan`, so a
batch is drawn by its key.
"""

import jax
import jax.numpy as jnp

from tasks import Task


def waves(width: int = 16, batch_size: int = 32) -> Task:
    """Regression on a sine.

    Args:
      width: hidden units.
      batch_size: points a batch.
    """

    def sample(key):  # One problem of the family, as arrays.
        return {"phase": jax.random.uniform(key, maxval=6.0)}

    def init(instance, key):  # The parameters at the start.
        return {
            "in": jax.random.normal(key, (1, width)),
            "b": jnp.zeros(width),
            "out": jnp.zeros((width, 1)),
        }

    def batch(instance, key, split):  # Of "train", "validation" or "test": here all are endless.
        x = jax.random.uniform(key, (batch_size, 1), minval=-3.0, maxval=3.0)
        return x, jnp.sin(x + instance["phase"])

    def loss(params, instance, batch, key):  # One number; the key is for noise in the model.
        x, y = batch
        return jnp.mean((jnp.tanh(x @ params["in"] + params["b"]) @ params["out"] - y) ** 2)

    def score(params, instance, split):  # Optional: what evaluation reports of a whole split.
        x = jnp.linspace(-3, 3, 101)[:, None]
        return {"loss": loss(params, instance, (x, jnp.sin(x + instance["phase"])), None)}

    def constant_loss(instance):  # Optional: the scale of its losses, here a sine's variance.
        return jnp.float32(0.5)

    return Task(sample, init, batch, loss, score, unit="squared error", constant_loss=constant_loss)


def main() -> float:
    """Trains one network with Adam: a look at the task before anything is meta-trained on it."""
    import optax

    task = waves()
    instance = task.sample(jax.random.key(0))
    params = task.init(instance, jax.random.key(1))
    tx = optax.adam(0.03)
    state = tx.init(params)

    @jax.jit
    def step(params, state, key):
        batch = task.batch(instance, key, "train")
        updates, state = tx.update(jax.grad(task.loss)(params, instance, batch, key), state)
        return optax.apply_updates(params, updates), state

    for key in jax.random.split(jax.random.key(2), 300):
        params, state = step(params, state, key)
    found = float(task.score(params, instance, "test")["loss"])
    print(f"Adam's loss after 300 steps: {found:.4f} (of the mean: 0.5)")
    return found


if __name__ == "__main__":
    main()
