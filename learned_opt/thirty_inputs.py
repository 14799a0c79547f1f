"""The per-parameter network of thirty inputs that VeLO, Celo and Celo2 step by."""

from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp

from learned_opt import adafactor
from learned_opt.limits import limited
from learned_opt.slabs import on_normalized
from learned_opt.small_network import Layer, apply_layers

NUM_INPUTS = 30
NUM_OUTPUTS = 3  # Direction, magnitude, and one that nothing reads.
GRADIENT_LIMIT = 1000.0
_SQUARE_DECAY = 0.999


def network_outputs(
    of_outputs: Callable[..., jax.Array],
    layers: Sequence[Layer],
    grad: jax.Array,
    param: jax.Array,
    new: adafactor.Accumulators,
    *,
    axes: Sequence[int],
    eps: float,
    square_eps: float,
    vectors_have_factors: bool = True,
) -> jax.Array:
    """``of_outputs`` of the three outputs ``[*shape]`` for one tensor.

    Inputs are the gradient, itself within 0.1 of 0, the parameter, the momenta, the second moment,
    momenta and gradient over its root, its inverse root, gradient and momenta over Adafactor's
    root, rows and columns and their inverse roots: 18 that are formed for every parameter, and 12
    that are constant along an axis. Each is divided by its root mean square.

    Args:
      of_outputs: of direction, magnitude and the output that nothing reads, place by place.
      layers: of thirty inputs, in the order of published weights.
      grad, param, new: of one tensor; ``new`` has taken the gradient.
      axes: of the tensor, from its end, that the root mean square is over.
      eps: added to the mean square.
      square_eps: added to the second moment under the root.
      vectors_have_factors: whether tensors of fewer than two axes have the last fifteen inputs,
        made of their second moments in full; else these count as 0.
    """
    first, *others = layers
    before, rows, columns, row_roots, column_roots, last = jnp.split(
        first.kernel, (15, 18, 21, 24, 27)
    )
    offsets = []
    has_factors = new.columns is not None or vectors_have_factors
    if has_factors:
        before = jnp.concatenate([before, last])
        rows, columns = (
            jnp.concatenate(both) for both in ((rows, row_roots), (columns, column_roots))
        )
        offsets = adafactor.offsets(new, axes, eps, rows, columns)
    arrays = grad, param, new, adafactor.root_factors(new), offsets
    return on_normalized(
        partial(_inputs, square_eps, has_factors),
        partial(_outputs, of_outputs),
        axes,
        eps,
        (Layer(before, first.bias), *others),
        arrays,
    )


def _inputs(square_eps, has_factors, arrays):
    grad, param, new, factors, _ = arrays
    momenta = list(new.momenta)
    root = jax.lax.rsqrt(new.square + square_eps)
    if factors is None:
        factored = list(jax.lax.rsqrt(new.rows + 1e-9))
    else:
        factored = [row * column for row, column in zip(*factors, strict=True)]
    own = [grad, jnp.clip(grad, -0.1, 0.1), param, *momenta, new.square]
    own += [*(m * root for m in momenta), root, *(grad * r for r in factored), grad * root]
    if not has_factors:
        return own
    if factors is None:
        return own + list(_over_root(new.momenta, new.rows))
    return own + [m * r for m, r in zip(momenta, factored, strict=True)]


def _outputs(of_outputs, layers, inputs, arrays):
    return of_outputs(*apply_layers(layers, inputs, arrays[-1]))


@partial(jax.jit, static_argnums=(0, 1))  # So that tracing it again costs nothing.
def scaled_steps(
    exp_mult: float,
    own_layers: bool,
    layers: Sequence[Layer],
    old: adafactor.Accumulators,
    grads: jax.Array,
    params: jax.Array,
) -> tuple[jax.Array, adafactor.Accumulators]:
    """``d exp(exp_mult m) rms(p)`` for all ``n`` tensors of one shape, and their accumulators.

    Gradients count as at most 1000, as their authors have it; parameters as at most 1.2e18
    (float32), so that neither squares nor derivatives overflow.

    Args:
      exp_mult: scale of the log-magnitude.
      own_layers: whether ``layers`` have an axis of the tensors before their own.
      layers: of the network that puts out ``d`` and ``m``.
      old: of the gradients before, with an axis of the tensors first.
      grads, params: ``[n, *shape]``.
    """
    decays = adafactor.fixed_decays(grads.dtype, _SQUARE_DECAY)

    def step(layers, old, grad, param):
        grad = jnp.clip(grad, -GRADIENT_LIMIT, GRADIENT_LIMIT)
        new = adafactor.update_accumulators(old, grad, decays)
        axes = tuple(range(-grad.ndim, 0))
        param = limited(param, 2)
        scaled = partial(_scaled, exp_mult)
        direction = network_outputs(
            scaled, layers, grad, param, new, axes=axes, eps=1e-5, square_eps=1e-6
        )
        size = jnp.sqrt(jnp.mean(jnp.square(param)) + 1e-9)
        return direction * size, new

    return jax.vmap(step, (0 if own_layers else None, 0, 0, 0))(tuple(layers), old, grads, params)


def _scaled(exp_mult, direction, magnitude, _):
    return direction * jnp.exp(exp_mult * magnitude)


# Smaller squares have inverse roots whose derivative is beyond float32.
_SMALL = 1e-18


def _over_root(x, square):
    """``x * square ** -0.5``, whose derivative counts as 0 where ``square`` is below 1e-18."""
    constant = jax.lax.stop_gradient(x * jax.lax.rsqrt(square))
    return jnp.where(square < _SMALL, constant, x * jax.lax.rsqrt(jnp.maximum(square, _SMALL)))
