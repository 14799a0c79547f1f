"""A learning rate for every step and every layer, learned by exact hypergradients.

Meta-descent keeps raising the rates until it crosses into chaos, where single runs diverge
and their exact gradients are noise (see ``reversible_chaos``). So not the last schedule is
kept but the one whose worst run over some seeds is best, and it is judged on other seeds.
"""

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from launch.studies.base import Claim, Result, Study
from launch.studies.shared import classifier, plots
from launch.studies.shared.meta_descent import (
    EvaluatedTraining,
    Training,
    best_of,
    draw_meta_curve,
    evaluation,
    meta_descend,
)
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

    training = Training(setup, train, test, BATCH, NUM_STEPS, MOMENTUM)
    evaluate = evaluation(training, TEST_SEEDS)

    def flat_rates(log_rate):
        return jax.tree.map(lambda _: jnp.full(NUM_STEPS, log_rate, jnp.float32), layers)

    first = flat_rates(FIRST_LOG_RATE)
    before = evaluate(first)
    found = meta_descend(training.gradient, first, META_RATE, meta_steps)
    choice = evaluation(training, CHOICE_SEEDS, seed=98)
    worst = np.array([choice(theta).worst for theta in progress(found.thetas, desc="choice")])
    chosen = int(np.argmin(np.where(np.isfinite(worst), worst, np.inf)))
    log_rates = found.thetas[chosen]
    after = evaluate(log_rates)

    sweep = {
        float(np.exp(log_rate)): evaluate(flat_rates(log_rate))
        for log_rate in np.linspace(-2.5, 2.0, 7 if quick else 19)
    }
    best_rate, best = best_of(sweep)

    shown = {
        f"first: {np.exp(FIRST_LOG_RATE):.2f} for all": before,
        f"best fixed: {best_rate:.2f} for all": best,
        "learned": after,
    }
    table = [
        {"schedule": name, "train loss": out.train, "test loss": out.test}
        for name, out in shown.items()
    ]
    claims = [
        found.claim(NUM_STEPS),
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
    data = {
        "log_rates": log_rates,
        "meta_curve": found.losses,
        "worst": worst,
        "chosen": chosen,
        "curves": {
            name: {"train": out.curve, "test": out.test_curve}
            for name, out in (("before", before), ("best fixed", best), ("after", after))
        },
        "sweep": [[rate, out.train, out.test] for rate, out in sweep.items()],
    }
    caption = (
        f"{classifier.name(data_dir)} tanh MLP, hidden {HIDDEN}, batch {BATCH}, T = {NUM_STEPS}; "
        f"one run of {meta_steps} meta-steps; training curves: means of {TEST_SEEDS} unseen seeds"
    )
    return Result(claims, table, draw(log_rates, found.losses, chosen, shown), data, caption)


def draw(log_rates, meta_losses, chosen: int, shown: dict[str, EvaluatedTraining]) -> Figure:
    """Training and test curves, the meta-loss, and the schedules of each layer."""
    figure, ((curves, meta), tensors) = plots.panels(2, (9.4, 6.6), rows=2)
    for (label, out), colour in zip(shown.items(), (plots.GRAY, "C0", "C3"), strict=True):
        text = f"{label}\n(train {out.train:.3f}, test {out.test:.3f})"
        curves.plot(out.curve, color=colour, lw=1, label=text)
        steps = np.linspace(0, NUM_STEPS, len(out.test_curve))
        curves.plot(steps, out.test_curve, "o--", color=colour, ms=2.5, lw=1)
    curves.plot([], [], "o--", color="0.3", ms=2.5, lw=1, label="test loss (solid: batch loss)")
    curves.set(
        yscale="log", xlabel="training step", ylabel="loss (nats)", title="Training and test curves"
    )
    curves.legend(loc="upper right")
    for axes, name in zip(tensors, ("weights", "biases"), strict=True):
        for i, layer in enumerate(log_rates):
            axes.plot(np.exp(layer[name[0]]), color=plots.LAYERS[i], label=f"layer {i + 1}")
        plots.level(axes, np.exp(FIRST_LOG_RATE), "first", color="0.7")
        axes.set(
            ylim=(0, None),
            xlabel="training step",
            ylabel="learning rate",
            title=f"Learned schedules of the {name}",
        )
        axes.legend(loc="lower left", ncols=2, frameon=True, edgecolor="none")
    draw_meta_curve(meta, meta_losses, chosen + 1)
    return figure


STUDY = Study("a learning rate for every step and layer (Maclaurin 2015, Figs. 2-4)", 1.0, run)
