"""How far, and in which entries, the candidates of Hybrid-ES leave the surrogate gradient."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from meta_train.checks import check_positive, check_whole
from meta_train.samplers import sampler_named

MASKS = ("none", "random", "layers", "largest")
_DECAY = 0.9  # Of the running variance, per refresh.
_FLOOR = 1e-6  # Of a layer's variance, as a share of the mean over layers.
_CLIP = 100.0  # Largest growth of the variance from one gradient to the next.
_TARGET = 1 / 5
_MAX_STRETCH = math.log(1e3)  # How far the success rule may take sigma, either way.


class Noise(NamedTuple):
    """The perturbations of Hybrid-ES.

    Attributes:
      sigma: standard deviation of the perturbations; with ``relative``, in units of that of
        the gradient's components (the poster's optimum is then 1).
      sampler: their distribution, a name of ``samplers.SAMPLERS``.
      relative: multiply by the running standard deviation of the refresh gradient's components.
      layers: sizes of the consecutive parts of theta that are scaled (and masked) each on its
        own; empty: one part.
      success_rate: above 0, the speed of the 1/5th success rule: after a step in which a share
        ``p`` of the candidates beat the stale step, sigma grows by
        ``exp(success_rate * (p - 1/5))``. A sensible speed is 0.5. Who wins is decided on the
        step's own data: at the noise floor of small batches candidates fit the batch, and
        sigma ends too large; average more tasks there.
      mask: which entries are perturbed, drawn anew each step, for all candidates alike.
        ``none``: all. ``random``: each with probability ``fraction``. ``layers``: that share of
        the layers. ``largest``: that share of the entries, where the surrogate is largest.
      fraction: of entries or layers, in ``(0, 1]``.
    """

    sigma: Any
    sampler: str = "normal"
    relative: bool = False
    layers: tuple[int, ...] = ()
    success_rate: float = 0.0
    mask: str = "none"
    fraction: float = 1.0


class Scale(NamedTuple):
    """What sigma has learned: running ``variance`` ``[layers]``, of ``seen`` refreshes (int32),
    and ``log_stretch``, the success rule's factor."""

    variance: jax.Array
    seen: jax.Array
    log_stretch: jax.Array


def check_noise(noise: Noise) -> None:
    """Raises ``ValueError`` naming the first field that is out of range."""
    check_positive(sigma=noise.sigma)
    sampler_named(noise.sampler)
    if noise.mask not in MASKS:
        raise ValueError(f"`mask` must be one of {list(MASKS)}, got {noise.mask!r}.")
    if not 0 < noise.fraction <= 1:
        raise ValueError(
            f"`fraction` must be above 0 and at most 1, got fraction={noise.fraction}; "
            "with nothing perturbed use the mode 'stale'."
        )
    if noise.mask == "none" and noise.fraction != 1:
        raise ValueError(
            f"`fraction` needs a mask, got fraction={noise.fraction} with mask='none'. "
            f"Choose one of {list(MASKS[1:])}, or fraction=1."
        )
    if not 0 <= noise.success_rate < math.inf:
        raise ValueError(
            f"`success_rate` must be a finite number of at least 0, got {noise.success_rate}."
        )


def check_layers(noise: Noise, size: int) -> None:
    """Raises ``ValueError`` unless the layers make up a theta of ``size`` entries."""
    for i, layer in enumerate(noise.layers):
        check_whole(minimum=0, **{f"layers[{i}]": layer})
    if noise.layers and sum(noise.layers) != size:
        raise ValueError(
            f"`layers` must sum to the size of theta, got {noise.layers}, in total "
            f"{sum(noise.layers)}, for {size} entries."
        )


def init_scale(noise: Noise, dtype: Any) -> Scale:
    """The state before the first refresh."""
    zeros = jnp.zeros(max(1, len(noise.layers)), dtype)
    return Scale(zeros, jnp.zeros([], jnp.int32), jnp.zeros([], dtype))


def observe_gradient(noise: Noise, scale: Scale, gradient: jax.Array) -> Scale:
    """The scale after a refresh gradient ``[P]``.

    One gradient raises the variance of a layer to a hundred times the running one at most, and
    none if its own overflows: gradients explode now and then, and sigma should not for long.
    A layer of one entry has no spread about its mean; there it is the second moment, and one of
    none has none.
    """
    parts = _split(noise, gradient)
    found = [jnp.var(part) if part.size > 1 else jnp.sum(part**2) for part in parts]
    variance = jnp.stack(found)
    usable = jnp.all(jnp.isfinite(variance))
    running = scale.variance / _seen_share(scale)
    variance = jnp.where(running > 0, jnp.minimum(variance, _CLIP * running), variance)
    variance = _DECAY * scale.variance + (1 - _DECAY) * variance
    return scale._replace(
        variance=jnp.where(usable, variance, scale.variance),
        seen=scale.seen + usable.astype(scale.seen.dtype),
    )


def observe_success(noise: Noise, scale: Scale, share: jax.Array) -> Scale:
    """The scale after a step in which a ``share`` of the candidates beat the stale step."""
    stretch = scale.log_stretch + noise.success_rate * (share - _TARGET)
    return scale._replace(log_stretch=jnp.clip(stretch, -_MAX_STRETCH, _MAX_STRETCH))


def standard_deviation(noise: Noise, scale: Scale, size: int) -> jax.Array:
    """Sigma of every entry, ``[P]``."""
    sigma = noise.sigma * jnp.exp(scale.log_stretch)
    if not noise.relative:
        return jnp.broadcast_to(sigma, (size,))
    variance = scale.variance / _seen_share(scale)
    floored = jnp.maximum(variance, _FLOOR * jnp.mean(variance))
    return sigma * _spread(noise, jnp.sqrt(floored), size)


def mask(noise: Noise, key: jax.Array, surrogate: jax.Array) -> jax.Array:
    """Which entries are perturbed, bool ``[P]``."""
    size = surrogate.size
    if noise.mask == "random":
        return jax.random.bernoulli(key, noise.fraction, (size,))
    if noise.mask == "layers":
        num = max(1, len(noise.layers))
        chosen = jax.random.permutation(key, num) < math.ceil(noise.fraction * num)
        return _spread(noise, chosen, size)
    if noise.mask == "largest":
        magnitude = jnp.abs(surrogate)
        kept = jax.lax.top_k(magnitude, math.ceil(noise.fraction * size))[1]
        return jnp.zeros(size, bool).at[kept].set(True)
    return jnp.ones(size, bool)


def _seen_share(scale: Scale) -> jax.Array:
    """The weights of the running mean in all, which starts at zero; never zero itself."""
    return 1 - _DECAY ** jnp.maximum(scale.seen, 1).astype(scale.variance.dtype)


def _split(noise: Noise, vector: jax.Array) -> list[jax.Array]:
    ends = [sum(noise.layers[:i]) for i in range(1, len(noise.layers))]
    return jnp.split(vector, ends)


def _spread(noise: Noise, values: jax.Array, size: int) -> jax.Array:
    """One value a layer, ``[layers]``, as one an entry, ``[P]``."""
    layers = noise.layers or (size,)
    return jnp.concatenate(
        [jnp.broadcast_to(value, (n,)) for value, n in zip(values, layers, strict=True)]
    )
