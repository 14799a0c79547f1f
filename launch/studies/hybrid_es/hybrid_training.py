"""The classifier that the Hybrid-ES studies train, and one step of its training."""

from collections.abc import Callable, Mapping
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from launch.studies.shared import classifier, plots
from launch.studies.shared.classifier import Split
from launch.studies.shared.compare import in_parallel
from launch.studies.shared.sweep import sweep
from meta_train import estimators as est
from meta_train.estimators.base import GradientEstimator
from meta_train.estimators.hybrid import Noise, hybrid_es, select, skip, stale
from meta_train.estimators.hybrid.compression import Compressor
from meta_train.estimators.hybrid.prediction import Predictor
from meta_train.supervised import supervised_training
from tasks.data.images import load_images

HIDDEN = 32
BATCH = 144
MEASURED = 10_000
HORIZON = est.fixed_horizon(1)
RELATIVE = Noise(1.0, relative=True)
CONTROLS = {"stale": stale, "skip": skip}


class Problem(NamedTuple):
    """A sigmoid classifier with layers of ``sizes`` units, and its data."""

    train: Split
    dev: Split
    sizes: tuple[int, int, int]

    @property
    def tensor_sizes(self) -> tuple[int, ...]:
        """Of its weights and biases, in the order of its leaves."""
        theta = jax.eval_shape(lambda: classifier.init(jax.random.key(0), self.sizes))
        return tuple(leaf.size for leaf in jax.tree.leaves(theta))

    @property
    def num_weights(self) -> int:
        return sum(self.tensor_sizes)


class Curve(NamedTuple):
    """At each measurement: accuracies, and the mean training loss in nats; ``[..., T]``."""

    train: jax.Array | np.ndarray
    dev: jax.Array | np.ndarray
    loss: jax.Array | np.ndarray


@cache
def problem(data_dir: str | None) -> Problem:
    """Digits, or MNIST with a data folder; pixels centred and scaled to unit variance.

    (A pixel that hardly varies is scaled as if it had a tenth of the mean pixel's deviation.)
    """
    data = load_images("mnist" if data_dir else "digits", data_dir)
    flat = {
        name: np.asarray(data.images[name]).reshape(len(data.images[name]), -1) / np.float32(255)
        for name in ("train", "validation")
    }
    mean, deviation = flat["train"].mean(axis=0), flat["train"].std(axis=0)
    scale = np.maximum(deviation, 0.1 * deviation.mean())

    def split(name):
        targets = jax.nn.one_hot(np.asarray(data.labels[name]), data.num_classes)
        return Split(jnp.asarray((flat[name] - mean) / scale), targets)

    return Problem(split("train"), split("validation"), (mean.size, HIDDEN, data.num_classes))


# Of a sigmoid network: mean cross entropy in nats, and share of examples.
loss = partial(classifier.cross_entropy, activation=jax.nn.sigmoid)
accuracy = partial(classifier.accuracy, activation=jax.nn.sigmoid)


class Recipe(NamedTuple):
    """One way to train.

    Attributes:
      mode: ``select``, or one of ``CONTROLS``.
      refresh_every: steps per gradient.
      sigma: in units of the deviation of the gradient's components; stands in for ``noise``'s.
      num_candidates: all of one worker; a run is the same however they are split.
      combine, top, antithetic: of ``select``.
      assist: whether a step with a gradient searches too.
    """

    mode: str
    refresh_every: int
    rate: float
    sigma: Any = 1.0
    num_candidates: int = 32
    combine: str = "rank"
    top: int = 1
    antithetic: bool = True
    assist: bool = False
    noise: Noise = RELATIVE
    predictor: Predictor | None = None
    compressor: Compressor | None = None


def estimator(problem: Problem, recipe: Recipe) -> GradientEstimator:
    """Hybrid-ES on minibatches."""
    search = (
        select(
            step_size=recipe.rate,
            combine=recipe.combine,
            top=recipe.top,
            antithetic=recipe.antithetic,
        )
        if recipe.mode == "select"
        else CONTROLS[recipe.mode]()
    )
    system = supervised_training(
        lambda params, key: loss(params, classifier.batch(problem.train, key, BATCH))
    )
    return hybrid_es(
        system,
        est.bptt(system, num_particles=1, horizons=HORIZON),
        horizons=HORIZON,
        refresh_every=recipe.refresh_every,
        num_workers=1,
        candidates_per_worker=recipe.num_candidates,
        noise=recipe.noise._replace(sigma=recipe.sigma),
        search=search,
        assist=recipe.assist,
        predictor=recipe.predictor,
        compressor=recipe.compressor,
    )


def init(problem: Problem, estimator: GradientEstimator, seed: Any) -> tuple[Any, Any]:
    """Theta and the estimator's state."""
    key = jax.random.key(seed)
    theta = classifier.init(jax.random.fold_in(key, 0), problem.sizes)
    return theta, estimator.init(theta, jax.random.fold_in(key, 1))


def descend(theta, grad, rate: float):
    """One step of gradient descent."""
    return jax.tree.map(lambda t, g: t - rate * g, theta, grad)


def key_of(seed: Any, step: Any) -> jax.Array:
    """The key of a step."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), 2), step)


def trainer(
    problem: Problem, recipe: Recipe, num_steps: int, every: int = 1
) -> Callable[[Any, Any], Curve]:
    """``(sigma, seed) -> Curve``, compiled once for all sigmas and seeds.

    Args:
      num_steps: a multiple of ``every``.
      every: steps between measurements.
    """

    def run(train, dev, sigma, seed):
        data = problem._replace(train=train, dev=dev)
        built = estimator(data, recipe._replace(sigma=sigma))

        def body(carry, step):
            theta, state = carry
            grad, state, _ = built.estimate(theta, state, key_of(seed, step))
            return (descend(theta, grad, recipe.rate), state), None

        def stretch(carry, steps):
            carry = jax.lax.scan(body, carry, steps)[0]
            return carry, measure(data, carry[0])

        steps = jnp.arange(num_steps).reshape(-1, every)
        return jax.lax.scan(stretch, init(data, built, seed), steps)[1]

    # The data are arguments: the compiler would spend seconds on folding constants.
    return partial(jax.jit(run), problem.train, problem.dev)


def measure(problem: Problem, theta) -> Curve:
    """Of one theta, on at most 10,000 examples of each split."""
    train, dev = (Split(*(x[:MEASURED] for x in part)) for part in (problem.train, problem.dev))
    return Curve(accuracy(theta, train), accuracy(theta, dev), loss(theta, train))


def train_all(
    problem: Problem, num_steps: int, recipes: Mapping[Any, Recipe], seeds: int
) -> dict[Any, Curve]:
    """At the end of runs of each recipe, ``[seeds]``; accuracies in percent."""
    programs: dict[Recipe, list[float]] = {}  # One for all sigmas.
    for recipe in dict.fromkeys(recipes.values()):
        programs.setdefault(recipe._replace(sigma=1.0), []).append(recipe.sigma)

    def trained(program: Recipe, sigmas: list[float]) -> dict[Recipe, Curve]:
        train = trainer(problem, program, num_steps, every=num_steps)

        def end(sigma, seed):
            curve = train(sigma, seed)
            return Curve(100 * curve.train[-1], 100 * curve.dev[-1], curve.loss[-1])

        curves = sweep(end, sigmas, seeds)
        return {
            program._replace(sigma=sigma): Curve(*(x[i] for x in curves))
            for i, sigma in enumerate(sigmas)
        }

    parts = in_parallel({each: partial(trained, each, at) for each, at in programs.items()})
    found = {recipe: curve for part in parts.values() for recipe, curve in part.items()}
    return {name: found[recipe] for name, recipe in recipes.items()}


def columns(curve: Curve, dev: str = "validation %") -> dict[str, float]:
    """Of a table: means and deviations over seeds."""
    return {
        "train %": float(curve.train.mean()),
        "+-": float(curve.train.std(ddof=1)),
        dev: float(curve.dev.mean()),
        "+- ": float(curve.dev.std(ddof=1)),
    }


def caption(data_dir: str | None, num_steps: int, shown: str) -> str:
    """Of a figure; ``shown`` says what its marks are."""
    data = classifier.name(data_dir)
    return f"{data} sigmoid classifier, batch {BATCH}, {num_steps} steps; {shown}"


def accuracy_panels(lowest: float, xlabel: str) -> tuple[Figure, Any]:
    """A figure and its two axes, for training and validation accuracy from ``lowest``."""
    figure, panels = plots.panels(2, (9.5, 3.7), sharey=True)
    for axes, split in zip(panels, ("training", "validation"), strict=True):
        axes.set(xscale="log", ylim=(lowest, 100.4), xlabel=xlabel, ylabel=f"{split} accuracy (%)")
        axes.set_title(split.capitalize())
        axes.yaxis.set_tick_params(labelleft=True)
    return figure, panels
