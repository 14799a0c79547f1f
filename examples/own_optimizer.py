"""A learned optimizer of your own: how much to trust the sign of a momentum, and how much its size.

    python -m launch.train --workdir=runs/blend --cfg.optimizer=examples.own_optimizer:Blend \\
        --cfg.task=quadratic --cfg.num_steps=300

An optimizer is two functions: `init` draws theta, and `bind` makes an optax transformation of it.
Whatever optax has can be used inside. A network a parameter is made the same way, with a Flax
module in `bind`.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import optax

from learned_opt import LearnedOptimizer, OptimizerConfig


@dataclass(frozen=True)
class Blend(OptimizerConfig):
    """Steps along a momentum's sign and along the momentum itself, each with a rate to be learned.

    Attributes:
      rate: of both at the start.
      momentum: decay of the momentum.
    """

    rate: float = 0.01
    momentum: float = 0.9

    def make(self) -> LearnedOptimizer:
        def init(key):  # Rates are positive, so theta holds their logarithms.
            del key
            log_rate = jnp.log(jnp.float32(self.rate))
            return {"params": {"sign": log_rate, "size": log_rate}}

        def bind(theta, num_steps):
            del num_steps  # For schedules: how long the run will be.
            sign, size = jnp.exp(theta["params"]["sign"]), jnp.exp(theta["params"]["size"])

            def step(momentum, state, params=None):
                move = jax.tree.map(lambda m: -sign * jnp.sign(m) - size * m, momentum)
                return move, state

            return optax.with_extra_args_support(
                optax.chain(
                    optax.trace(self.momentum),
                    optax.GradientTransformation(lambda params: optax.EmptyState(), step),
                )
            )

        return LearnedOptimizer(init, bind)


def main(num_steps: int = 200) -> tuple[float, float]:
    """Meta-trains the two rates on quadratics; returns the meta-loss before and after."""
    from meta_train import init_state, make_step
    from meta_train.estimators import fixed_horizon, pes
    from meta_train.inner import inner_training
    from tasks import quadratic_family

    optimizer = Blend().make()
    system = inner_training(quadratic_family(dim=5), optimizer)
    estimator = pes(system, num_pairs=16, truncation=10, horizons=fixed_horizon(50), sigma=0.05)
    meta_optimizer = optax.adam(0.03)
    state = init_state(estimator, meta_optimizer, optimizer.init, seed=0)
    step = jax.jit(make_step(estimator, meta_optimizer))
    losses = []
    for _ in range(num_steps):
        state, metrics = step(state)
        losses.append(float(metrics["meta_loss"]))
    rates = {name: float(jnp.exp(x)) for name, x in state.theta["params"].items()}
    first, last = (sum(part) / len(part) for part in (losses[:20], losses[-20:]))
    print(f"meta-loss {first:.3f} -> {last:.3f}, rates {rates}")
    return first, last


if __name__ == "__main__":
    main()
