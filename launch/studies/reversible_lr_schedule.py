"""A learning rate for every step and every layer, learned by exact hypergradients.

Meta-descent keeps raising the rates until it crosses into chaos, where single runs diverge
and their exact gradients are noise (see ``reversible_chaos``). So not the last schedule is
kept but the one whose worst run over some seeds is best, and it is judged on other seeds.
"""

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from launch.studies import classifier, descent
from launch.studies.base import Claim, Result, Study
from meta_train import reversible
from meta_train.progress import progress

HIDDEN = (50, 50, 50)
NUM_STEPS = 100
BATCH = 100
MOMENTUM = 0.5
FIRST_LOG_RATE = -1.0
META_RATE = 0.04
CHOICE_SEEDS = 16
TEST_SEEDS = 8


def run(quick: bool, data_dir: str | None) -> Result:
    """Meta-descends the final training loss, a fresh initialization and batches each time."""
    meta_steps = 15 if quick else 40
    train, test, side = classifier.splits(data_dir)
    sizes = (side**2, *HIDDEN, 10)
    layers = classifier.init(jax.random.key(0), sizes)

    def setup(log_rates, key):
        params = classifier.init(jax.random.fold_in(key, 0), sizes)
        return reversible.setup(params, jax.tree.map(jnp.exp, log_rates), MOMENTUM)

    training = descent.Training(setup, train, test, BATCH, NUM_STEPS, MOMENTUM)
    evaluate = descent.evaluation(training, TEST_SEEDS)

    def flat_rates(log_rate):
        return jax.tree.map(lambda _: jnp.full(NUM_STEPS, log_rate, jnp.float32), layers)

    first = flat_rates(FIRST_LOG_RATE)
    before = evaluate(first)
    thetas, meta_curve, exact = descent.meta_descend(training, first, META_RATE, meta_steps)
    choice = descent.evaluation(training, CHOICE_SEEDS, seed=98)
    worst = np.array([choice(theta).worst for theta in progress(thetas, desc="choice")])
    chosen = int(np.argmin(np.where(np.isfinite(worst), worst, np.inf)))
    log_rates = thetas[chosen]
    after = evaluate(log_rates)

    sweep = {}
    for log_rate in np.linspace(-2.5, 2.0, 7 if quick else 19):
        sweep[float(np.exp(log_rate))] = evaluate(flat_rates(log_rate))
    finite = {rate: out for rate, out in sweep.items() if np.isfinite(out.train)}
    best_rate = min(finite, key=lambda rate: finite[rate].train)
    best = finite[best_rate]

    table = [
        {"schedule": name, "train loss": out.train, "test loss": out.test}
        for name, out in (
            (f"first: {np.exp(FIRST_LOG_RATE):.2f} for all", before),
            (f"best fixed: {best_rate:.2f} for all", best),
            ("learned", after),
        )
    ]
    claims = [
        Claim(
            "Every hypergradient was exact: each run was recovered to the bit.",
            exact,
            f"{meta_steps} reversals of {NUM_STEPS} steps",
        ),
        Claim(
            "The learned schedule trains to a lower loss than the first one.",
            after.train < before.train,
            f"{before.train:.4f} -> {after.train:.4f}, mean of {TEST_SEEDS} unseen seeds; kept is "
            f"the schedule after {chosen + 1} of {meta_steps} meta-steps",
        ),
    ]
    if not quick:
        claims.append(
            Claim(
                "and to a lower loss than the best fixed rate of a sweep.",
                after.train < best.train,
                f"{best.train:.4f} at {best_rate:.2f} (test {best.test:.4f}); learned "
                f"{after.train:.4f} (test {after.test:.4f})",
            )
        )
    figure = draw(log_rates, meta_curve, chosen, before, best, best_rate, after)
    data = {
        "log_rates": [{k: np.asarray(v).tolist() for k, v in layer.items()} for layer in log_rates],
        "meta_curve": meta_curve,
        "worst": [float(x) if np.isfinite(x) else None for x in worst],
        "chosen": chosen,
        "curves": {
            name: {"train": out.curve.tolist(), "test": out.test_curve.tolist()}
            for name, out in (("before", before), ("best fixed", best), ("after", after))
        },
        "sweep": [[rate, out.train, out.test] for rate, out in finite.items()],
    }
    caption = (
        f"{'MNIST' if data_dir else 'digits'} tanh MLP, hidden {HIDDEN}, batch {BATCH}, T = "
        f"{NUM_STEPS}; one run of {meta_steps} meta-steps; training curves: means of {TEST_SEEDS} "
        "unseen seeds"
    )
    return Result(claims, table, figure, data, caption)


def draw(log_rates, meta_curve, chosen, before, best, best_rate, after) -> Figure:
    """Training and test curves, the meta-loss, and the schedules of each layer."""
    figure = Figure(figsize=(9.4, 6.6), layout="constrained")
    (curves, meta), (weights, biases) = figure.subplots(2, 2)
    for outcome, label, colour in (
        (before, f"first: {np.exp(FIRST_LOG_RATE):.2f} for all", "0.6"),
        (best, f"best fixed: {best_rate:.2f} for all", "C0"),
        (after, "learned", "C3"),
    ):
        losses = f"(train {outcome.train:.3f}, test {outcome.test:.3f})"
        curves.plot(outcome.curve, color=colour, lw=1, label=f"{label}\n{losses}")
        steps = np.linspace(0, NUM_STEPS, len(outcome.test_curve))
        curves.plot(steps, outcome.test_curve, "o--", color=colour, ms=2.5, lw=1)
    curves.plot([], [], "o--", color="0.3", ms=2.5, lw=1, label="test loss (solid: batch loss)")
    curves.set(
        yscale="log", xlabel="training step", ylabel="loss (nats)", title="Training and test curves"
    )
    curves.legend(fontsize=7.5, frameon=False, loc="upper right")
    colours = ["#440154", "#31688e", "#35b779", "#d8b70a"]
    for axes, name, tensor in ((weights, "weights", "w"), (biases, "biases", "b")):
        for i, (layer, colour) in enumerate(zip(log_rates, colours, strict=True)):
            axes.plot(np.exp(layer[tensor]), color=colour, lw=1.3, label=f"layer {i + 1}")
        axes.axhline(np.exp(FIRST_LOG_RATE), color="0.7", lw=0.8, label="first")
        axes.set(
            ylim=(0, None),
            xlabel="training step",
            ylabel="learning rate",
            title=f"Learned schedules of the {name}",
        )
        axes.legend(fontsize=7.5, loc="lower left", ncols=2, framealpha=0.9, edgecolor="none")
    descent.draw_meta_curve(meta, meta_curve, chosen + 1)
    for axes in (curves, weights, biases, meta):
        axes.spines[["top", "right"]].set_visible(False)
    return figure


STUDY = Study(
    "a learning rate for every step and layer, by hypergradient (Maclaurin et al. 2015, "
    "figures 2-4)",
    1.0,
    run,
)
