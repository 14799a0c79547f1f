"""The scale of each layer's initial weights, learned by exact hypergradients."""

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from launch.studies.base import Claim, Result, Study
from launch.studies.shared import classifier
from launch.studies.shared import meta_descent as descent
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

    training = descent.Training(setup, train, test, BATCH, NUM_STEPS, MOMENTUM - 1e-3)
    evaluate = descent.evaluation(training, TEST_SEEDS)
    first = jax.tree.map(lambda _: jnp.float32(FIRST_LOG_SCALE), shapes)
    before = evaluate(first)
    thetas, values, exact = descent.meta_descend(training, first, META_RATE, meta_steps)
    log_scales = thetas[-1]
    history = [[[float(layer["w"]), float(layer["b"])] for layer in theta] for theta in thetas]
    after = evaluate(log_scales)
    common = {}
    for log_scale in np.linspace(-4.0, 0.5, 5 if quick else 13).tolist():
        out = evaluate(jax.tree.map(lambda _, s=log_scale: jnp.float32(s), shapes))
        if np.isfinite(out.train + out.test):
            common[log_scale] = out.train, out.test
    best = min(common, key=lambda s: common[s][0])
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
        Claim(
            "Every hypergradient was exact: each run was recovered to the bit.",
            exact,
            f"{meta_steps} reversals of {NUM_STEPS} steps",
        ),
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
                after.train < common[best][0],
                f"best common scale {np.exp(best):.2f}: train {common[best][0]:.4f}, test "
                f"{common[best][1]:.4f}; learned: train {after.train:.4f}, test {after.test:.4f}",
            )
        )
    data = {"history": history, "values": values, "common": [[s, *v] for s, v in common.items()]}
    return Result(claims, table, draw(history, values, sizes), data)


def draw(history, values, sizes) -> Figure:
    """Scales and meta-loss along meta-descent."""
    figure = Figure(figsize=(8.6, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    scales = np.exp(np.array(history))
    colours = ["#440154", "#31688e", "#35b779", "#d8b70a"]
    for i, colour in enumerate(colours):
        left.plot(scales[:, i, 0], color=colour, label=f"layer {i + 1} weights")
        left.plot(scales[:, i, 1], color=colour, ls=":", lw=1)
    left.plot([], [], ":", color="0.4", lw=1, label="biases")
    left.axhline(sizes[0] ** -0.5, color="#440154", lw=0.8, ls="--")
    left.annotate(
        r"$1/\sqrt{\mathrm{inputs}}$ of layer 1",
        (1.48 * len(values), sizes[0] ** -0.5),
        ha="right",
        va="bottom",
        fontsize=7,
    )
    left.set(
        yscale="log",
        xlim=(0, 1.5 * len(values)),
        xlabel="meta-step",
        ylabel="initial scale",
        title="Scale of each tensor",
    )
    descent.draw_meta_curve(right, values)
    left.legend(fontsize=7.5, loc="lower right", framealpha=0.9, edgecolor="none")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    return figure


STUDY = Study(
    "the initial scale of each layer's weights and biases, by hypergradient (Maclaurin et al. "
    "2015, figures 6-7)",
    0.5,
    run,
)
