"""Estimators of the meta-gradient against the exact one, over thousands of inner steps.

At a freshly initialized theta, where training is hardly chaotic. The online estimators run an
episode first that is not counted, so that their particles are at all phases. The truth is a
mean over episodes; its standard error is that of the whole vector, over its norm, and an error
below it says no more than that. (The tails are heavy: at T = 5,000 one of the 64 episodes is 4.5
norms from the mean, the others below 1.)
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from matplotlib.figure import Figure

from launch.studies.base import Claim, Result, Study
from launch.studies.shared import classifier, cost, plots
from launch.studies.shared.compare import in_parallel
from launch.studies.shared.episodes import estimates
from learned_opt import reversible_mlp_optimizer
from meta_train.estimators import bptt, fixed_horizon, pes, reversible, tbptt, truncated_es
from meta_train.progress import progress
from meta_train.reversible.inner import reversible_inner_training
from tasks.data.images import load_images
from tasks.mlp import mlp_classifier

TRUNCATION = 20
PAIRS = 16
SIGMA = 0.01
TRUTH_EPISODES = 64
# Forward steps that one step of each method costs, per particle or pair; measured on one core,
# 2026-11-21: 2.0, 2.6, 3.6 and 8.9.
COST = {"PES": 2, "truncated ES": 3, "truncated BPTT": 4, "exact, other seeds": 9}
ONLINE: dict[str, tuple[Callable, dict[str, Any]]] = {
    "PES": (pes, {"num_pairs": PAIRS, "sigma": SIGMA}),
    "truncated ES": (truncated_es, {"num_pairs": PAIRS, "sigma": SIGMA}),
    "truncated BPTT": (tbptt, {"num_particles": PAIRS}),
}
COLORS = {
    "PES": plots.COLORS["PES"],
    "truncated ES": plots.COLORS["truncated ES"],
    "truncated BPTT": plots.COLORS["TBPTT"],
    "exact, other seeds": plots.COLORS["exact"],
}


def run(quick: bool, data_dir: str | None) -> Result:
    """Every estimator gets the forward steps of ``2 * PAIRS`` runs of each length."""
    horizons = (100,) if quick else (100, 500, 2000, 5000)
    data = load_images("mnist" if data_dir else "digits", data_dir)
    task = mlp_classifier(data, hidden_sizes=(8,), activation="tanh", batch_size=16)
    optimizer = reversible_mlp_optimizer((16,), step_mult=1e-3)
    system = reversible_inner_training(task, optimizer)
    theta = optimizer.init(jax.random.key(0))
    episodes = 16 if quick else TRUTH_EPISODES
    rows, exact_share = [], []
    for horizon in progress(horizons, desc="horizons"):
        exact = partial(whole_episodes, system, theta, horizon)
        others = 2 * PAIRS // COST["exact, other seeds"]
        jobs: dict[str, Callable[[], Any]] = {
            "truth": partial(exact, episodes, jax.random.key(1)),
            "exact, other seeds": partial(exact, others, jax.random.key(2)),
            "exact MiB": partial(memory, reversible, system, theta, horizon),
            "BPTT MiB": partial(memory, bptt, system, theta, horizon),
        }
        jobs |= {name: partial(online, name, system, theta, horizon) for name in ONLINE}
        found = in_parallel(jobs)
        truth, error, share = found["truth"]
        found["exact, other seeds"], _, other_share = found["exact, other seeds"]
        exact_share += [share, other_share]
        norm = float(np.linalg.norm(truth))
        rows += [
            {
                "inner steps": horizon,
                "estimator": name,
                "cosine": float(found[name] @ truth / np.linalg.norm(found[name]) / norm),
                "relative error": float(np.linalg.norm(found[name] - truth) / norm),
                "truth norm": norm,
                "its standard error": error,
                "exact MiB": found["exact MiB"],
                "BPTT MiB": found["BPTT MiB"],
            }
            for name in COST
        ]
    longest = {row["estimator"]: row for row in rows if row["inner steps"] == horizons[-1]}
    last = rows[-1]
    least = 5 if quick else 50
    claims = [
        Claim(
            "Every exact meta-gradient was recovered to the bit.",
            min(exact_share) == 1.0,
            f"up to {horizons[-1]:,} inner steps",
        ),
        Claim(
            f"At the longest horizon it takes at most 1/{least} of the memory of backpropagation "
            "that stores states and recomputes every step.",
            last["BPTT MiB"] >= least * last["exact MiB"],
            f"{last['exact MiB']:.2f} MiB, {last['BPTT MiB']:.1f} MiB (an episode, compiled)",
        ),
        Claim(
            "At the longest horizon truncated backpropagation misses the size of the gradient, "
            "whatever its direction: its relative error is above one half.",
            longest["truncated BPTT"]["relative error"] > 0.5,
            f"relative error {longest['truncated BPTT']['relative error']:.2f}, cosine "
            f"{longest['truncated BPTT']['cosine']:.2f}, standard error of the truth "
            f"{last['its standard error']:.2f}",
        ),
        Claim(
            "The exact gradient of other seeds is the best estimate at equal compute.",
            longest["exact, other seeds"]["relative error"]
            <= min(row["relative error"] for row in longest.values()),
            ", ".join(f"{k}: {v['relative error']:.2f}" for k, v in longest.items()),
        ),
    ]
    caption = (
        f"{classifier.name(data_dir)} MLP of 8 tanh units, batch 16, T on the axis, K = "
        f"{TRUNCATION}, sigma {SIGMA:g}; one estimate each of {2 * PAIRS} runs' forward steps; "
        f"truth: mean of {episodes} episodes"
    )
    return Result(claims, rows, draw(rows), {"rows": rows}, caption)


def whole_episodes(system, theta, horizon, episodes, key) -> tuple[np.ndarray, float, float]:
    """The exact gradient averaged over episodes, its standard error relative to its norm, and
    the share recovered to the bit."""
    estimator = reversible(system, num_particles=episodes, horizons=fixed_horizon(horizon), chunk=4)
    grad, _, metrics = jax.jit(estimator.estimate)(theta, estimator.init(theta, key), key)
    mean = np.asarray(ravel_pytree(grad)[0], np.float64)
    variance = max(0.0, float(metrics["grad_sq_norm"]) - mean @ mean) / (episodes - 1)
    return mean, float(np.sqrt(variance / (mean @ mean))), float(metrics["exact"])


def memory(kind, system, theta, horizon) -> float:
    """Of one whole episode, in MiB."""
    estimator = kind(system, num_particles=1, horizons=fixed_horizon(horizon))
    return cost.memory(estimator, theta) / 2**20


def online(name, system, theta, horizon) -> np.ndarray:
    """The mean of an online estimator over the truncations it can pay for, after one episode."""
    num_estimates = 2 * PAIRS * horizon // (COST[name] * PAIRS * TRUNCATION)
    make, particles = ONLINE[name]
    estimator = make(system, **particles, truncation=TRUNCATION, horizons=fixed_horizon(horizon))

    @jax.jit
    def mean(key):
        key_init, key_warm, key_run = jax.random.split(key, 3)
        warm = jax.random.split(key_warm, horizon // TRUNCATION)
        state, _ = estimates(estimator, theta, estimator.init(theta, key_init), warm)
        keys = jax.random.split(key_run, num_estimates)
        found = jax.vmap(lambda grad: ravel_pytree(grad)[0])
        return jnp.mean(found(estimates(estimator, theta, state, keys)[1]), axis=0)

    return np.asarray(mean(jax.random.key(5)), np.float64)


def draw(rows) -> Figure:
    """Cosine and relative error against the number of inner steps."""
    figure, (left, right) = plots.panels(2, (8.6, 3.4))
    for name, color in COLORS.items():
        mine = [row for row in rows if row["estimator"] == name]
        steps = [row["inner steps"] for row in mine]
        for axes, column in ((left, "cosine"), (right, "relative error")):
            axes.plot(steps, [row[column] for row in mine], "o-", color=color, label=name)
    errors = [row["its standard error"] for row in mine]
    right.plot(steps, errors, "k--", lw=1, label="standard error of the truth")
    plots.level(left, 0, color="0.7", linestyle="-")
    plots.level(right, 1, color="0.7", linestyle="-")
    left.set(ylim=(-0.4, 1.05), ylabel="cosine with the truth", title="Direction")
    right.set(yscale="log", ylabel="relative error", title="Direction and size")
    for axes in (left, right):
        axes.set(xscale="log", xlabel="inner steps T")
    right.legend()
    return figure


STUDY = Study("estimators' meta-gradients against the exact one, to 5,000 inner steps", 4.0, run)
