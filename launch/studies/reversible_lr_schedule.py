"""A learning rate for every step and every layer, learned by exact hypergradients.

Meta-descent stops after 40 steps: it keeps raising the rates, and from about step 45 it
crosses into chaos, where single runs diverge and their exact gradients are noise (see
``reversible_chaos``).
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure
from tqdm import tqdm

from launch.studies import classifier
from launch.studies.base import Claim, Result, Study
from meta_train import reversible

HIDDEN = (50, 50, 50)
NUM_STEPS = 100
BATCH = 100
MOMENTUM = 0.5
FIRST_LOG_RATE = -1.0
META_RATE = 0.04
TEST_SEEDS = 8


def run(quick: bool, data_dir: str | None) -> Result:
    """Meta-descends the final training loss, a fresh initialization and batches each time."""
    meta_steps = 15 if quick else 40
    train, test, side = classifier.splits(data_dir)
    sizes = (side**2, *HIDDEN, 10)
    layers = classifier.init(jax.random.key(0), sizes)

    def inner_loss(key, params, theta, step):
        del theta
        batch = classifier.batch(train, jax.random.fold_in(key, step), BATCH)
        return classifier.cross_entropy(params, batch)

    def setup(log_rates, key):
        params = classifier.init(jax.random.fold_in(key, 0), sizes)
        return reversible.setup(params, jax.tree.map(jnp.exp, log_rates), MOMENTUM)

    def objective(params, theta):
        del theta
        return classifier.cross_entropy(params, train)

    @jax.jit
    def hypergradient(log_rates, key):
        value, grads, trained = reversible.hypergradients(
            partial(inner_loss, key),
            objective,
            setup(log_rates, key),
            num_steps=NUM_STEPS,
            momentum_floor=MOMENTUM,
        )
        grads = jax.tree.map(lambda g, r: g * jnp.exp(r), grads.learning_rates, log_rates)
        return value, grads, trained.report

    def outcome(log_rates, key):
        trained = reversible.train(
            partial(inner_loss, key),
            setup(log_rates, key),
            num_steps=NUM_STEPS,
            momentum_floor=MOMENTUM,
        )
        return (
            trained.losses,
            classifier.cross_entropy(trained.params, train),
            classifier.cross_entropy(trained.params, test),
        )

    @jax.jit
    def outcomes(log_rates):
        keys = jax.random.split(jax.random.key(99), TEST_SEEDS)
        return jax.lax.map(partial(outcome, log_rates), keys)

    def evaluate(log_rates):
        """Means over unseen seeds: training curve, final train and test loss."""
        curves, *finals = outcomes(log_rates)
        return np.mean(curves, 0), *(float(jnp.mean(x)) for x in finals)

    def flat_rates(log_rate):
        return jax.tree.map(lambda _: jnp.full(NUM_STEPS, log_rate, jnp.float32), layers)

    log_rates = flat_rates(FIRST_LOG_RATE)
    before = evaluate(log_rates)
    optimizer = optax.adam(META_RATE)
    opt_state = optimizer.init(log_rates)
    meta_curve, exact = [], True
    for i in tqdm(range(meta_steps), desc="meta-steps"):
        value, grads, report = hypergradient(log_rates, jax.random.fold_in(jax.random.key(1), i))
        exact &= bool(report.ok)
        updates, opt_state = optimizer.update(grads, opt_state)
        log_rates = optax.apply_updates(log_rates, updates)
        meta_curve.append(float(value))
    after = evaluate(log_rates)

    sweep = {}
    for log_rate in np.linspace(-2.5, 2.0, 7 if quick else 19):
        sweep[float(np.exp(log_rate))] = evaluate(flat_rates(log_rate))
    finite = {rate: out for rate, out in sweep.items() if np.isfinite(out[1])}
    best_rate = min(finite, key=lambda rate: finite[rate][1])
    best = finite[best_rate]

    table = [
        {"schedule": name, "train loss": out[1], "test loss": out[2]}
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
            after[1] < before[1],
            f"{before[1]:.4f} -> {after[1]:.4f}, mean of {TEST_SEEDS} unseen seeds",
        ),
    ]
    if not quick:
        claims.append(
            Claim(
                "and to a lower loss than the best fixed rate of a sweep.",
                after[1] < best[1],
                f"{best[1]:.4f} at {best_rate:.2f} (test {best[2]:.4f}); learned {after[1]:.4f} "
                f"(test {after[2]:.4f})",
            )
        )
    figure = draw(log_rates, meta_curve, before, best, best_rate, after)
    data = {
        "log_rates": [{k: np.asarray(v).tolist() for k, v in layer.items()} for layer in log_rates],
        "meta_curve": meta_curve,
        "curves": {
            name: np.asarray(out[0]).tolist()
            for name, out in (("before", before), ("best fixed", best), ("after", after))
        },
        "sweep": [[rate, out[1], out[2]] for rate, out in finite.items()],
    }
    return Result(claims, table, figure, data)


def draw(log_rates, meta_curve, before, best, best_rate, after) -> Figure:
    """Training curves, the schedule of each layer's weights, and the meta-loss."""
    figure = Figure(figsize=(11.5, 3.4), layout="constrained")
    curves, schedules, meta = figure.subplots(1, 3)
    for (curve, train, test), label, colour in (
        (before, f"first: {np.exp(FIRST_LOG_RATE):.2f} for all", "0.6"),
        (best, f"best fixed: {best_rate:.2f} for all", "C0"),
        (after, "learned", "C3"),
    ):
        curves.plot(curve, color=colour, label=f"{label}\n(train {train:.3f}, test {test:.3f})")
    curves.set(
        yscale="log", xlabel="training step", ylabel="batch loss (nats)", title="Training curves"
    )
    curves.legend(fontsize=7.5, frameon=False)
    colours = ["#440154", "#31688e", "#35b779", "#d8b70a"]
    for i, (layer, colour) in enumerate(zip(log_rates, colours, strict=True)):
        schedules.plot(np.exp(layer["w"]), color=colour, lw=1.3, label=f"layer {i + 1} weights")
    schedules.axhline(np.exp(FIRST_LOG_RATE), color="0.7", lw=0.8)
    schedules.set(
        ylim=(0, None),
        xlabel="training step",
        ylabel="learning rate",
        title="Learned schedules of the weights",
    )
    schedules.legend(fontsize=7.5, loc="lower left", ncols=2, framealpha=0.9, edgecolor="none")
    meta.plot(meta_curve, "o-", ms=3, color="C3")
    meta.set(
        yscale="log",
        xlabel="meta-step",
        ylabel="final training loss (nats)",
        title="Meta-descent, a new seed each step",
    )
    for axes in (curves, schedules, meta):
        axes.spines[["top", "right"]].set_visible(False)
    return figure


STUDY = Study(
    "a learning rate for every step and layer, by hypergradient (Maclaurin et al. 2015, "
    "figures 2-4)",
    1.5,
    run,
)
