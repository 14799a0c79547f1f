"""A training loop in Flax NNX with a trained optimizer.

    python -m examples.nnx_loop             # the controller of the package
    python -m examples.nnx_loop runs/demo/optimizer

`nnx.Optimizer` takes any optax transformation, so what `bind` returns too; `value=` reaches
optimizers that read the loss.
"""

import sys

import jax
import jax.numpy as jnp
from flax import nnx

import learned_opt


class Net(nnx.Module):
    """Two layers."""

    def __init__(self, rngs: nnx.Rngs):
        self.hidden = nnx.Linear(2, 32, rngs=rngs)
        self.out = nnx.Linear(32, 1, rngs=rngs)

    def __call__(self, x):
        return self.out(nnx.tanh(self.hidden(x)))


def main(name_or_folder: str = "controller", num_steps: int = 100) -> tuple[float, float]:
    """Learns the product of two numbers; returns the loss at the start and at the end."""
    optimizer, theta = learned_opt.load(name_or_folder)
    model = Net(nnx.Rngs(0))
    tx = nnx.Optimizer(model, optimizer.bind(theta, num_steps=num_steps), wrt=nnx.Param)

    @nnx.jit
    def step(model, tx, x):
        def loss_of(model):
            return jnp.mean((model(x)[:, 0] - x[:, 0] * x[:, 1]) ** 2)

        loss, grads = nnx.value_and_grad(loss_of)(model)
        tx.update(model, grads, value=loss)
        return loss

    losses = [
        float(step(model, tx, jax.random.normal(key, (64, 2))))
        for key in jax.random.split(jax.random.key(1), num_steps)
    ]
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    return losses[0], losses[-1]


if __name__ == "__main__":
    main(*sys.argv[1:])
