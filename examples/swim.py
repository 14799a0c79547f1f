"""A policy by PES: a swimmer of three links, without a gradient of the physics.

    make setup EXTRAS=control
    python -m examples.swim

The policy is linear, 16 weights from zero. Ten pairs of swimmers, in all phases of their episodes
of 1,000 steps, swim 100 steps between two steps of theta; nothing is told them but their reward,
the speed along x less a little for effort. The returns printed are of Gymnasium's own simulation.
"""

import jax
import jax.numpy as jnp
import optax

from meta_train import UnrolledSystem, init_state, make_step
from meta_train.estimators import fixed_horizon, pes
from tasks.dynamics.control import Control


def main(num_steps: int = 150, every: int = 25, num_pairs: int = 10, horizon: int = 1000):
    """Trains; the mean returns of two rollouts before and after every so many steps."""
    dynamics = Control("swimmer").dynamics()
    system = UnrolledSystem(dynamics.init, dynamics.step)
    estimator = pes(
        system,
        num_pairs=num_pairs,
        truncation=horizon // 10,
        horizons=fixed_horizon(horizon),
        sigma=0.3,
    )
    meta_optimizer = optax.sgd(0.3)
    state = init_state(estimator, meta_optimizer, dynamics.init_theta, seed=0)
    step = jax.jit(make_step(estimator, meta_optimizer))
    judge = jax.jit(lambda theta, seed: dynamics.evaluate(theta, 2, seed)["return"])
    returns = [float(judge(state.theta, jnp.int32(0)))]
    for index in range(num_steps):
        state, _ = step(state)
        if (index + 1) % every == 0:
            returns.append(float(judge(state.theta, jnp.int32(0))))
            print(f"{2 * num_pairs * (index + 1) * horizon // 10:,} steps: {returns[-1]:.0f}")
    return returns


if __name__ == "__main__":
    main()
