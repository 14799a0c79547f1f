"""An L2 penalty for every single weight, learned by exact hypergradients."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from launch.studies.base import Claim, Result, Study
from launch.studies.shared import classifier, plots
from launch.studies.shared.classifier import Split
from launch.studies.shared.meta_descent import meta_descend, whole_run
from meta_train import reversible

NUM_STEPS = 50
NUM_TRAIN = 150
MOMENTUM = 0.9
LEARNING_RATE = 1.0
FIRST_LOG_L2 = -5.0
LENGTH: dict[str, Any] = {"num_steps": NUM_STEPS, "momentum_floor": MOMENTUM - 1e-3}
META_RATE = 0.1


def run(quick: bool, data_dir: str | None) -> Result:
    """Logistic regression on few images; the penalties minimize the loss on the other images."""
    meta_steps = 20 if quick else 100
    everything, test, side = classifier.splits(data_dir)
    train = Split(*(x[:NUM_TRAIN] for x in everything))
    held_out = Split(*(x[NUM_TRAIN:] for x in everything))
    start = {"w": jnp.zeros((side**2, 10)), "b": jnp.zeros(10)}

    def inner_loss(params, theta, step):
        del step
        penalties = jax.tree.map(lambda p, w: jnp.sum(jnp.exp(p) * w**2) / 2, theta, params[0])
        return classifier.cross_entropy(params, train) + sum(jax.tree.leaves(penalties))

    def objective(params, theta):
        del theta
        return classifier.cross_entropy(params, held_out)

    def setup(theta):
        return reversible.setup([start], LEARNING_RATE, MOMENTUM, theta)

    @jax.jit
    def losses(theta):
        params = reversible.train(inner_loss, setup(theta), **LENGTH).params
        return [classifier.cross_entropy(params, split) for split in (train, held_out, test)]

    def equal(log_l2):
        return jax.tree.map(lambda w: jnp.full(w.shape, log_l2, jnp.float32), start)

    gradient = whole_run(inner_loss, objective, setup, **LENGTH)
    found = meta_descend(gradient, equal(FIRST_LOG_L2), META_RATE, meta_steps)
    curve = [[float(x) for x in losses(theta)] for theta in found.thetas]
    penalties = found.thetas[-1]["w"]
    sweep = {x: [float(v) for v in losses(equal(x))] for x in np.linspace(-12.0, -1.0, 23).tolist()}
    best = min(sweep, key=lambda x: sweep[x][1])
    first, last = [float(x) for x in losses(equal(FIRST_LOG_L2))], curve[-1]
    table = [
        {"penalty": name, "train loss": v[0], "held-out loss": v[1], "test loss": v[2]}
        for name, v in (
            (f"first: exp({FIRST_LOG_L2:g}) for all", first),
            (f"best common: exp({best:g}) for all", sweep[best]),
            ("one a weight, learned", last),
        )
    ]
    claims = [
        found.claim(NUM_STEPS),
        Claim(
            "A penalty for each weight generalizes better than the best common one.",
            last[2] < sweep[best][2],
            f"test loss {last[2]:.3f} against {sweep[best][2]:.3f} (both chosen on the held-out "
            "images)",
        ),
    ]
    data = {"log_l2": penalties, "curve": curve, "sweep": [[x, *v] for x, v in sweep.items()]}
    caption = (
        f"logistic regression on {NUM_TRAIN} images, {classifier.name(data_dir)}, T = "
        f"{NUM_STEPS}; one run of {meta_steps} meta-steps (nothing is drawn at random)"
    )
    return Result(claims, table, draw(penalties, side, curve, sweep[best]), data, caption)


def draw(log_l2, side, curve, best) -> Figure:
    """The penalties of each digit's weights as images, and the losses as they are learned."""
    figure = Figure(figsize=(9.5, 3.2))
    parts: Any = figure.subfigures(1, 2, width_ratios=[1.4, 1])
    cells = parts[0].subplots(2, 5)
    low, high = np.percentile(log_l2, [1, 99])
    for digit, cell in enumerate(cells.flat):
        values = np.asarray(log_l2)[:, digit].reshape(side, side)
        shown = plots.image(cell, values, str(digit), cmap="viridis", vmin=low, vmax=high)
    parts[0].colorbar(shown, ax=cells, shrink=0.8, label="log L2 penalty")
    parts[0].suptitle("The penalties of each digit's weights", fontsize=10)
    axes = parts[1].subplots()
    for column, name, color in zip(
        np.transpose(curve), ("train", "held-out", "test"), (plots.GRAY, "C0", "C3"), strict=True
    ):
        axes.plot(column, color=color, label=name)
    plots.level(axes, best[2], "test, best common penalty", color="C3")
    axes.set(xlabel="meta-step", ylabel="final loss (nats)", ylim=(0, None), title="Learning them")
    axes.legend()
    return figure


STUDY = Study(
    "an L2 penalty for every weight, drawn as an image (Maclaurin et al. 2015, figure 8)", 0.3, run
)
