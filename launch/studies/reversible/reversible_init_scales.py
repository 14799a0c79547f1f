"""The scale of each layer's initial weights, learned by exact hypergradients."""

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from launch.studies.base import Claim, Result, Study
from launch.studies.shared import classifier, plots
from launch.studies.shared.meta_descent import (
    Training,
    best_of,
    draw_meta_curve,
    evaluation,
    meta_descend,
)
from meta_train import reversible

HIDDEN = (50, 50, 50)
NUM_STEPS = 100
BATCH = 100
MOMENTUM = 0.9
LEARNING_RATE = 0.3
FIRST_LOG_SCALE = -3.0
META_RATE = 0.1
TEST_SEEDS = 8


def run(quick: bool, data_dir: str | None) -> Result:
    """Meta-descends the final training loss, a fresh initialization and batches each time."""
    meta_steps = 20 if quick else 80
    train, test, side = classifier.splits(data_dir)
    sizes = (side**2, *HIDDEN, 10)
    shapes = classifier.init(jax.random.key(0), sizes)
    num_layers = len(shapes)

    def setup(log_scales, key):
        """``N(0, scale^2)`` weights and biases, one scale for each tensor."""
        flat, treedef = jax.tree.flatten(shapes)
        keys = jax.random.split(jax.random.fold_in(key, 0), len(flat))
        noise = [jax.random.normal(k, x.shape) for k, x in zip(keys, flat, strict=True)]
        noise = jax.tree.unflatten(treedef, noise)
        params = jax.tree.map(lambda n, s: jnp.exp(s) * n, noise, log_scales)
        return reversible.setup(params, LEARNING_RATE, MOMENTUM)

    training = Training(setup, train, test, BATCH, NUM_STEPS, MOMENTUM - 1e-3)
    evaluate = evaluation(training, TEST_SEEDS)

    def alike(log_scale):
        return jax.tree.map(lambda _: jnp.float32(log_scale), shapes)

    first = alike(FIRST_LOG_SCALE)
    before = evaluate(first)
    found = meta_descend(training.gradient, first, META_RATE, meta_steps)
    log_scales = found.thetas[-1]
    history = np.array([[[layer["w"], layer["b"]] for layer in theta] for theta in found.thetas])
    after = evaluate(log_scales)
    common = {x: evaluate(alike(x)) for x in np.linspace(-4.0, 0.5, 5 if quick else 13).tolist()}
    best_scale, best = best_of(common)
    table = [
        {
            "tensor": f"layer {i + 1} {name}",
            "learned scale": float(np.exp(log_scales[i][short])),
            "1/sqrt(inputs)": sizes[i] ** -0.5,
        }
        for i in range(num_layers)
        for name, short in (("weights", "w"), ("biases", "b"))
    ]
    claims = [
        found.claim(NUM_STEPS),
        Claim(
            "Learned scales train to a lower loss than the first ones.",
            after.train < before.train,
            f"train {before.train:.4f} -> {after.train:.4f}, test {before.test:.4f} -> "
            f"{after.test:.4f}",
        ),
    ]
    if not quick:
        claims.append(
            Claim(
                "and to a lower one than the best common scale.",
                after.train < best.train,
                f"best common scale {np.exp(best_scale):.2f}: train {best.train:.4f}, test "
                f"{best.test:.4f}; learned: train {after.train:.4f}, test {after.test:.4f}",
            )
        )
    data = {
        "history": history,
        "values": found.losses,
        "common": [[scale, out.train, out.test] for scale, out in common.items()],
    }
    caption = (
        f"{classifier.name(data_dir)} tanh MLP, hidden {HIDDEN}, batch {BATCH}, T = {NUM_STEPS}; "
        f"one run of {meta_steps} meta-steps, a new seed each; no band"
    )
    return Result(claims, table, draw(history, found.losses, sizes), data, caption)


def draw(history: np.ndarray, losses: list[float], sizes: tuple[int, ...]) -> Figure:
    """Scales and meta-loss along meta-descent."""
    figure, (left, right) = plots.panels(2, (8.6, 3.4))
    for i, color in enumerate(plots.LAYERS):
        weights, biases = np.exp(history[:, i]).T
        left.plot(weights, color=color, label=f"layer {i + 1} weights")
        left.plot(biases, color=color, ls=":", lw=1)
    left.plot([], [], ":", color="0.4", lw=1, label="biases")
    label = r"$1/\sqrt{\mathrm{inputs}}$, layer 1"
    plots.level(left, sizes[0] ** -0.5, label, color=plots.LAYERS[0])
    left.set(
        yscale="log",
        xlim=(0, 1.7 * len(losses)),
        xlabel="meta-step",
        ylabel="initial scale",
        title="Scale of each tensor",
    )
    left.legend(loc="lower right", frameon=True, edgecolor="none")
    draw_meta_curve(right, losses)
    return figure


STUDY = Study(
    "initial scales of each layer, by hypergradient (Maclaurin 2015, Figs. 6-7)", 0.5, run
)
