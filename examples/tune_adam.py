"""Tune Adam by hypergradients: its rate, decays and epsilon by the exact derivative of whole runs.

    python -m examples.tune_adam

Adam with its four hyperparameters as theta is an optimizer like any other (`learnable_adam`), and
`bptt` is the exact derivative of a run with respect to them: backpropagation through all its
steps. It is a good guide here since the runs are short and the network is smooth (tanh); with
ReLUs or long runs take `pes` instead.
"""

import jax
import jax.numpy as jnp
import optax

from examples.own_task import waves
from learned_opt import learnable_adam
from meta_train import init_state, make_step
from meta_train.estimators import bptt, fixed_horizon
from meta_train.evaluate import inner_curves
from meta_train.inner import inner_training


def main(num_steps: int = 100, horizon: int = 50) -> tuple[float, float]:
    """Returns the mean training loss of fresh runs with the first and the tuned hyperparameters."""
    task, optimizer = waves(), learnable_adam(learning_rate=1e-3)
    estimator = bptt(
        inner_training(task, optimizer), num_particles=8, horizons=fixed_horizon(horizon)
    )
    meta_optimizer = optax.adam(0.1)
    state = init_state(estimator, meta_optimizer, optimizer.init, seed=0)
    before = state.theta
    step = jax.jit(make_step(estimator, meta_optimizer))
    for _ in range(num_steps):
        state, _ = step(state)

    curves = jax.jit(lambda theta: inner_curves(task, optimizer, theta, horizon, 20, seed=1))
    first, last = (float(jnp.mean(curves(theta))) for theta in (before, state.theta))
    rate = float(jnp.exp(state.theta["params"]["log_learning_rate"]))
    print(f"mean loss over {horizon} steps {first:.3f} -> {last:.3f}; rate 0.001 -> {rate:.3f}")
    return first, last


if __name__ == "__main__":
    main()
