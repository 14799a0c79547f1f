"""An L2 penalty for every single weight, learned by exact hypergradients."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure
from tqdm import tqdm

from launch.studies.base import Claim, Result, Study
from launch.studies.shared import classifier
from launch.studies.shared.classifier import Split
from meta_train import reversible

NUM_STEPS = 50
NUM_TRAIN = 150
MOMENTUM = 0.9
LEARNING_RATE = 1.0
FIRST_LOG_L2 = -5.0
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
    def step(theta, opt_state):
        value, grads, trained = reversible.hypergradients(
            inner_loss, objective, setup(theta), num_steps=NUM_STEPS, momentum_floor=MOMENTUM - 1e-3
        )
        updates, opt_state = optimizer.update(grads.theta, opt_state)
        return optax.apply_updates(theta, updates), opt_state, value, trained.report.ok

    @jax.jit
    def losses(theta):
        params = reversible.train(
            inner_loss, setup(theta), num_steps=NUM_STEPS, momentum_floor=MOMENTUM - 1e-3
        ).params
        return [classifier.cross_entropy(params, split) for split in (train, held_out, test)]

    def equal(log_l2):
        return jax.tree.map(lambda w: jnp.full(w.shape, log_l2, jnp.float32), start)

    theta = equal(FIRST_LOG_L2)
    optimizer = optax.adam(META_RATE)
    opt_state = optimizer.init(theta)
    curve, exact = [], True
    for _ in tqdm(range(meta_steps), desc="meta-steps"):
        theta, opt_state, _, ok = step(theta, opt_state)
        exact &= bool(ok)
        curve.append([float(x) for x in losses(theta)])
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
        Claim(
            "Every hypergradient was exact: each run was recovered to the bit.",
            exact,
            f"{meta_steps} reversals of {NUM_STEPS} steps",
        ),
        Claim(
            "A penalty for each weight generalizes better than the best common one.",
            last[2] < sweep[best][2],
            f"test loss {last[2]:.3f} against {sweep[best][2]:.3f} (both chosen on the held-out "
            "images)",
        ),
    ]
    data = {
        "log_l2": np.asarray(theta["w"]).tolist(),
        "curve": curve,
        "sweep": [[x, *v] for x, v in sweep.items()],
    }
    return Result(claims, table, draw(theta["w"], side, curve, sweep[best]), data)


def draw(log_l2, side, curve, best) -> Figure:
    """The penalties of each digit's weights as images, and the losses as they are learned."""
    figure = Figure(figsize=(9.5, 3.0), layout="constrained")
    parts: Any = figure.subfigures(1, 2, width_ratios=[1.4, 1])
    left, right = parts
    cells = left.subplots(2, 5)
    low, high = np.percentile(log_l2, [1, 99])
    for digit, cell in enumerate(cells.flat):
        image = np.asarray(log_l2)[:, digit].reshape(side, side)
        shown = cell.imshow(image, cmap="viridis", vmin=low, vmax=high)
        cell.set_title(str(digit), fontsize=9, pad=2)
        cell.set(xticks=[], yticks=[])
    bar = left.colorbar(shown, ax=cells, shrink=0.8, pad=0.02)
    bar.set_label("log L2 penalty", fontsize=8)
    axes = right.subplots()
    for i, (name, colour) in enumerate((("train", "0.6"), ("held-out", "C0"), ("test", "C3"))):
        axes.plot([row[i] for row in curve], color=colour, label=name)
    axes.axhline(best[2], color="C3", lw=1, ls="--", label="test, best common penalty")
    axes.set(xlabel="meta-step", ylabel="final loss (nats)", ylim=(0, None))
    axes.legend(fontsize=8, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


STUDY = Study(
    "an L2 penalty for every weight, drawn as an image (Maclaurin et al. 2015, figure 8)",
    0.3,
    run,
)
