"""What derivatives miss when the inner gradient jumps: ReLU networks beside tanh networks.

    python -m launch.reproduce relu_jumps --workdir=DIR

The gradient of a ReLU network jumps where a unit switches, so the loss of a run that trains one
jumps in theta. Its *mean* over initializations and batches is smooth, but the mean of its
derivatives is not the derivative of its mean: the jumps have derivative zero almost everywhere.
Central differences and evolution strategies see them; no derivative of single runs does.

Measured are directional derivatives: theta is the MLP optimizer's as it starts, moved by ``a v``
with ``v ~ N(0, I)``, and ``F(a)`` is the mean training loss of whole inner runs. Beside each other
stand ``E[dL/da]`` at ``a = 0`` by exact differentiation and ``(F(h) - F(-h)) / 2h`` on the same
runs (initialization and batches), ``h = 0.001``. Their gap is measured in pairs. The estimators
get the same line as their theta, one number, and draws of their own.

Two settings: *small and fast* (digits 64-5-10, batch 8, 20 steps, step multiplier 0.05), and the
defaults (64-32-10, batch 64, 100 steps, step multiplier 0.001) with one size changed at a time.
"""

from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from matplotlib.figure import Figure

from launch.studies.base import Claim, Result, Study
from launch.studies.pes.table1 import ROWS, whole
from launch.studies.shared import plots
from learned_opt import mlp_optimizer
from meta_train import estimators as est
from meta_train.inner import inner_training
from meta_train.progress import progress
from meta_train.unroll import UnrolledSystem, unroll
from tasks import mlp_classifier
from tasks.data import load_images

H = SIGMA = 1e-3  # In units of the direction, whose components have variance 1.
CHUNK, Z = 100, 3.5
TRUNCATION = 5
RUNS, SEED = 5, 11  # What the keys of runs and estimators are drawn from.


class Setting(NamedTuple):
    """An inner problem: digits 64-width-10, and how long and how fast it is trained."""

    activation: str = "relu"
    width: int = 32
    batch: int = 64
    horizon: int = 100
    step_mult: float = 1e-3


SMALL = Setting(width=5, batch=8, horizon=20, step_mult=0.05)
SWEEPS: dict[str, tuple[int, ...]] = {
    "width": (8, 32, 64),
    "batch": (8, 64, 256),
    "horizon": (20, 50, 100),
}
QUICK_SWEEPS: dict[str, tuple[int, ...]] = {"width": (), "batch": (8, 32), "horizon": ()}
# Of table 1, with truncations of a quarter of the small setting's horizon.
ESTIMATORS = {
    name: ROWS[name]
    for name in ("BPTT", "RTRL", "UORO", "ARTBP", "forward gradient", "Reparam", "PES+Analytic",
                 "ES", "PES", "GPES", "NRES")
}  # fmt: skip
ESTIMATORS["ARTBP"] = ROWS["ARTBP"]._replace(build=whole(est.artbp, mean_truncation=9.0))
QUICK_ESTIMATORS = ("BPTT", "PES", "NRES")


def direction(index: int) -> jax.Array:
    """``v ~ N(0, I)``, as long as theta."""
    theta = jax.eval_shape(mlp_optimizer().init, jax.random.key(0))
    return jax.random.normal(
        jax.random.key(101 + index), (sum(leaf.size for leaf in jax.tree.leaves(theta)),)
    )


def line(setting: Setting, v: jax.Array) -> UnrolledSystem:
    """Inner training as a function of ``a``, float ``[1]``: theta moved by ``a v``."""
    optimizer = mlp_optimizer(step_mult=setting.step_mult)
    start, unravel = ravel_pytree(optimizer.init(jax.random.key(0)))
    task = mlp_classifier(
        load_images("digits"),
        hidden_sizes=(setting.width,),
        activation=setting.activation,
        batch_size=setting.batch,
    )
    system = inner_training(task, optimizer)

    def at(a):
        return unravel(start + a[0] * v)

    return UnrolledSystem(
        lambda a, key, horizon: system.init(at(a), key, horizon),
        lambda a, state, key: system.step(at(a), state, key),
    )


def slopes(setting: Setting, directions: int, num_runs: int) -> np.ndarray:
    """Derivative and central difference of each run's mean loss, ``[directions, num_runs, 2]``."""

    def one(v, key):
        system = line(setting, v)
        key_init, key_steps = jax.random.split(key)

        def loss(a):
            state = system.init(a, key_init, setting.horizon)
            return jnp.mean(unroll(system, a, state, key_steps, setting.horizon)[1])

        derivative = jax.jvp(loss, (jnp.zeros(1),), (jnp.ones(1),))[1]
        above, below = jax.lax.map(loss, jnp.array([[H], [-H]]))
        return jnp.stack([derivative, (above - below) / (2 * H)])

    keys = jax.random.split(jax.random.key(RUNS), num_runs)
    measure = jax.jit(lambda v: jax.lax.map(partial(one, v), keys, batch_size=CHUNK))
    return np.array([measure(direction(index)) for index in range(directions)], np.float64)


class Slopes(NamedTuple):
    """Means over runs and their standard errors, of each direction ``[V]``."""

    derivative: np.ndarray
    derivative_error: np.ndarray
    difference: np.ndarray
    difference_error: np.ndarray
    gap: np.ndarray  # derivative - difference, in pairs
    gap_error: np.ndarray

    @property
    def relative(self) -> tuple[float, float]:
        """The gap relative to the slope, over all directions, in percent; standard error."""
        size = np.sqrt(max(np.sum(self.difference**2 - self.difference_error**2), 1e-12))
        gap = np.sqrt(max(np.sum(self.gap**2 - self.gap_error**2), 0.0))
        error = np.sqrt(np.sum((self.gap * self.gap_error) ** 2) / np.sum(self.gap**2))
        return 100 * float(gap / size), 100 * float(error / size)


@cache  # The defaults are a point of every sweep.
def compare(setting: Setting, directions: int, num_runs: int) -> Slopes:
    """The slopes in the first ``directions`` directions."""
    found = slopes(setting, directions, num_runs)
    columns = (found[..., 0], found[..., 1], found[..., 0] - found[..., 1])
    pairs = ((x.mean(axis=1), x.std(axis=1, ddof=1) / num_runs**0.5) for x in columns)
    return Slopes(*(x for pair in pairs for x in pair))


def estimates(name: str, setting: Setting, replicates: int, num: int = 32) -> tuple[float, float]:
    """Mean and standard error of an estimator in direction 0, from independent episodes."""
    system = line(setting, direction(0))
    estimator = ESTIMATORS[name].build(system, num, setting.horizon, TRUNCATION, SIGMA)
    a = jnp.zeros(1)

    def one(key):
        key_init, key_steps = jax.random.split(key)
        state = estimator.init(a, key_init)
        windows = 1
        if hasattr(state, "position"):
            state, windows = est.synchronized(state), setting.horizon // TRUNCATION

        def body(state, key):
            grad, state, _ = estimator.estimate(a, state, key)
            return state, grad[0]

        return jnp.mean(jax.lax.scan(body, state, jax.random.split(key_steps, windows))[1])

    keys = jax.random.split(jax.random.key(SEED), replicates)
    found = np.asarray(jax.jit(partial(jax.lax.map, one))(keys), np.float64)
    return float(found.mean()), float(found.std(ddof=1) / replicates**0.5)


class Size(NamedTuple):
    """How much is run; runs and replicates (of 32 particles or pairs) for ReLU and for tanh."""

    directions: int
    runs: tuple[int, int]
    sweep_directions: int
    sweep_runs: tuple[int, int]
    replicates: tuple[int, int]
    sweeps: dict[str, tuple[int, ...]]
    base: Setting
    estimators: tuple[str, ...]


FULL = Size(6, (2000, 400), 2, (200, 50), (60, 12), SWEEPS, Setting(), tuple(ESTIMATORS))
QUICK = Size(1, (1000, 200), 1, (1000, 200), (30, 0), QUICK_SWEEPS, SMALL, QUICK_ESTIMATORS)
ACTIVATIONS = ("relu", "tanh")
COLORS = {"relu": plots.VERMILION, "tanh": plots.BLUE}


def run(quick: bool, data_dir: str | None) -> Result:
    del data_dir  # Digits alone.
    size = QUICK if quick else FULL
    small, beside, swept = {}, {}, {}
    sizes = [(field, value) for field, values in size.sweeps.items() for value in values]
    for i, name in enumerate(ACTIVATIONS):
        setting = SMALL._replace(activation=name)
        small[name] = compare(setting, size.directions, size.runs[i])
        if size.replicates[i]:
            for estimator in progress(size.estimators, desc=f"{name}, estimators"):
                beside[name, estimator] = estimates(estimator, setting, size.replicates[i])
        for field, value in progress(sizes, desc=f"{name}, sweep"):
            setting = size.base._replace(activation=name, **{field: value})
            swept[field, setting] = compare(setting, size.sweep_directions, size.sweep_runs[i])
    rows = table(small, beside, swept)
    return Result(
        claims=claims(small, beside, swept, "small and fast" if quick else "the defaults"),
        table=rows,
        figure=draw(small, beside, swept),
        data={
            "rows": rows,
            "small": {name: found._asdict() for name, found in small.items()},
            "swept": [
                {"against": field, **setting._asdict(), **found._asdict()}
                for (field, setting), found in swept.items()
            ],
        },
        caption=f"digits 64-width-10, MLP optimizer as it starts; left: direction 0 at step "
        f"multiplier {SMALL.step_mult:g}, {size.runs[0]:,} runs, {32 * size.replicates[0]:,} "
        f"particles or pairs an estimator; right: around width {size.base.width}, batch "
        f"{size.base.batch}, {size.base.horizon} steps, step multiplier {size.base.step_mult:g}, "
        f"{size.sweep_directions} directions, {size.sweep_runs[0]} runs (tanh "
        f"{size.sweep_runs[1]}); bars and bands: 2 standard errors",
    )


def table(
    small: dict[str, Slopes],
    beside: dict[tuple[str, str], tuple[float, float]],
    swept: dict[tuple[str, Setting], Slopes],
) -> list[dict[str, Any]]:
    """Every direction of the small setting, every estimator in direction 0, every size swept."""

    def row(setting, what, estimate, difference, percent) -> dict[str, Any]:
        return {
            "network": f"64-{setting.width}-10 {setting.activation}",
            "batch": setting.batch,
            "steps": setting.horizon,
            "estimate of dF/da": what,
            "is": estimate[0],
            "+-": estimate[1],
            "difference": difference[0],
            "+- ": difference[1],
            "gap %": percent[0],
            "+-  ": percent[1],
        }

    rows = []
    for name, found in small.items():
        setting = SMALL._replace(activation=name)
        for d, (g, ge, f, fe, gap, error) in enumerate(zip(*found, strict=True)):
            percent = 100 * gap / abs(f), 100 * error / abs(f)
            rows.append(row(setting, f"derivative, direction {d}", (g, ge), (f, fe), percent))
    for (name, estimator), (g, ge) in beside.items():
        found = small[name]
        f, fe = found.difference[0], found.difference_error[0]
        percent = 100 * (g - f) / abs(f), 100 * float(np.hypot(ge, fe)) / abs(f)
        setting = SMALL._replace(activation=name)
        rows.append(row(setting, f"{estimator}, direction 0", (g, ge), (f, fe), percent))
    for (field, setting), found in swept.items():
        ours, other = (
            (float(np.sqrt(np.mean(x**2))), float(np.sqrt(np.mean(e**2))))
            for x, e in (found[0:2], found[2:4])
        )
        what = f"derivative, rms of {len(found.gap)}, by {field}"
        rows.append(row(setting, what, ours, other, found.relative))
    return rows


def claims(small, beside, swept, base: str) -> list[Claim]:
    relu, tanh = small["relu"], small["tanh"]
    z = np.abs(relu.gap / relu.gap_error)
    wrong = int(np.sum(relu.derivative * relu.difference < 0))
    percent = {name: found.relative for name, found in small.items()}

    def away(name, estimator, column):
        """Standard errors between an estimator's mean and a column of the small setting."""
        mean, error = beside[name, estimator]
        found = small[name]
        other, of_other = (getattr(found, column + end)[0] for end in ("", "_error"))
        return float(abs(mean - other) / np.hypot(error, of_other))

    def said(name, differentiates, column):
        values = {e: away(name, e, column) for n, e in beside if n == name}
        chosen = {e: z for e, z in values.items() if ESTIMATORS[e].differentiates in differentiates}
        return chosen, ", ".join(f"{e} {z:.1f}" for e, z in chosen.items())

    blind, blind_said = said("relu", (True,), "difference")
    sees, sees_said = said("relu", (False,), "difference")
    smooth, smooth_said = said("tanh", (True, False), "difference")
    at = {name: {k: f.relative for k, f in swept.items() if k[1].activation == name}
          for name in ACTIVATIONS}  # fmt: skip
    widest = max(value for value, _ in at["tanh"].values())
    batches = [(k[1].batch, v) for k, v in at["relu"].items() if k[0] == "batch"]
    return [
        Claim(
            "Small and fast, ReLU: the mean derivative is not the derivative of the mean loss, "
            "in any direction.",
            bool((z > Z).all()),
            f"{len(z)} directions, gap over its standard error at least {z.min():.1f}; gap "
            f"{percent['relu'][0]:.0f} +- {percent['relu'][1]:.0f}% of the slope; sign wrong in "
            f"{wrong}",
        ),
        Claim(
            "With tanh the two agree to 2% of the slope.",
            percent["tanh"][0] < 2.0,
            f"gap {percent['tanh'][0]:.2f} +- {percent['tanh'][1]:.2f}% over {len(tanh.gap)} "
            "directions",
        ),
        Claim(
            "Every estimator that differentiates runs misses the difference; those that compare "
            "losses have it, and with tanh all have it.",
            min(blind.values()) > Z > max((*sees.values(), *smooth.values())),
            f"standard errors from the difference: {blind_said}; without derivatives: {sees_said}"
            + (f"; tanh: {smooth_said}" if smooth else ""),
        ),
        Claim(
            f"Around {base} the gap is there too, with ReLU alone.",
            all(value > 2 * error + widest for value, error in at["relu"].values()),
            "ReLU: from {:.1f} to {:.1f}%; tanh at most {:.2f}%".format(
                min(v for v, _ in at["relu"].values()),
                max(v for v, _ in at["relu"].values()),
                widest,
            ),
        ),
        Claim(
            "Larger batches do not remove it: each example's jump is smaller, and there are more.",
            batches[-1][1][0] > batches[0][1][0] / 2,
            ", ".join(f"batch {b}: {v:.1f} +- {e:.1f}%" for b, (v, e) in batches),
        ),
    ]


def draw(small, beside, swept) -> Figure:
    figure, (left, *panels) = plots.panels(4, (11.5, 3.8), width_ratios=(1.5, 1, 1, 1))
    names = [estimator for name, estimator in beside if name == "relu"]
    places = np.arange(len(names))[::-1]
    relu = small["relu"]
    for value, error, style, label in (
        (relu.difference[0], relu.difference_error[0], "-", "central difference"),
        (relu.derivative[0], relu.derivative_error[0], "--", "mean derivative"),
    ):
        left.axvspan(value - 2 * error, value + 2 * error, color="0.85", zorder=0)
        left.axvline(value, color="black", linestyle=style, linewidth=1, label=label)
    for place, name in zip(places, names, strict=True):
        mean, error = beside["relu", name]
        color = plots.VERMILION if ESTIMATORS[name].differentiates else plots.GREEN
        left.errorbar(mean, place, xerr=2 * error, fmt="o", capsize=2, color=color)
    left.set_yticks(places, names)
    left.set(
        xlabel="slope dF/da (nats)",
        title=f"ReLU 64-{SMALL.width}-10, batch {SMALL.batch}, {SMALL.horizon} steps",
    )
    left.legend(fontsize=7)
    labels = {"width": "hidden units", "batch": "batch (examples)", "horizon": "inner steps"}
    for axes, field in zip(panels, labels, strict=True):
        for name in ACTIVATIONS:
            found = [
                (getattr(setting, field), *each.relative)
                for (against, setting), each in swept.items()
                if against == field and setting.activation == name
            ]
            at, percent, error = np.reshape(found, (-1, 3)).T
            line = {"fmt": "o-", "capsize": 2, "color": COLORS[name], "label": name}
            axes.errorbar(at, percent, yerr=2 * error, **line)
        plots.steps_axis(axes, at)
        axes.set(xlabel=labels[field], ylim=(0, None))
    panels[0].set_ylabel("gap to the central difference\n(% of the slope)")
    panels[2].legend()
    return figure


STUDY = Study("what derivatives miss of ReLU networks, whose inner gradient jumps", 30.0, run)
