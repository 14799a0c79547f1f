"""How candidates are drawn: adaptive sigma, masks, other distributions."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from launch.studies.base import Claim
from launch.studies.hybrid_es import hybrid_training as training
from launch.studies.hybrid_es.future_work import NUM_STEPS, OTHER, OURS, TUNED, Item
from launch.studies.hybrid_es.hybrid_training import RELATIVE, Problem, Recipe
from launch.studies.shared import plots
from meta_train import samplers
from meta_train.estimators.hybrid import Noise

ADAPTIVE = Noise(1.0, relative=True, success_rate=0.5)
FACTORS = (0.1, 1.0, 10.0)  # of the tuned sigma
FRACTIONS = (0.1, 0.3, 1.0)
DIM, NUM_PAIRS = 16, 64


def adaptive_sigma(problem: Problem, seeds: int, quick: bool) -> Item:
    """1: the success rule, started at a tenth and at ten times the tuned sigma."""
    recipes: dict[Any, Recipe] = {}
    for kind, noise in (("fixed", RELATIVE), ("adapted", ADAPTIVE)):
        for factor in FACTORS:
            recipes[kind, factor] = TUNED._replace(sigma=3.0 * factor, noise=noise)
    layers = {} if quick else {"one sigma": (), "a sigma per layer": problem.tensor_sizes}
    for kind, sizes in layers.items():
        recipes[kind] = TUNED._replace(refresh_every=3, noise=RELATIVE._replace(layers=sizes))
    loss = {
        name: float(x.loss.mean())
        for name, x in training.train_all(problem, NUM_STEPS, recipes, seeds).items()
    }
    tuned = loss["fixed", 1.0]
    worst = {
        kind: max(loss[kind, factor] for factor in (0.1, 10.0)) / tuned
        for kind in ("fixed", "adapted")
    }
    limits = {"fixed": "-", "adapted": "<= 1.1"}
    rows = [
        (f"loss over tuned, sigma x {factor:g}, {kind}", loss[kind, factor] / tuned, limit)
        for kind, limit in limits.items()
        for factor in (0.1, 10.0)
    ] + [(f"loss, r = 3, {kind}", loss[kind], "-") for kind in layers]

    def draw(axes):
        sigmas = [3.0 * factor for factor in FACTORS]
        for kind, style, color, label in (
            ("fixed", "o--", OTHER, "fixed"),
            ("adapted", "o-", OURS, "1/5th success rule"),
        ):
            losses = [loss[kind, factor] for factor in FACTORS]
            axes.plot(sigmas, losses, style, color=color, label=label)
        axes.set(xscale="log", ylim=(0, None))
        axes.set(xlabel="sigma at the start (deviations)", ylabel="training loss (nats)")
        axes.legend()

    claim = Claim(
        "Started at a tenth or ten times the tuned sigma, the adaptive sigma ends within 10% of "
        "the tuned loss (or below).",
        worst["adapted"] <= 1.1,
        f"at worst {worst['adapted']:.2f} times the tuned loss of {tuned:.4f} nats; without "
        f"adapting {worst['fixed']:.1f} times"
        + "".join(f"; r = 3, {kind}: {loss[kind]:.4f}" for kind in layers),
    )
    return Item(claim, rows, {str(name): value for name, value in loss.items()}, draw)


def masks(problem: Problem, seeds: int, quick: bool) -> Item:
    """2: only a drawn part of the weights is perturbed."""
    least = FRACTIONS[0]
    fractions = FRACTIONS[:1] if quick else FRACTIONS
    noises = {f"random {f:g}": RELATIVE._replace(mask="random", fraction=f) for f in fractions}
    if not quick:
        noises |= {
            f"largest {least:g}": RELATIVE._replace(mask="largest", fraction=least),
            "layers 0.5": RELATIVE._replace(
                mask="layers", fraction=0.5, layers=problem.tensor_sizes
            ),
        }
    recipes = {name: TUNED._replace(noise=noise) for name, noise in noises.items()}
    curves = training.train_all(problem, NUM_STEPS, recipes, seeds)
    accuracy = {name: float(curve.train.mean()) for name, curve in curves.items()}
    dense, stale = in_between(problem, RELATIVE)
    whole, _ = in_between(problem, RELATIVE._replace(mask="random", fraction=1.0))
    part, _ = in_between(problem, RELATIVE._replace(mask="random", fraction=least))
    same, kept = bool(np.array_equal(dense, whole)), float(np.mean(part == stale))
    spread = np.sqrt(least * (1 - least) / part.size)
    rows = [
        ("share of entries equal to the stale step, bitwise", kept, f"{1 - least:.2f}"),
        ("fraction 1 is dense, bitwise", same, "True"),
        *((f"train %, {name}", value, "-") for name, value in accuracy.items()),
    ]

    def draw(axes):
        values = [accuracy[f"random {f:g}"] for f in fractions]
        axes.plot(fractions, values, "o-", color=OURS)
        plots.steps_axis(axes, fractions)
        axes.set(xlabel="share of the weights perturbed", ylabel="training accuracy (%)")

    claim = Claim(
        "Masked entries are the stale step's to the bit, and a mask of everything changes nothing.",
        same and bool(abs(kept - (1 - least)) < 5 * spread),
        f"{100 * kept:.1f}% of the entries are unperturbed at fraction {least:g}; training "
        + ", ".join(f"{accuracy[f'random {f:g}']:.2f}% at {f:g}" for f in fractions),
    )
    return Item(claim, rows, {"accuracy": accuracy}, draw)


def in_between(problem: Problem, noise: Noise) -> tuple[np.ndarray, np.ndarray]:
    """The step after a gradient, and the stale gradient it started from, ``[P]``."""
    built = training.estimator(problem, TUNED._replace(refresh_every=2, noise=noise))
    theta, state = training.init(problem, built, 0)
    quickly_compiled = {"xla_backend_optimization_level": 0}  # Each runs once.
    estimate = jax.jit(built.estimate, compiler_options=quickly_compiled)
    first, state, _ = estimate(theta, state, training.key_of(0, 0))
    second, _, _ = estimate(theta, state, training.key_of(0, 1))
    return np.asarray(ravel_pytree(second)[0]), np.asarray(ravel_pytree(first)[0])


def distributions(problem: Problem, seeds: int, quick: bool) -> Item:
    """4: the error of the ES gradient of a quadratic in 16 dimensions, 64 mirrored pairs."""
    del problem, quick
    gradient = jax.random.normal(jax.random.key(0), (DIM,))

    def error(name):
        @jax.jit
        def one(key):
            eps = samplers.draw(name, key, NUM_PAIRS, DIM)
            # A mirrored pair's slope on a quadratic is exactly the directional derivative.
            estimate = (eps @ gradient) @ eps / NUM_PAIRS
            return jnp.sum((estimate - gradient) ** 2) / jnp.sum(gradient**2)

        keys = jax.random.split(jax.random.key(1), 200 * seeds)
        return float(jnp.mean(jax.vmap(one)(keys)))

    found = {name: error(name) for name in samplers.SAMPLERS}
    expected = (DIM + 1) / NUM_PAIRS
    limits = {"normal": f"{expected:.2f}", "orthogonal": "< half", "sobol": "< half"}
    rows = [
        (f"squared error over |g|^2: {name}", value, limits.get(name, "-"))
        for name, value in found.items()
    ]

    def draw(axes):
        axes.barh(list(found), list(found.values()), color=OURS)
        axes.axvline(expected, color="black", linestyle="--", linewidth=1, label="closed form")
        axes.invert_yaxis()
        axes.set_xlabel("squared error of the gradient / |g|²")
        axes.legend(loc="lower center")

    claim = Claim(
        "Orthogonal and Sobol directions at least halve the error of the ES gradient of a "
        "quadratic.",
        max(found["orthogonal"], found["sobol"]) < 0.5 * found["normal"],
        f"normal {found['normal']:.2f} (closed form {expected:.2f}), orthogonal "
        f"{found['orthogonal']:.2g}, Sobol {found['sobol']:.2f}",
    )
    return Item(claim, rows, found, draw)
