"""Figure 8 of the PES paper: a linear policy for the Swimmer, without a gradient of the physics.

python -m launch.reproduce swimmer --workdir=DIR

Needs the extra ``control``. Gymnasium's Swimmer, simulated by MJX; every recorded policy is
rolled out in Gymnasium's own simulation, and the returns shown are those. As in the paper: a
linear policy without a bias, from zero, no normalization of observations or rewards; T = 1,000, K
= 100, 10 pairs, plain gradient descent, sigma 0.3 (truncated ES 0.1). ARS V1 has the defaults of
its code. The learning rates of the paper are of sums, in a normalization that its code and its
README give differently; here they are of the mean reward of a step, and were chosen by runs of
60,000 to 160,000 environment steps on seeds 3 and 5 (truncated ES, NRES: 5 alone) in MuJoCo, by
the steps to 300 or else the highest return: of 0.1, 0.3, 0.6 and 1 for PES, of 1, 3 and 10 for
full ES, of 1, 10 and 100 for truncated ES; NRES has that of PES. Quick: fewer steps, one seed,
PES and truncated ES.

With the same folder a run that was stopped goes on where it was.
"""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from launch.studies.base import Claim, Result, Study
from launch.studies.pes.control_runs import (
    Curve,
    Method,
    Size,
    ars,
    final_returns,
    flat_system,
    learn,
    steps_to,
)
from launch.studies.shared import plots
from meta_train import estimators as est
from tasks.dynamics.control import Control
from tasks.dynamics.gymnasium_rollouts import trajectory
from tasks.dynamics.mujoco_physics import ENVIRONMENTS, EPISODE

TRUNCATION = 100
PAIRS, ARS_PAIRS = 10, 8
SIGMA, NARROW_SIGMA, ARS_SIGMA = 0.3, 0.1, 0.03
LEVEL = 300.0
TARGET = ENVIRONMENTS["swimmer"].threshold
ROLLOUTS = 50  # In Gymnasium, of the last policies.
FULL = Size(steps=240_000, record=10_000, seeds=(11, 13, 23), rollouts=2)
QUICK = Size(steps=40_000, record=20_000, seeds=(13,), rollouts=2)
ANGLES = 200  # Steps whose joint angles are drawn.


def methods() -> dict[str, Method]:
    es: dict[str, Any] = {"num_pairs": PAIRS, "sigma": SIGMA}
    window = es | {"truncation": TRUNCATION}
    of_window = 2 * PAIRS * TRUNCATION
    narrow = window | {"sigma": NARROW_SIGMA}
    return {
        "PES": Method(partial(est.pes, **window), 0.3, of_window),
        "full ES": Method(partial(est.full_es, **es), 3.0, 2 * PAIRS * EPISODE),
        "NRES": Method(partial(est.nres, **window), 0.3, of_window),
        "truncated ES": Method(partial(est.truncated_es, **narrow), 10.0, 3 * of_window // 2),
        "ARS V1": Method(
            partial(ars, num_pairs=ARS_PAIRS, sigma=ARS_SIGMA), 0.02, 2 * ARS_PAIRS * EPISODE
        ),
    }


def run(
    quick: bool, data_dir: str | None, folder: Path, more: tuple[tuple[int, ...], ...] = ()
) -> Result:
    """``more``: further seeds of a full run, in populations of their own, none cut short."""
    del data_dir
    from launch.compiled_programs import keep_compiled_programs

    keep_compiled_programs()
    control, size = Control(), QUICK if quick else FULL
    more = () if quick else more
    tried = methods()
    if quick:
        tried = {name: tried[name] for name in ("PES", "truncated ES")}
    found = {
        name: joined(
            [
                learn(name, method, control, part, folder / "parts", np.inf if more else TARGET)
                for part in (size, *(size._replace(seeds=seeds) for seeds in more))
            ]
        )
        for name, method in tried.items()
    }
    best = {name: best_thetas(curve) for name, curve in found.items()}
    judged = {
        name: final_returns(control, thetas, ROLLOUTS if not quick else 5, seed=10**6).mean(axis=1)
        for name, thetas in best.items()
    }
    table = [
        {
            "estimator": name,
            "seeds": len(curve.theta),
            "environment steps": int(curve.steps[-1]),
            f"steps to {LEVEL:g}": float(np.median(steps_to(curve, LEVEL))),
            "seeds that reach it": int(np.isfinite(steps_to(curve, LEVEL)).sum()),
            "return": float(np.median(judged[name])),
            "lowest": float(judged[name].min()),
            "highest": float(judged[name].max()),
        }
        for name, curve in found.items()
    ]
    name, seed = max(
        ((name, int(np.argmax(judged[name]))) for name in judged),
        key=lambda pair: judged[pair[0]][pair[1]],
    )
    unravel = flat_system(control)[1]
    swim = trajectory(control, unravel(best[name][seed]), seed=0)
    data = {
        "curves": {name: curve._asdict() for name, curve in found.items()},
        "returns": judged,
        "best": {"estimator": name, "positions": swim.positions, "theta": best[name][seed]},
    }
    seeds = len(found["PES"].theta)
    caption = (
        f"Gymnasium's Swimmer-v5, linear policy, T = {EPISODE:,}, K = {TRUNCATION}, {PAIRS} pairs "
        f"(ARS: {ARS_PAIRS}); line: median, band: range of {seeds} seeds, each point "
        f"the mean of {size.rollouts} rollouts in Gymnasium's simulation; right: an episode of the "
        f"best policy ({name})"
    )
    figure = draw(found, swim.positions)
    return Result(claims(found, judged, quick), table, figure, data, caption)


def joined(curves: list[Curve]) -> Curve:
    """Those of populations of equal length as one."""
    theta, returns = (np.concatenate([getattr(c, f) for c in curves]) for f in ("theta", "returns"))
    return Curve(curves[0].steps, theta, returns)


def best_thetas(curve: Curve) -> np.ndarray:
    """Of each seed, the policy with the highest recorded return, ``[seeds, P]``."""
    return curve.theta[np.arange(len(curve.theta)), np.argmax(curve.returns, axis=1)]


def claims(found: dict[str, Curve], judged: dict[str, np.ndarray], quick: bool) -> list[Claim]:
    highest = {name: curve.returns.max(axis=1) for name, curve in found.items()}
    if quick:
        return [
            Claim(
                "PES learns, to returns that truncated ES does not have in as many steps.",
                bool(np.median(highest["PES"]) > np.median(highest["truncated ES"])),
                f"medians of the highest returns: PES {np.median(highest['PES']):.0f}, truncated "
                f"ES {np.median(highest['truncated ES']):.0f}",
            )
        ]
    steps = {name: steps_to(curve, LEVEL) for name, curve in found.items()}
    said = ", ".join(f"{name} {np.median(x):,.0f}" for name, x in steps.items())
    return [
        Claim(
            f"PES reaches {LEVEL:g} in fewer environment steps than full ES.",
            bool(np.median(steps["PES"]) < np.median(steps["full ES"])),
            f"medians of the steps: {said}",
        ),
        Claim(
            f"Truncated ES does not reach {LEVEL:g}.",
            bool(highest["truncated ES"].max() < LEVEL),
            f"highest returns {highest['truncated ES'].min():.0f} to "
            f"{highest['truncated ES'].max():.0f}",
        ),
        Claim(
            "In most seeds the best policies of PES are solutions by Gymnasium's threshold.",
            bool(np.median(judged["PES"]) >= TARGET),
            f"mean returns of {ROLLOUTS} rollouts: "
            + ", ".join(f"{x:.0f}" for x in np.sort(judged["PES"])),
        ),
    ]


def draw(found: dict[str, Curve], positions: np.ndarray) -> Figure:
    figure, (left, middle, right) = plots.panels(3, (12, 3.6), width_ratios=(1.5, 1, 1))
    colors = plots.COLORS | {"ARS V1": plots.SKY}
    for name, curve in found.items():
        plots.band(left, curve.steps / 1000, curve.returns, color=colors[name], label=name)
    plots.level(left, TARGET, f"solved, {TARGET:g}")
    left.set(
        xlabel="environment steps (thousands)",
        ylabel="return of an episode",
        title="Swimmer, in Gymnasium's simulation",
    )
    left.legend(loc="upper left")
    middle.plot(positions[:, 0], positions[:, 1], color=plots.BLUE)
    middle.plot(*positions[0, :2], "s", color=plots.BLACK)
    middle.set(xlabel="x (m)", ylabel="y (m)", title="Path of the best policy")
    middle.axis("equal")
    seconds = 0.04 * np.arange(ANGLES)
    for joint, color in ((3, plots.BLUE), (4, plots.ORANGE)):
        angles = np.degrees(positions[-ANGLES:, joint])
        right.plot(seconds, angles, color=color, label=f"joint {joint - 2}")
    right.set(xlabel="time (s)", ylabel="angle (degrees)", title="Its joints, at the end")
    right.legend(loc="upper right")
    return figure


STUDY = Study(
    "a Swimmer policy by PES, NRES, ARS, full and truncated ES (Vicol 2021, Fig. 8)",
    28.0,
    run,
    keeps=True,
    needs="control",
)
