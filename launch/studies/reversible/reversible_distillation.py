"""Ten training images, learned from noise so that training on them alone classifies real ones.

The L2 penalty is learned with them. Real images get the best one of a sweep, chosen by the
accuracy that is compared: more than the learned ones get.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from launch.studies.base import Claim, Result, Study
from launch.studies.shared import classifier, plots
from launch.studies.shared.classifier import Split
from launch.studies.shared.meta_descent import meta_descend, whole_run
from launch.studies.shared.sweep import sweep
from meta_train import reversible

NUM_STEPS = 20
MOMENTUM = 0.9
LEARNING_RATE = 1.0
LENGTH: dict[str, Any] = {"num_steps": NUM_STEPS, "momentum_floor": MOMENTUM - 1e-3}
META_RATE = 0.05
DRAWS = 20
LOG_PENALTIES = np.arange(-10.0, 0.5, 1.0)  # for real images


def run(quick: bool, data_dir: str | None) -> Result:
    """Logistic regression from zero weights; theta is one image a class and a log L2 penalty."""
    meta_steps = 60 if quick else 300
    train, test, side = classifier.splits(data_dir)
    labels = jnp.eye(10)

    def inner_loss(params, theta, step):
        del step
        penalty = jnp.exp(theta["log_l2"]) * jnp.sum(params[0]["w"] ** 2)
        return classifier.cross_entropy(params, Split(theta["images"], labels)) + penalty

    def objective(params, theta):
        del theta
        return classifier.cross_entropy(params, train)

    def setup(theta):
        params = [{"w": jnp.zeros((side**2, 10)), "b": jnp.zeros(10)}]
        return reversible.setup(params, LEARNING_RATE, MOMENTUM, theta)

    @jax.jit
    def test_accuracy(theta):
        trained = reversible.train(inner_loss, setup(theta), **LENGTH)
        return classifier.accuracy(trained.params, test)

    noise = 0.01 * jax.random.normal(jax.random.key(0), (10, side**2))
    start = {"images": noise, "log_l2": jnp.array(-6.0)}
    gradient = whole_run(inner_loss, objective, setup, **LENGTH)
    found = meta_descend(gradient, start, META_RATE, meta_steps)
    theta = found.thetas[-1]
    accuracies = [float(test_accuracy(theta)) for theta in (start, *found.thetas)]

    def of_real_images(log_penalty, seed):
        images = one_a_class(train, seed)
        return float(test_accuracy({"images": images, "log_l2": jnp.array(log_penalty)}))

    swept = sweep(of_real_images, LOG_PENALTIES.astype(np.float32), DRAWS)
    # The penalty that is best on average, and the best penalty of the best draw.
    chosen = int(np.argmax(swept.mean(axis=1)))
    learned, ordinary, best = accuracies[-1], float(swept[chosen].mean()), float(swept.max())
    penalty = f"L2 penalty {np.exp(LOG_PENALTIES[chosen]):.2g}"
    table = [
        {"training images": "noise", "test accuracy": accuracies[0]},
        {
            "training images": f"ten real ones, mean of {DRAWS} draws, {penalty}",
            "test accuracy": ordinary,
        },
        {"training images": f"ten real ones, best of {DRAWS} draws", "test accuracy": best},
        {"training images": "ten learned ones", "test accuracy": learned},
    ]
    claims = [
        found.claim(NUM_STEPS),
        Claim(
            "Ten learned images teach more than ten real ones, even the best draw of them with "
            "the best L2 penalty for it.",
            learned > best,
            f"test accuracy {learned:.3f} (learned penalty {np.exp(float(theta['log_l2'])):.2g}); "
            f"real images {ordinary:.3f} on average ({penalty}), {best:.3f} best",
        ),
    ]
    figure = draw(theta["images"], one_a_class(train, 0), side, accuracies, ordinary, best)
    data = {
        "images": theta["images"],
        "log_l2": float(theta["log_l2"]),
        "losses": found.losses,
        "accuracies": accuracies,
        "log_penalties": LOG_PENALTIES,
        "real": swept,
    }
    caption = (
        f"logistic regression on ten images, {classifier.name(data_dir)}, {NUM_STEPS} training "
        f"steps from zero; one run of {meta_steps} meta-steps; {DRAWS} draws of real images"
    )
    return Result(claims, table, figure, data, caption)


def one_a_class(split: Split, seed: int) -> jax.Array:
    """One random image of each class, ``[10, pixels]``."""
    rng = np.random.default_rng(seed)
    labels = np.argmax(split.targets, axis=1)
    return split.images[jnp.array([rng.choice(np.flatnonzero(labels == c)) for c in range(10)])]


def draw(images, real, side, accuracies, ordinary, best) -> Figure:
    """The learned images above real ones, and the test accuracy as they are learned."""
    figure = Figure(figsize=(9.5, 3.8))
    parts: Any = figure.subfigures(1, 2, width_ratios=[1.5, 1])
    cells = parts[0].subplots(4, 5)
    limit = float(jnp.max(jnp.abs(images)))
    for digit in range(10):
        row, column = divmod(digit, 5)
        shown = plots.image(cells[2 * row, column], images[digit].reshape(side, side), str(digit),
                            cmap="RdBu_r", vmin=-limit, vmax=limit)  # fmt: skip
        plots.image(cells[2 * row + 1, column], real[digit].reshape(side, side), "",
                    cmap="gray_r", vmin=0, vmax=1)  # fmt: skip
    for row in range(4):
        cells[row, 0].set_ylabel("real" if row % 2 else "learned", fontsize=8)
    parts[0].colorbar(shown, ax=cells, shrink=0.6, label="learned pixel (real: 0 to 1)")
    axes = parts[1].subplots()
    axes.plot(accuracies, color="C3", label="ten learned images")
    plots.level(axes, best, "ten real images, best draw")
    plots.level(axes, ordinary, "ten real images, mean", color="0.5", linestyle=":")
    axes.set(xlabel="meta-step", ylabel="test accuracy", ylim=(0, 1), title="Learning the images")
    axes.legend(loc="lower right")
    return figure


STUDY = Study("ten images learned from noise, against real ones (Maclaurin 2015, Fig. 9)", 0.3, run)
