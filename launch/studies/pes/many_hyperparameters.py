"""Twenty-nine hyperparameters of a deep MLP, tuned by PES and its rivals, and by random search.

python -m launch.reproduce many_hyperparameters --workdir=DIR

The network has 5 hidden layers, so 6 linear layers with weights and biases: 12 tensors, each
with its own learning rate and momentum (SGD), and for each hidden layer the share of its units
that are switched on (``floor(share * width)``, a step function no derivative sees):
12 + 12 + 5 = 29. Rates are tuned as logs, momenta and shares as logits. The meta-loss is the
mean validation loss on a fresh batch after each of T = 1,000 steps; K = 10, sigma = 0.3, 5
pairs, each seed from another random start (rates 1e-4..1e-2, momenta 0.01..0.9, shares 0.2..0.8).
Random search draws from the paper's wider ranges (1e-8..10, 0.01..0.999, 0.01..0.999), uniformly
in logs and logits; a draw costs one run of T steps (paper: ten), and the best so far by that
run counts.

Smaller than the paper: bundled digits (``--data_dir``: Fashion-MNIST), 32 units a layer on
batches of 16 instead of 100 on 100; 400,000 inner steps a run instead of 5 million and
more, and so Adam at 0.03 instead of 0.01; full ES runs one pair an outer step, at Adam 0.1.
Losses above 1.5 ln 10 nats, and diverged runs, count as that.

Quick: T = 200 and 100,000 inner steps, too few for PES, which needs some 50,000 to leave the
plateau at chance (one of two seeds does), to overtake random search: that comparison is in the
table, and a claim of the full run alone.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.scipy.special import logit
from matplotlib.figure import Figure

from launch.studies.base import Claim, Result, Study
from launch.studies.shared.compare import descend, held_out_losses, in_parallel
from launch.studies.shared.plots import band, log_ticks
from learned_opt import per_tensor_sgdm
from meta_train import estimators as est
from meta_train.inner import inner_training
from meta_train.unroll import UnrolledSystem
from tasks import Task, mlp_classifier
from tasks.data import load_images

LAYERS, WIDTH, BATCH = 5, 32, 16
TENSORS = 2 * (LAYERS + 1)
NUM_HYPERPARAMETERS = 2 * TENSORS + LAYERS
TRUNCATION, PAIRS, SIGMA = 10, 5, 0.3
CEILING = 1.5 * float(np.log(10))


class Ranges(NamedTuple):
    rate: tuple[float, float]
    momentum: tuple[float, float]
    share: tuple[float, float]


START = Ranges((1e-4, 1e-2), (0.01, 0.9), (0.2, 0.8))
SEARCH = Ranges((1e-8, 10.0), (0.01, 0.999), (0.01, 0.999))

COLORS = {
    "PES": "#0072B2",
    "truncated ES": "#E69F00",
    "full ES": "#CC79A7",
    "random search": "dimgray",
}


class Sizes(NamedTuple):
    horizon: int
    inner_steps: int  # of one run
    seeds: int
    records: int
    rate: float  # of Adam, for the truncated estimators


FULL = Sizes(1000, 400_000, 3, 10, 0.03)
QUICK = Sizes(200, 100_000, 2, 4, 0.03)
HELD_OUT = 4  # inner runs of an evaluation


def draw_theta(ranges: Ranges, key: jax.Array) -> jax.Array:
    """Theta ``[29]``: logs of the rates, logits of the momenta, logits of the shares."""
    keys = jax.random.split(key, 3)

    def piece(key, size, transform, ends):
        low, high = transform(np.float32(ends[0])), transform(np.float32(ends[1]))
        return jax.random.uniform(key, (size,), minval=low, maxval=high)

    pieces = [
        piece(keys[0], TENSORS, jnp.log, ranges.rate),
        piece(keys[1], TENSORS, logit, ranges.momentum),
        piece(keys[2], LAYERS, logit, ranges.share),
    ]
    return jnp.concatenate(pieces)


def masked(task: Task, shares: jax.Array) -> Task:
    """The MLP task with the last units of each hidden layer off: their inputs count as 0.

    Args:
      shares: float ``[LAYERS]`` in 0..1; ``floor(share * width)`` units stay on.
    """

    def loss(params, instance, batch, key):
        kept = tuple(
            jax.tree.map(lambda x, share=share: jnp.where(units_on(x, share), x, 0.0), layer)
            for layer, share in zip(params[:-1], shares, strict=True)
        )
        return task.loss((*kept, params[-1]), instance, batch, key)

    return task._replace(loss=loss)


def units_on(tensor: jax.Array, share: jax.Array) -> jax.Array:
    """Bool ``[width]``, the last axis of a layer's weights or biases."""
    width = tensor.shape[-1]
    return jnp.arange(width) < jnp.floor(share * width)


def inner_system(data_dir: str | None, horizon: int) -> UnrolledSystem:
    """Inner training as a function of the 29 numbers."""
    data = load_images("fashion_mnist" if data_dir else "digits", data_dir)
    task = mlp_classifier(data, hidden_sizes=(WIDTH,) * LAYERS, batch_size=BATCH)
    optimizer = per_tensor_sgdm(TENSORS)

    def of(theta):
        rates, momenta, shares = jnp.split(theta, [TENSORS, 2 * TENSORS])
        system = inner_training(
            masked(task, jax.nn.sigmoid(shares)),
            optimizer,
            num_steps=horizon,
            meta_loss="validation",
            loss_ceiling=CEILING,
        )
        return system, {"params": {"log_learning_rate": rates, "logit_momentum": momenta}}

    def init(theta, key):
        system, variables = of(theta)
        return system.init(variables, key)

    def step(theta, state, key):
        system, variables = of(theta)
        return system.step(variables, state, key)

    return UnrolledSystem(init, step)


class Method(NamedTuple):
    estimator: est.GradientEstimator
    cost: int  # inner steps of one outer step
    rate: float  # of Adam


def methods(system: UnrolledSystem, horizon: int, rate: float) -> dict[str, Method]:
    shared: dict[str, Any] = {"sigma": SIGMA, "horizons": est.fixed_horizon(horizon)}
    truncated: dict[str, Any] = {"num_pairs": PAIRS, "truncation": TRUNCATION, **shared}
    window = PAIRS * TRUNCATION
    return {
        "PES": Method(est.pes(system, **truncated), 2 * window, rate),
        "truncated ES": Method(est.truncated_es(system, **truncated), 3 * window, rate),
        "full ES": Method(est.full_es(system, num_pairs=1, **shared), 2 * horizon, 0.1),
    }


def tune(name: str, method: Method, sizes: Sizes) -> tuple[np.ndarray, np.ndarray]:
    """Total inner steps ``[R]`` and theta ``[seeds, R, 29]``."""
    outer = sizes.inner_steps // method.cost // sizes.records * sizes.records
    steps, thetas = descend(
        name,
        method.estimator,
        partial(draw_theta, START),
        optax.adam(method.rate),
        num_steps=outer,
        num_records=sizes.records,
        num_seeds=sizes.seeds,
    )
    return steps * method.cost, thetas


def search(system: UnrolledSystem, sizes: Sizes) -> tuple[np.ndarray, np.ndarray]:
    """What ``tune`` returns, of the best draw so far."""
    draws = sizes.inner_steps // sizes.horizon // sizes.records * sizes.records
    steps = sizes.horizon * draws // sizes.records * np.arange(1, sizes.records + 1)

    def one(seed):
        keys = jax.random.split(jax.random.key(seed), draws)
        return jax.vmap(partial(draw_theta, SEARCH))(keys)

    thetas = np.asarray(jax.vmap(one)(jnp.arange(sizes.seeds)))
    seen = held_out_losses(system, {"draws": thetas}, sizes.horizon, 1, seed=1)["draws"]
    best = np.array([[np.argmin(row[: step // sizes.horizon]) for step in steps] for row in seen])
    return steps, np.take_along_axis(thetas, best[..., None], axis=1)


def run(quick: bool, data_dir: str | None) -> Result:
    sizes = QUICK if quick else FULL
    system = inner_system(data_dir, sizes.horizon)
    jobs: dict[str, Callable[[], Any]] = {"random search": partial(search, system, sizes)}
    for name, method in methods(system, sizes.horizon, sizes.rate).items():
        jobs[name] = partial(tune, name, method, sizes)
    tuned = in_parallel(jobs)
    losses = held_out_losses(
        system, {name: theta for name, (_, theta) in tuned.items()}, sizes.horizon, HELD_OUT
    )
    found = {name: (steps, theta, losses[name]) for name, (steps, theta) in tuned.items()}
    best = {name: np.minimum.accumulate(found[name][2], axis=1) for name in COLORS}
    table = [
        {
            "method": name,
            "inner steps": int(found[name][0][-1]),
            "best loss": float(np.median(losses[:, -1])),
            "best seed": float(losses[:, -1].min()),
            "worst seed": float(losses[:, -1].max()),
            "final loss": float(np.median(found[name][2][:, -1])),
        }
        for name, losses in best.items()
    ]
    return Result(
        claims=claims(quick, sizes, found, best),
        table=table,
        figure=draw(sizes, found, best),
        data={
            name: {"inner steps": steps, "theta": thetas, "loss": losses}
            for name, (steps, thetas, losses) in found.items()
        },
    )


def claims(quick: bool, sizes: Sizes, found: dict, best: dict) -> list[Claim]:
    last = {name: losses[:, -1] for name, losses in best.items()}
    start = float(np.median(found["PES"][2][:, 0]))

    def of(*names) -> str:
        spread = (f"{n} {np.median(last[n]):.3f} ({last[n].max():.3f})" for n in names)
        return f"median best (worst seed): {', '.join(spread)}"

    moved = {name: bool(np.median(losses) < 0.9 * start) for name, losses in last.items()}
    found_claims = [
        Claim(
            "From slow starts the median seed of PES and full ES improves; truncated ES is behind.",
            moved["PES"]
            and moved["full ES"]
            and bool(
                np.median(last["truncated ES"])
                > max(np.median(last["PES"]), np.median(last["full ES"]))
            ),
            f"{of('PES', 'full ES', 'truncated ES')}; start {start:.2f}",
        )
    ]
    if not quick:
        ours, random = (
            np.median(best[name], axis=0)[-sizes.records :] for name in ("PES", "random search")
        )
        half = sizes.records // 2
        found_claims.append(
            Claim(
                "PES is ahead of random search in the first half of the inner steps, and level "
                "with it (to 10%) at the end; the paper, with ten times the steps, finds it ahead.",
                bool(np.all(ours[:half] < random[:half]) and ours[-1] < 1.1 * random[-1]),
                of("PES", "random search"),
            )
        )
    return found_claims


def draw(sizes: Sizes, found: dict, best: dict) -> Figure:
    figure = Figure(figsize=(9.5, 3.7), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.1))
    for name, color in COLORS.items():
        style = "--" if name == "random search" else "-"
        band(
            left,
            found[name][0],
            best[name],
            color=color,
            label=name,
            linewidth=1.8,
            linestyle=style,
        )
    left.set_yscale("log")
    log_ticks(left)
    left.set_xlim(0, sizes.inner_steps)
    left.set_xlabel("inner steps in total")
    left.set_ylabel("best validation loss so far (nats)")
    left.ticklabel_format(axis="x", style="sci", scilimits=(0, 0))
    left.grid(alpha=0.25, linewidth=0.5, which="both")
    left.legend(fontsize=8, frameon=False)
    tensors = [f"{kind}{layer}" for layer in range(1, LAYERS + 2) for kind in ("b", "W")]
    for name, shift in (("PES", -0.12), ("random search", 0.12)):
        losses = found[name][2]
        thetas = np.stack(
            [t[i] for t, i in zip(found[name][1], losses.argmin(axis=1), strict=True)]
        )
        rates = np.exp(thetas[:, :TENSORS]) / (1 - sigmoid(thetas[:, TENSORS : 2 * TENSORS]))
        places = np.arange(TENSORS) + shift
        right.plot(np.tile(places, (len(rates), 1)), rates, "o", color=COLORS[name], markersize=4)
        right.plot([], [], "o", color=COLORS[name], markersize=4, label=name)
    right.set_yscale("log")
    right.set_xticks(np.arange(TENSORS), tensors, fontsize=8)
    right.set_xlabel("tensor (b: biases, W: weights; 1: first layer)")
    right.set_ylabel("rate / (1 - momentum) of the best, each seed")
    right.grid(axis="y", alpha=0.25, linewidth=0.5)
    right.legend(fontsize=8, frameon=False)
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
    return figure


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


STUDY = Study(
    "29 hyperparameters of a deep MLP by PES, ES and random search (Vicol 2021, 5.4)", 5.0, run
)
