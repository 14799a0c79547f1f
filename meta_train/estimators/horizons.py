"""How long episodes are, and what a step counts in the mean over them."""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from meta_train.checks import MAX_LENGTH, check_multiple, check_whole, is_whole


@dataclass(frozen=True, eq=False)
class Horizons:
    """Episode lengths: ``values`` int ``[H]``, ascending, with probabilities ``probs`` ``[H]``.

    Raises:
      ValueError: unless the lengths are whole numbers from 1 to 2^30, strictly ascending, and the
        probabilities are as many and sum to 1.
    """

    values: np.ndarray
    probs: np.ndarray

    def __post_init__(self):
        values, probs = np.asarray(self.values), np.asarray(self.probs)
        whole = np.issubdtype(values.dtype, np.integer) and values.ndim == 1 and values.size
        if (
            not whole
            or values.min() < 1
            or values.max() > MAX_LENGTH
            or np.any(np.diff(values) < 1)
        ):
            raise ValueError(
                f"`horizon` must be a whole number from 1 to {MAX_LENGTH}, or several in ascending "
                f"order, got {values.tolist()}. For episodes without an end take {MAX_LENGTH}, "
                "which is never reached."
            )
        real = np.issubdtype(probs.dtype, np.number) and np.isrealobj(probs)
        if not (
            real
            and probs.shape == values.shape
            and np.all(probs >= 0)
            and abs(probs.sum(dtype=np.float64) - 1) <= 1e-6
        ):
            raise ValueError(
                f"`probs` must be {values.size} probabilities that sum to 1, one a horizon, got "
                f"{probs.tolist()}; divide them by their sum."
            )
        object.__setattr__(self, "values", values.astype(np.int64))
        object.__setattr__(self, "probs", probs.astype(np.float64))

    @property
    def mean(self) -> float:
        return float(np.sum(self.values * self.probs))

    @property
    def max(self) -> int:
        return int(self.values[-1])

    @property
    def fixed(self) -> bool:
        """Whether all episodes are equally long."""
        return len(self.values) == 1

    def draw(self, key: jax.Array) -> jax.Array:
        """One episode length, int32 scalar."""
        values = jnp.asarray(self.values, jnp.int32)
        if self.fixed:
            return values[0]
        return jax.random.choice(key, values, p=jnp.asarray(self.probs, jnp.float32))


def fixed_horizon(horizon: int) -> Horizons:
    """Every episode lasts ``horizon`` steps, at most 2^30.

    Raises:
      ValueError: on anything else.
    """
    check_whole(maximum=MAX_LENGTH, horizon=horizon)
    return Horizons(np.array([horizon]), np.array([1.0]))


def log_uniform_horizons(minimum: int, maximum: int, multiple: int) -> Horizons:
    """``exp(U(ln minimum, ln maximum))`` rounded up to a multiple of ``multiple``.

    The usual curriculum of learned-optimizer training (Metz et al. 2019 and after); the
    rounding lets resets fall between truncations.

    Raises:
      ValueError: if ``0 < minimum < maximum`` fails, or ``maximum`` is not a multiple.
    """
    if not is_whole(minimum) or not is_whole(maximum) or not 0 < minimum < maximum:
        raise ValueError(
            f"`min_horizon` must be positive and below `horizon`, got min_horizon={minimum}, "
            f"horizon={maximum}; leave it 0 for a fixed horizon."
        )
    check_multiple(maximum, multiple)
    values = np.arange(math.ceil(minimum / multiple), maximum // multiple + 1) * multiple
    edges = np.log(np.concatenate([[minimum], values]))
    return Horizons(values, np.diff(edges) / (edges[-1] - edges[0]))


def check_horizons(horizons: Any) -> None:
    """Raises ``ValueError`` unless it is a distribution of episode lengths."""
    if not isinstance(horizons, Horizons):
        raise ValueError(
            f"`horizons` must be a distribution of episode lengths, got {horizons!r}; write "
            "`fixed_horizon(STEPS)`, `log_uniform_horizons(...)` or `Horizons(values, probs)`."
        )


def check_truncation(horizons: Horizons, truncation: int) -> None:
    """Raises ``ValueError`` unless ``1 <= truncation <= horizons.max``, a whole number."""
    check_horizons(horizons)
    if not is_whole(truncation) or not 1 <= truncation <= horizons.max:
        raise ValueError(
            f"`truncation` must be at least 1 and at most the longest horizon, a whole number, got "
            f"truncation={truncation}, horizon={horizons.max}; further steps would always be idle."
        )


def num_windows(horizon: Any, truncation: int) -> Any:
    """Truncations that an episode of ``horizon`` steps takes; the last may be a part of one."""
    return -(-horizon // truncation)


def step_weight(horizons: Horizons, truncation: int) -> float:
    """What a step counts in its truncation, ``E[truncations of an episode] / E[horizon]``.

    So that the mean over truncations is the sum over an episode by ``E[horizon]``. It is
    ``1 / truncation`` if all horizons are multiples of it.
    """
    return float(num_windows(horizons.values, truncation) @ horizons.probs) / horizons.mean


def episode_loss(losses: jax.Array, horizons: Horizons, horizon: jax.Array) -> jax.Array:
    """One episode's share of the mean per-step loss: ``sum_{t<h} L_t / E[h]`` with ``h`` drawn.

    ``losses`` is float ``[horizons.max]``, ``horizon`` the length drawn. The expectation over
    ``h`` weighs every inner step alike, as the truncated estimators do.
    """
    kept = jnp.arange(horizons.max) < horizon
    return jnp.sum(jnp.where(kept, losses, 0.0)) / horizons.mean
