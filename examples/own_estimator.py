"""A gradient estimator of your own: simultaneous perturbation with forward differences.

    python -m launch.train --workdir=runs/spsa --cfg.estimator=examples.own_estimator:spsa \\
        --cfg.estimator.sigma=0.05 --cfg.task=quadratic --cfg.optimizer=sgdm --cfg.inner.horizon=20

An estimator sees an `UnrolledSystem`, whatever that is made of, and gives the gradient of its
mean loss per step. Two rules make it run on any number of devices with the same numbers: each
leaf of its state has a leading axis of particles, and a particle's draws are keyed by its own
number.
"""

import jax
import jax.numpy as jnp

from meta_train import UnrolledSystem, unroll
from meta_train.estimators import GradientEstimator, Horizons
from meta_train.estimators.base import population_mean


def spsa(
    system: UnrolledSystem, horizons: Horizons, num_particles: int = 32, sigma: float = 0.01
) -> GradientEstimator:
    """``(F(theta + sigma s) - F(theta)) / sigma * s`` with random signs ``s``, of whole episodes.

    Args:
      num_particles: inner runs, half of them perturbed.
      sigma: size of the perturbation of every entry of theta.
    """
    if not horizons.fixed:
        raise ValueError("`horizons` must be fixed, got several lengths; leave min_horizon at 0.")
    num_pairs, horizon = num_particles // 2, horizons.max

    def init(theta, key):
        del theta, key  # Every episode is whole, so nothing is carried over but the numbers.
        return jnp.arange(num_pairs)

    def estimate(theta, ids, key):
        def particle(number):
            key_signs, key_begin, key_data = jax.random.split(jax.random.fold_in(key, number), 3)
            leaves, tree = jax.tree.flatten(theta)
            keys = jax.random.split(key_signs, len(leaves))
            signs = [
                jax.random.rademacher(k, x.shape, x.dtype)
                for k, x in zip(keys, leaves, strict=True)
            ]
            signs = tree.unflatten(signs)

            def mean_loss(size):
                moved = jax.tree.map(lambda x, s: x + size * s, theta, signs)
                state = system.init(moved, key_begin, jnp.int32(horizon))
                return jnp.mean(unroll(system, moved, state, key_data, horizon)[1])

            plain, perturbed = mean_loss(0.0), mean_loss(sigma)
            slope = (perturbed - plain) / sigma
            return jax.tree.map(lambda s: slope * s, signs), plain

        contributions, losses = jax.vmap(particle)(ids)
        grad, _, metrics = population_mean(contributions, losses)
        return grad, ids, metrics

    return GradientEstimator(init, estimate)


def main(num_particles: int = 4_000) -> tuple[float, float, float]:
    """Compares with the exact derivative, for two hyperparameters of SGD.

    Returns the norm of the exact one, the distance of the estimate, and its standard error.
    """
    from learned_opt import learnable_sgdm
    from meta_train.estimators import bptt, fixed_horizon
    from meta_train.inner import inner_training
    from tasks import quadratic_family

    optimizer, horizons = learnable_sgdm(0.05), fixed_horizon(10)
    system = inner_training(quadratic_family(dim=3), optimizer)
    theta = optimizer.init(jax.random.key(0))
    found, errors = [], []
    for estimator in (
        spsa(system, horizons, num_particles, sigma=0.01),
        bptt(system, num_particles=num_particles, horizons=horizons),
    ):
        state = estimator.init(theta, jax.random.key(1))
        grad, ids, metrics = jax.jit(estimator.estimate)(theta, state, jax.random.key(2))
        found.append(jnp.stack(jax.tree.leaves(grad)))
        errors.append(metrics["grad_sq_norm"] / len(jax.tree.leaves(ids)[0]))
    exact, distance = jnp.linalg.norm(found[1]), jnp.linalg.norm(found[0] - found[1])
    error = jnp.sqrt(sum(errors))
    print(
        f"d loss / d theta: SPSA {found[0]}, exact {found[1]}, {distance:.4f} +- {error:.4f} apart"
    )
    return float(exact), float(distance), float(error)


if __name__ == "__main__":
    main()
