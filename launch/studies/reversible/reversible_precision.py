"""Why exact arithmetic: float reversal drifts exponentially, exact reversal costs the bound."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from launch.benchmarks.reversible import losses
from launch.studies.base import Claim, Result, Study
from launch.studies.shared import classifier, plots
from meta_train import reversible
from meta_train.progress import progress
from meta_train.reversible import DOUBLE, SINGLE
from meta_train.reversible.arithmetic import plan_spills
from meta_train.reversible.sgd import naive_reversal

MOMENTA = (0.5, 0.7, 0.9, 0.98, 0.99)
SIZES = (64, 32, 10)
LEARNING_RATE = 0.1


def run(quick: bool, data_dir: str | None) -> Result:
    """Trains the benchmark's network at each momentum and walks back both ways.

    Always on the bundled digits, the benchmark's fixed case: ``data_dir`` changes nothing.
    """
    del data_dir
    num_steps = 300 if quick else 1000
    momenta = MOMENTA[::2] if quick else MOMENTA
    drifts, rows = {}, []
    for momentum in progress(momenta, desc="momenta"):
        for dtype in (np.float32, np.float64):
            drifts[momentum, dtype.__name__] = naive_drift(momentum, num_steps, dtype)
        report = exact_report(momentum, num_steps)
        bits = {steps: tape(momentum, steps) for steps in (num_steps, 10_000)}
        rows.append(
            {
                "momentum": momentum,
                "float32 drift": float(drifts[momentum, "float32"][0]),
                "float64 drift": float(drifts[momentum, "float64"][0]),
                "exact": reversible.explain(report),
                "bound": math.log2(1 / momentum),
                f"bits/step, T={num_steps}": bits[num_steps] / num_steps,
                "bits/step, T=10000": bits[10_000] / 10_000,
            }
        )
    nine = next(row for row in rows if row["momentum"] == 0.9)
    exact = all(row["exact"].startswith("exact") for row in rows)
    tight = [row["bits/step, T=10000"] / row["bound"] for row in rows if row["momentum"] <= 0.9]
    claims = [
        Claim(
            "Naive float reversal at momentum 0.9 loses the initial weights, in either precision.",
            not (nine["float32 drift"] < 1e-2)
            and not (nine["float64 drift"] < (1e-6 if quick else 1.0)),
            f"largest error after {num_steps} steps: float32 {nine['float32 drift']:.1e}, "
            f"float64 {nine['float64 drift']:.1e}",
        ),
        Claim(
            "Exact reversal recovers every bit at every momentum.",
            exact,
            "; ".join(f"{row['momentum']}: {row['exact']}" for row in rows),
        ),
        Claim(
            "For momenta to 0.9 its tape and buffer take at most 1.1 times the information "
            "bound at T = 10,000.",
            max(tight) <= 1.1,
            "ratios " + ", ".join(f"{ratio:.3f}" for ratio in tight),
        ),
    ]
    curves = {f"{m} {name}": drift for (m, name), drift in drifts.items()}
    caption = f"digits tanh MLP {SIZES}, T = {num_steps:,}, learning rate {LEARNING_RATE}; one seed"
    return Result(claims, rows, draw(drifts, num_steps), {"drift": curves}, caption)


def naive_drift(momentum: float, num_steps: int, dtype) -> np.ndarray:
    """Largest weight error at each step of the walk back in floats, ``[T]``."""
    with jax.enable_x64(dtype == np.float64):
        start = problem(momentum, dtype)
        drift = naive_reversal(losses()[0], start, num_steps=num_steps, fixed=DOUBLE)
    return np.asarray(drift, np.float64)


def exact_report(momentum: float, num_steps: int) -> reversible.Report:
    """Of a reversal with float32 gradients."""
    loss, objective = losses()
    start = problem(momentum, np.float32)
    return reversible.hypergradients(loss, objective, start, num_steps=num_steps)[2].report


def problem(momentum: float, dtype) -> reversible.Setup:
    """The benchmark's network at rest."""
    params = classifier.init(jax.random.key(0), SIZES)
    params = jax.tree.map(lambda x: jnp.asarray(x, dtype), params)
    return reversible.setup(params, LEARNING_RATE, momentum)


def tape(momentum: float, num_steps: int) -> int:
    """Bits per parameter of tape and buffer."""
    numerator = round(momentum * 2**SINGLE.decay_bits)
    return plan_spills(np.full((num_steps, 1), numerator), SINGLE.decay_bits).tape_bits


def draw(drifts, num_steps: int) -> Figure:
    """Drift against steps walked back; bits per parameter and step against momentum."""
    figure, (left, right) = plots.panels(2, (8.6, 3.4))
    walked = np.arange(1, num_steps + 1)
    for i, momentum in enumerate(sorted({momentum for momentum, _ in drifts})):
        for name, style in (("float64", "-"), ("float32", ":")):
            drift = drifts[momentum, name][::-1]
            drift = np.where(np.isfinite(drift) & (drift < 1e30), drift, np.nan)
            label = f"momentum {momentum}" if name == "float64" else None
            left.plot(walked, drift, style, color=f"C{i}", label=label)
    left.plot([], [], ":", color="0.4", label="float32")
    plots.level(left, 1, color="0.7", linestyle="-")
    left.set(
        yscale="log",
        ylim=(1e-17, 1e12),
        xlim=(-0.03 * num_steps, 1.4 * num_steps),
        xlabel="steps walked back",
        ylabel="largest error of a weight",
        title="Naive float reversal (exact reversal: 0)",
    )
    left.legend(loc="upper right", frameon=True, edgecolor="none")
    grid = np.linspace(0.5, 0.995, 120)
    for steps, color in ((100, "C2"), (1000, "C0"), (10_000, "C3")):
        bits = [tape(m, steps) / steps for m in grid]
        right.plot(grid, bits, color=color, label=f"T = {steps:,}")
    right.plot(grid, np.log2(1 / grid), "k--", label=r"bound $\log_2(1/\gamma)$")
    right.set(
        yscale="log",
        xlabel=r"momentum $\gamma$",
        ylabel="bits per weight and step",
        title="Tape and buffer of exact reversal",
    )
    right.legend()
    return figure


STUDY = Study(
    "drift of float reversal; bits of the exact one (Maclaurin 2015, section 3)", 0.5, run
)
