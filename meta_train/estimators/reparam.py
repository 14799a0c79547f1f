"""Reparameterization gradients: backpropagation at perturbed parameters, alone and with ES."""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import optax

from meta_train.checks import check_positive, check_whole
from meta_train.estimators.base import GradientEstimator, checked, map_particles, population_mean
from meta_train.estimators.config import ONE_DEVICE, PairsConfig, Population
from meta_train.estimators.derivatives import resting_after_horizon
from meta_train.estimators.horizons import Horizons, episode_loss
from meta_train.estimators.particles import check_population
from meta_train.estimators.perturbations import add_scaled, perturbation_sampler, scaled
from meta_train.unroll import UnrolledSystem, unroll

VARIANCE_FLOOR = 1e-8


def reparam(
    system: UnrolledSystem,
    *,
    num_pairs: int,
    horizons: Horizons,
    sigma: float,
    sampler: str = "normal",
    chunk: int | None = None,
) -> GradientEstimator:
    """The reparameterization gradient of the smoothed loss: ``mean_i grad L(theta +- eps_i)``.

    Unbiased for the gradient of the mean per-step loss smoothed by one Gaussian perturbation
    of theta held over the episode, the objective of ``full_es``, where the loss does not jump in
    theta; where it does (a ReLU network inside), for the smoothed derivative, without the jumps,
    which ``full_es`` counts: see ``derivatives``. Low variance where the loss is smooth, exploding
    with it in chaotic regions. ``2 N T`` forward and backward steps;
    memory: the residuals of ``T`` steps for both halves of the ``chunk`` pairs computed at
    a time.

    Args:
      num_pairs: ``N``, antithetic pairs; the halves share data and keys.
      horizons: distribution of episode lengths (``T`` is the largest; shorter are masked).
      sigma: standard deviation of the perturbations.
      sampler: their distribution; see ``perturbations.perturbation_sampler``.
      chunk: pairs computed at a time; see ``map_particles``.

    Raises:
      ValueError: on a non-positive number, or (from ``init``) a loss without a derivative.

    Source: Metz et al. 2019, "Understanding and correcting pathologies in the training of
    learned optimizers"; Vicol et al. 2021, Table 1.
    """
    check_population(num_pairs, horizons, chunk, unit="pairs")
    check_positive(sigma=sigma)
    perturbations = perturbation_sampler(sampler, num_pairs, sigma)

    def init(theta, key):
        del theta, key
        return jnp.arange(num_pairs, dtype=jnp.int32)

    def episode(perturb, theta, key, particle_id):
        key = jax.random.fold_in(key, particle_id)
        perturb = partial(perturb, particle_id=particle_id)
        _, by_backprop, loss = _pair_estimates(system, theta, key, perturb, horizons, sigma)
        return by_backprop, loss

    def estimate(theta, ids, key):
        episodes = partial(episode, perturbations(theta, key), theta, key)
        grads, losses = map_particles(episodes, ids, chunk)
        grad, _, metrics = population_mean(grads, losses)
        return grad, ids, metrics

    # Its estimates are divided by no sigma: with a small one they are `bptt`'s.
    return checked("reparam", system, init, estimate, differentiates=True)


def reparam_es(
    system: UnrolledSystem,
    *,
    num_particles: int,
    pairs_per_particle: int,
    horizons: Horizons,
    sigma: float,
    sampler: str = "normal",
    chunk: int | None = None,
) -> GradientEstimator:
    """Reparameterization and ES gradients of the same draws, combined by inverse variance.

    Each particle runs ``M`` pairs and combines, for each entry of theta, the two means with
    weights proportional to their inverse sample variances: close to the better one, in smooth and
    in chaotic regions. Unbiased for the gradient of the mean per-step loss smoothed as in
    ``full_es``, where the loss does not jump in theta; where it does, the two expect different
    things (see ``reparam``), and this a mixture of them. ``2 N M T`` forward and backward steps;
    memory: residuals of ``T`` steps for the ``2 M`` runs of each of the ``chunk`` particles
    computed at a time.

    Args:
      num_particles: ``N``, groups of pairs.
      pairs_per_particle: ``M``, even and at least 4.
      horizons: distribution of episode lengths (``T`` is the largest; shorter are masked).
      sigma: standard deviation of the perturbations.
      sampler: their distribution; see ``perturbations.perturbation_sampler``.
      chunk: particles computed at a time; see ``map_particles``.

    Raises:
      ValueError: on a non-positive number, a bad ``pairs_per_particle``, or (from ``init``) a
        loss without a derivative.

    Source: Metz et al. 2019, section 3.3. Differs: each half of the pairs is weighted by the
    variances of the other half (weights from the averaged samples themselves are biased),
    and the weights are of a particle, not of the whole population, so devices need not talk.
    A group in which any backpropagated gradient is not finite uses its ES gradients alone.
    With a sampler whose components are not normal the two gradients are those of two different
    smoothings, equal up to quadratic losses.
    """
    check_population(num_particles, horizons, chunk)
    check_positive(sigma=sigma)
    check_whole(pairs_per_particle=pairs_per_particle)
    if pairs_per_particle < 4 or pairs_per_particle % 2:
        raise ValueError(
            f"`pairs_per_particle` must be even and at least 4, got pairs_per_particle="
            f"{pairs_per_particle}; each half of the pairs weights the other by its variances."
        )
    perturbations = perturbation_sampler(sampler, pairs_per_particle // 2, sigma)

    def init(theta, key):
        del theta, key
        return jnp.arange(num_particles, dtype=jnp.int32)

    def group(theta, key, particle_id):
        key_pairs, key_blocks = jax.random.split(jax.random.fold_in(key, particle_id))
        keys = jax.random.split(key_pairs, pairs_per_particle).reshape(2, -1)

        def half(which, keys):
            # A block of its own: its weights must not depend on the draws they weigh.
            perturb = perturbations(theta, jax.random.fold_in(key_blocks, which))

            def one(key, index):
                own = partial(perturb, particle_id=index)
                return _pair_estimates(system, theta, key, own, horizons, sigma)

            return jax.vmap(one)(keys, jnp.arange(keys.size))

        by_es, by_backprop, losses = jax.vmap(half)(jnp.arange(2), keys)
        both = jax.tree.map(_combine, by_es, by_backprop)
        alone = jax.tree.map(lambda x: jnp.mean(x, axis=(0, 1)), by_es)
        usable = jnp.stack([jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(by_backprop)])
        return optax.tree.where(jnp.all(usable), both, alone), jnp.mean(losses)

    def estimate(theta, ids, key):
        grads, losses = map_particles(partial(group, theta, key), ids, chunk)
        grad, _, metrics = population_mean(grads, losses)
        return grad, ids, metrics

    return checked(
        "reparam_es",
        system,
        init,
        estimate,
        differentiates=True,
        sigma=sigma,
        sampler=sampler,
    )


def _pair_estimates(system, theta, key, perturb, horizons, sigma):
    """One pair's ES gradient, its reparameterization gradient, and its mean loss."""
    key_restart, key_eps, key_data = jax.random.split(key, 3)
    key_horizon, key_begin = jax.random.split(key_restart)
    horizon = horizons.draw(key_horizon)
    eps = perturb(key_eps)
    run = resting_after_horizon(system, horizons, horizon)

    def loss(theta):
        state = run.init(theta, key_begin, horizon)
        losses = unroll(run, theta, state, key_data, horizons.max)[1]
        return episode_loss(losses, horizons, horizon)

    def half(sign):
        return jax.value_and_grad(loss)(add_scaled(theta, sign, eps))

    (positive, negative), grads = jax.vmap(half)(jnp.array([1.0, -1.0]))
    by_es = scaled((positive - negative) / (2 * sigma**2), eps)
    by_backprop = jax.tree.map(lambda g: jnp.mean(g, axis=0), grads)
    return by_es, by_backprop, (positive + negative) / 2


def _combine(by_es: jax.Array, by_backprop: jax.Array) -> jax.Array:
    """The inverse-variance mean of two ``[2, M/2, ...]``, weights crossed over halves."""

    def weighted(mine, others):
        w_es, w_backprop = (
            1 / (jnp.var(x[others], axis=0, ddof=1) + VARIANCE_FLOOR) for x in (by_es, by_backprop)
        )
        means = (jnp.mean(x[mine], axis=0) for x in (by_es, by_backprop))
        mean_es, mean_backprop = means
        return (w_es * mean_es + w_backprop * mean_backprop) / (w_es + w_backprop)

    return (weighted(0, 1) + weighted(1, 0)) / 2


@dataclass(frozen=True)
class Reparam(PairsConfig):
    """See ``reparam``."""

    def make(self, system, horizons, context=ONE_DEVICE):
        return reparam(system, horizons=horizons, **self.arguments(context))


@dataclass(frozen=True)
class ReparamES(PairsConfig):
    """See ``reparam_es``; its particles are groups of pairs.

    Attributes:
      pairs_per_group: pairs that share weights, even and at least 4; few make heavy tails.
    """

    pairs_per_group: int = 8

    def __post_init__(self):
        super().__post_init__()
        check_whole(pairs_per_group=self.pairs_per_group)
        if self.pairs_per_group < 4 or self.pairs_per_group % 2:
            raise ValueError(
                "`pairs_per_group` must be even and at least 4, got pairs_per_group="
                f"{self.pairs_per_group}."
            )
        runs = 2 * self.pairs_per_group
        if self.num_particles % runs:
            raise ValueError(
                f"`num_particles` must be whole groups of {self.pairs_per_group} pairs, a multiple "
                f"of {runs}, got num_particles={self.num_particles}. Try "
                f"{self.num_particles + -self.num_particles % runs}."
            )

    @property
    def population(self):
        runs = 2 * self.pairs_per_group
        return Population("groups", self.num_particles // runs, runs)

    def make(self, system, horizons, context=ONE_DEVICE):
        return reparam_es(
            system,
            num_particles=self.population.size,
            pairs_per_particle=self.pairs_per_group,
            horizons=horizons,
            sigma=self.sigma,
            sampler=self.sampler,
            chunk=self.chunk or context.chunk,
        )
