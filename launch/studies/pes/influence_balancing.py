"""Figure 5 of the PES paper: only estimators without truncation bias find the optimum.

python -m launch.reproduce influence_balancing --workdir=DIR
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure

from launch.studies.base import Claim, Result, Study
from launch.studies.shared import plots
from launch.studies.shared.compare import Descent, by_name, compare, descend, each
from meta_train import estimators as est
from meta_train.unroll import UnrolledSystem
from tasks.dynamics.influence_balancing import OPTIMUM, THETA_INIT, final_loss, influence_balancing

NUM_PAIRS = 500
SIGMA = 0.1
RATE, UORO_RATE = 1e-4, 1e-5
STEPS, UORO_STEPS = 3000, 30_000
RECORDS = 100  # Over STEPS.
FLOOR = 1e-18

STYLES = {
    "PES": "-",
    "NRES": "-",
    "UORO": "-",
    "truncated ES": "-",
    "TBPTT, K=1": ":",
    "RTRL": "--",
}


def methods(num_uoro: int) -> dict[str, est.GradientEstimator]:
    """The estimator of each curve; no episode ever ends.

    ``num_uoro`` is the number of particles of UORO, the slowest.
    """

    def made(make, truncation=1, end_of_window=1, **how):
        system = UnrolledSystem(*influence_balancing(end_of_window))
        horizons = est.fixed_horizon(UORO_STEPS * truncation)
        return make(system, truncation=truncation, horizons=horizons, **how)

    es = {"num_pairs": NUM_PAIRS, "sigma": SIGMA}
    tbptt = partial(made, est.tbptt, num_particles=1)
    return {
        "RTRL": made(est.rtrl, num_particles=1),
        "PES": made(est.pes, **es),
        "NRES": made(est.nres, **es),
        "UORO": made(est.uoro, num_particles=num_uoro),
        "truncated ES": made(est.truncated_es, **es),
        "TBPTT, K=1": tbptt(),
        "TBPTT, K=10, end loss": tbptt(10, end_of_window=10),
        "TBPTT, K=10, mean loss": tbptt(10),
        "TBPTT, K=100, end loss": tbptt(100, end_of_window=100),
        "TBPTT, K=100, mean loss": tbptt(100),
    }


def run(quick: bool, data_dir: str | None) -> Result:
    del data_dir

    def method(name: str, estimator: est.GradientEstimator):
        random = name in ("PES", "NRES", "UORO", "truncated ES")
        times = UORO_STEPS // STEPS if name == "UORO" and not quick else 1
        return partial(
            descend,
            name,
            estimator,
            jnp.asarray(THETA_INIT),
            optax.sgd(UORO_RATE if name == "UORO" else RATE),
            num_steps=times * STEPS,
            num_records=times * RECORDS,
            num_seeds=(2 if quick else 10) if random else 1,
            together=True,
        )

    with jax.enable_x64(True):
        estimators = methods(num_uoro=200 if quick else 2 * NUM_PAIRS)
        found = compare({name: method(name, x) for name, x in estimators.items()}, each(final_loss))
    table = [
        {
            "estimator": name,
            "seeds": len(line.loss),
            "outer steps": int(line.steps[-1]),
            "final theta": float(np.median(line.theta[:, -1])),
            "final loss": float(np.median(line.loss[:, -1])),
            "worst final loss": float(line.loss[:, -1].max()),
        }
        for name, line in found.items()
    ]
    data = {field: by_name(found, field) for field in Descent._fields}
    caption = (
        f"influence balancing, 23 states, episodes without end; {NUM_PAIRS} pairs, sigma "
        f"{SIGMA:g}, SGD {RATE:g} (UORO {UORO_RATE:g}); line: median, band: range of "
        f"{len(found['PES'].loss)} seeds (one where nothing is drawn)"
    )
    return Result(claims(found), table, draw(found), data, caption)


def claims(found: dict[str, Descent]) -> list[Claim]:
    thetas, losses = by_name(found, "theta"), by_name(found, "loss")
    start = float(losses["RTRL"][0, 0])
    last = {name: loss[:, RECORDS] for name, loss in losses.items()}
    apart = float(np.abs(thetas["PES"] - thetas["RTRL"]).max())
    apart /= THETA_INIT - OPTIMUM
    blind = [
        "truncated ES",
        "TBPTT, K=1",
        "TBPTT, K=10, end loss",
        "TBPTT, K=10, mean loss",
        "TBPTT, K=100, mean loss",
    ]
    claims = [
        Claim(
            "PES follows RTRL: its theta is never further from it than 20% of the way to go.",
            apart < 0.2,
            f"largest distance over all seeds and steps: {apart:.1%} of the way",
        ),
        Claim(
            "The estimators without truncation bias (RTRL, PES, NRES) find the optimum, loss 0.",
            bool(last["RTRL"][0] < 1e-12 and max(last["PES"].max(), last["NRES"].max()) < 1e-8),
            "worst final losses: "
            + ", ".join(f"{name} {last[name].max():.1g}" for name in ("RTRL", "PES", "NRES")),
        ),
        Claim(
            "UORO is unbiased too but noisier: at a tenth of the learning rate it is on its way.",
            bool((last["UORO"] < start).all() and (last["UORO"] > last["PES"].max()).all()),
            f"losses after {STEPS} steps {last['UORO'].min():.1g} to {last['UORO'].max():.1g}, "
            f"from {start:.1g}",
        ),
        Claim(
            "Short truncations, and 100 steps under the mean loss, move away from the optimum.",
            all(bool((last[name] > 10).all()) for name in blind)
            and all(bool((thetas[name][:, RECORDS] > THETA_INIT).all()) for name in blind),
            ", ".join(f"{name}: {last[name].min():.2g}" for name in blind) + f"; start {start:.1g}",
        ),
        Claim(
            "TBPTT over 100 steps finds the optimum under the loss at the end of its window.",
            bool(last["TBPTT, K=100, end loss"][0] < 1e-6),
            f"final loss {last['TBPTT, K=100, end loss'][0]:.1g}",
        ),
    ]
    if losses["UORO"].shape[1] > RECORDS + 1:
        final = losses["UORO"][:, -1]
        claims.append(
            Claim(
                f"With ten times the steps, {UORO_STEPS:,}, UORO finds the optimum too.",
                bool(final.max() < 1e-6),
                f"final losses {final.min():.1g} to {final.max():.1g} over {len(final)} seeds",
            )
        )
    return claims


def draw(found: dict[str, Descent]) -> Figure:
    longer = found["UORO"].steps[-1] > STEPS
    figure, axes = plots.panels(3 if longer else 2, (12 if longer else 9, 3.6), sharey=True)
    left, right, *last = axes

    def curve(axis, name, *style, **line):
        loss = np.maximum(found[name].loss, FLOOR)
        plots.band(axis, found[name].steps, loss, *style, label=name, **line)

    for name, style in STYLES.items():
        curve(left, name, style, color=plots.COLORS[name.split(",")[0]])
    for axis in (right, *last):
        curve(axis, "RTRL", "--", color=plots.BLACK)
    for truncation, color in ((10, plots.VERMILION), (100, plots.SKY)):
        curve(right, f"TBPTT, K={truncation}, end loss", color=color)
        curve(right, f"TBPTT, K={truncation}, mean loss", ":", color=color)
    left.set(title="Truncations of one step", ylabel="loss after 500 inner steps (optimum 0)")
    right.set(title="Longer truncations, end or mean loss")
    for axis in last:
        curve(axis, "UORO", color=plots.COLORS["UORO"])
        axis.set(title="UORO, a tenth of the learning rate")
        axis.set_xticks(range(0, UORO_STEPS + 1, 10_000))
    for axis in axes:
        steps = UORO_STEPS if axis in last else STEPS
        axis.set(yscale="log", ylim=(FLOOR, 1e6), xlim=(0, steps), xlabel="outer steps")
        axis.legend(loc="upper right" if axis in last else "lower left")
    return figure


STUDY = Study(
    "RTRL, PES, NRES find the optimum that short truncations flee (Vicol 2021, Fig. 5)", 5.0, run
)
