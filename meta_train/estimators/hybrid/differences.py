"""The searches of Hybrid-ES that estimate: central differences over pairs around theta.

Below, ``D_p = (L(theta + e_p) - L(theta - e_p)) / 2`` with perturbations ``e_p`` of standard
deviation ``sigma``; a pair with a cost that is not finite contributes zero.
"""

import jax
import jax.numpy as jnp

from meta_train.checks import check_whole
from meta_train.estimators.hybrid.messages import Costs, Sends
from meta_train.estimators.hybrid.searches import Search, Setting, perturbation, weighted_sum
from meta_train.estimators.perturbations import orthonormal

# The address of the draws within the span of past surrogates; no row has this index.
_WITHIN = 2**32 - 4


def control_variate() -> Search:
    """``g = d + mean_p (D_p - d . e_p) e_p / sigma^2``.

    Unbiased for the gradient of the loss smoothed by the perturbation, whatever ``d``; its
    variance grows with ``|grad L - d|^2``, to leading order in sigma. Entries that a mask leaves
    out are ``d``'s, so those are biased.
    """

    def step(setting, direction, sent):
        d, slopes = setting.surrogate, _slopes(setting, sent)
        rows = jnp.arange(len(slopes), dtype=jnp.int32)
        slopes = slopes - jax.lax.map(lambda row: jnp.vdot(d, direction(row)), rows)
        total = weighted_sum(setting, direction, rows, _finite(slopes)) * (1 / len(rows))
        return jnp.where(setting.allowed, d + _per_variance(setting, total), d)

    return Search("control_variate", Sends.ALL, step, paired=True)


def guided(*, num_surrogates: int = 1, alpha: float = 0.5) -> Search:
    """``g = mean_p D_p e_p / sigma^2`` with perturbations stretched along past surrogates.

    ``e ~ N(0, sigma^2 [alpha I + (1 - alpha) P/k U U^T])``, ``U`` the span of the last ``k``
    gradients: the smoothed gradient stretched along ``U``. Gradients that are not there yet are
    random.

    Args:
      num_surrogates: ``k``, at most the size of theta.
      alpha: isotropic share, in ``(0, 1]``.

    Raises:
      ValueError: on a value out of range.

    Source: Maheswaranathan et al. 2019.
    """
    check_whole(num_surrogates=num_surrogates)
    if not 0 < alpha <= 1:
        raise ValueError(f"`alpha` must be above 0 and at most 1, got alpha={alpha}.")

    def init(key, size, dtype):
        # Random before they are gradients: a basis of zeros would not be.
        return jax.random.normal(key, (num_surrogates, size), dtype)

    def direction(setting, draws, row):
        eps = draws.row(row)
        key = jax.random.fold_in(jax.random.fold_in(draws.key, _WITHIN), row)
        within = jax.random.normal(key, (num_surrogates,), eps.dtype)
        stretch = jnp.sqrt((1 - alpha) * eps.size / num_surrogates)
        eps = jnp.sqrt(alpha) * eps + stretch * within @ setting.directions
        return perturbation(setting, eps)

    def step(setting, direction, sent):
        slopes = _finite(_slopes(setting, sent))
        rows = jnp.arange(len(slopes), dtype=jnp.int32)
        total = weighted_sum(setting, direction, rows, slopes) * (1 / len(rows))
        return _per_variance(setting, total)

    return Search(
        "guided",
        Sends.ALL,
        step,
        paired=True,
        independent=lambda rows: num_surrogates,
        init=init,
        observe=lambda past, gradient: jnp.concatenate([gradient[None], past[:-1]]),
        directions=lambda past, d, draws, rows: orthonormal(past.T).T,
        direction=direction,
    )


def past_descent() -> Search:
    """The projection of the gradient on the span of ``d`` and random directions; the next ``d``.

    Central differences along ``d`` and all other rows, orthonormal and of length ``sigma``.

    Source: Meier et al. 2019. Differs: they take the derivative along ``d`` as given; here it is a
    central difference, exact for quadratics.
    """

    def directions(past, d, draws, rows):
        random = [draws.row(row) for row in range(1, rows)]
        return orthonormal(jnp.stack([d, *random], axis=1)).T

    def step(setting, direction, sent):
        slopes = _finite(_slopes(setting, sent))
        rows = jnp.arange(len(slopes), dtype=jnp.int32)
        return _per_variance(setting, weighted_sum(setting, direction, rows, slopes))

    return Search(
        "past_descent",
        Sends.ALL,
        step,
        paired=True,
        keeps_step=True,
        independent=lambda rows: rows,
        directions=directions,
        direction=lambda setting, draws, row: setting.sigma * setting.directions[row],
    )


def _slopes(setting: Setting, sent: Costs) -> jax.Array:
    """``D_p``, ``[pairs]``."""
    return ((sent.costs[0::2] - sent.costs[1::2]) / 2).astype(setting.surrogate.dtype)


def _finite(slopes: jax.Array) -> jax.Array:
    return jnp.where(jnp.isfinite(slopes), slopes, 0.0)


def _per_variance(setting: Setting, total: jax.Array) -> jax.Array:
    """``total / sigma^2``, zero where sigma is."""
    # XLA may turn a division by one number into a product, in one program and not another.
    return jnp.where(setting.sigma > 0, total * (1 / setting.sigma**2), 0.0)
