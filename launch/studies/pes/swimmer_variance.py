"""Where in an episode the noise of an estimate comes from, for a policy of the Swimmer.

python -m launch.reproduce swimmer_variance --workdir=DIR

Needs the extra ``control``. Beyond the PES paper. At a held policy all particles start their
episodes together, so each outer step estimates from one window of K = 100 steps; the variance of a
pair's contribution is the trace of its covariance over pairs. Two policies: zero, where learning
starts, and one that swims (its weights, found by PES in the study ``swimmer``, are in this file).
The scale is that of the gradient of the mean reward of a step; full ES has one estimate an episode,
its mean over windows here being the variance at the cost of ten windows.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from launch.studies.base import Claim, Result, Study
from launch.studies.pes.control_runs import flat_system
from launch.studies.shared import plots
from meta_train import estimators as est
from meta_train.estimators import synchronized
from tasks.dynamics.control import Control
from tasks.dynamics.mujoco_physics import EPISODE

TRUNCATION, SIGMA = 100, 0.3
WINDOWS = EPISODE // TRUNCATION
# The weights of a policy that the study `swimmer` found by PES; its return is about 320.
SWIMS = (
    0.17,
    -0.36,
    -0.11,
    0.52,
    -0.59,
    0.49,
    -0.14,
    -0.29,
    -0.03,
    0.54,
    -0.59,
    -0.43,
    0.15,
    0.55,
    -0.41,
    0.21,
)
MAKERS = {"PES": est.pes, "NRES": est.nres, "truncated ES": est.truncated_es}


def variances(make: Any, control: Control, thetas: np.ndarray, num_pairs: int) -> np.ndarray:
    """Variance of a pair's contribution in each window, ``[policies, windows]``."""
    system, _, _ = flat_system(control)
    estimator = make(
        system,
        num_pairs=num_pairs,
        truncation=TRUNCATION,
        horizons=est.fixed_horizon(EPISODE),
        sigma=SIGMA,
    )

    @jax.jit
    @jax.vmap
    def measure(theta):
        particles = synchronized(estimator.init(theta, jax.random.key(0)))

        def window(particles, key):
            grad, particles, metrics = estimator.estimate(theta, particles, key)
            return particles, metrics["grad_sq_norm"] - jnp.sum(grad**2)

        return jax.lax.scan(window, particles, jax.random.split(jax.random.key(1), WINDOWS))[1]

    return np.asarray(measure(jnp.asarray(thetas)))


def run(quick: bool, data_dir: str | None) -> Result:
    del data_dir
    from launch.compiled_programs import keep_compiled_programs

    keep_compiled_programs()
    control, num_pairs = Control(), 10 if quick else 200
    thetas = {"from zero": np.zeros(16, np.float32), "swimming": np.array(SWIMS, np.float32)}
    stacked = np.stack(list(thetas.values()))
    found = {name: variances(make, control, stacked, num_pairs) for name, make in MAKERS.items()}
    table = [
        {
            "policy": policy,
            "estimator": name,
            "first window": float(found[name][i, 0]),
            "last window": float(found[name][i, -1]),
            "mean": float(found[name][i].mean()),
            "slope": slope(found[name][i]),
        }
        for i, policy in enumerate(thetas)
        for name in MAKERS
    ]
    figure, axes = plots.panels(2, (9, 3.6))
    for i, (axis, policy) in enumerate(zip(axes, thetas, strict=True)):
        for name, values in found.items():
            axis.plot(
                TRUNCATION * (0.5 + np.arange(WINDOWS)),
                values[i],
                "o-",
                color=plots.COLORS[name],
                label=name,
            )
        axis.set(
            yscale="log",
            xlabel="step of the episode",
            ylabel="variance of a pair's contribution",
            title=f"Policy: {policy}",
        )
        axis.legend()
    caption = (
        f"Swimmer-v5, linear policy, T = {EPISODE:,}, K = {TRUNCATION}, sigma {SIGMA:g}, "
        f"{num_pairs} pairs; trace of the covariance of a pair's contribution, by window"
    )
    return Result(claims(found), table, figure, {"variance": found, "thetas": thetas}, caption)


def slope(values: np.ndarray) -> float:
    """Of the logarithm of the variance against that of the window's number, least squares."""
    return float(np.polyfit(np.log(1 + np.arange(len(values))), np.log(values), 1)[0])


def claims(found: dict[str, np.ndarray]) -> list[Claim]:
    ratio = found["PES"][:, -3:].mean(axis=1) / found["NRES"][:, -3:].mean(axis=1)
    growth = {name: [slope(row) for row in rows] for name, rows in found.items()}
    return [
        Claim(
            "The variance of PES grows along the episode, as it sums the perturbations so far.",
            bool(min(growth["PES"]) > 0.5),
            "slope of its logarithm against the window's: "
            + ", ".join(f"{x:.2f}" for x in growth["PES"]),
        ),
        Claim(
            "Late in the episode NRES has less variance than PES.",
            bool(ratio.min() > 1),
            "PES over NRES, last three windows: " + ", ".join(f"{x:.1f}" for x in ratio),
        ),
    ]


STUDY = Study(
    "variance of PES, NRES and truncated ES along an episode of the Swimmer (ours)",
    12.0,
    run,
    needs="control",
)
