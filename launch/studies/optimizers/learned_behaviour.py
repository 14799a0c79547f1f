"""What the trained controller does: its rates, what it listens to, and what disturbs it.

    python -m launch.reproduce learned_behaviour --workdir=DIR

The controller of the package on tasks of the suite ``validation``, none of which it was trained
on. A *rate* is the root mean square of a tensor's step over that of Adam's direction for the same
gradients (decays .9 and .99), whatever the rule made of them. Inputs are held at 0 by the rows of
theta that read them, controls by the columns that write them, so every ablation is another theta
of the same program. Losses are logarithms of the share of a constant predictor's, over the last
tenth of a run; differences are paired by run. Its inputs and what the controls do:
``learned_opt/adam_controller.py``.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure

import learned_opt
from launch import leaves
from launch.evaluation.baselines import COSINE, Baseline, Setting, theta_of
from launch.evaluation.runs import Starts
from launch.studies.base import Claim, Result, Study
from launch.studies.shared import plots
from launch.suites import zoo_task
from learned_opt.base import LearnedOptimizer
from meta_train.evaluate import estimate
from meta_train.inner import inner_training, log_share
from meta_train.progress import progress
from tasks import Task

# In the order of the network's rows and columns.
INPUTS = (
    "progress", "middle of the run", "length of the run", "first steps", "trend of the loss",
    "drop of the loss", "size of the parameter", "size of Adam's direction", "its slow one's",
    "gradient against momentum", "momentum against slow one", "its mean over steps",
    "is a matrix", "number of entries", "what it added up", "gradient against its mean size",
)  # fmt: skip
CONTROLS = (
    "rate", "slow momentum", "own gradient", "decay", "integrator", "trust", "matrix direction"
)  # fmt: skip
ALL = "all inputs"
SPIKE = 100.0  # Times the loss of one step, and its gradient.
SCALES = (1e-3, 1.0, 1e3)
EARLY = 10  # Steps over which runs are compared number by number; later roundings grow.
ADAM = Baseline("adam", tuple(10.0 ** (e / 2) for e in range(-7, -1)), 1e-3, (COSINE,))
SEED = 5


class BehaviourSetting(NamedTuple):
    """What is run: the task whose rates are drawn, those of the ablations, steps, seeds."""

    task: str
    ablated: tuple[str, ...]
    horizon: int
    lengths: tuple[int, ...]
    num_seeds: int


FULL = BehaviourSetting(
    "diabetes_mlp",
    ("faces_mlp", "faces_autoencoder", "diabetes_mlp", "packages_transformer", "dixon_price"),
    400,
    (100, 400, 2000),
    8,
)
QUICK = BehaviourSetting("diabetes_mlp", ("diabetes_mlp",), 100, (50, 100), 4)


def run(quick: bool, data_dir: str | None) -> Result:
    """Rates of one task by layer and length; ablations over tasks; spikes, other units."""
    setting = QUICK if quick else FULL
    controller, theta = learned_opt.load("controller")
    zeros = jax.tree.map(jnp.zeros_like, theta["params"]["last"])
    altered = {"untrained": _with(theta, last=zeros)} | ablations(theta)
    variants = {"trained": Variant(theta)} | {n: Variant(x) for n, x in altered.items()}
    disturbed = {f"{x:g}": Variant(theta, scale=x) for x in SCALES} | {
        "spiked": Variant(theta, spike=SPIKE)
    }
    task = zoo_task(setting.task).make(data_dir)
    found = measure(task, controller, variants | disturbed, setting.horizon, setting.num_seeds)
    rates = {("trained", n): x for n, x in lengths(task, controller, theta, setting).items()}
    rates |= {(name, setting.horizon): found[name].rate for name in ("trained", "untrained")}
    changes = ablate(controller, variants, setting, {setting.task: found}, data_dir)
    scaled = {f"{x:g}": found[f"{x:g}"].losses for x in SCALES}
    spikes = adam_losses(task, setting) | {
        "controller": np.median(found["trained"].losses, axis=0),
        "controller, spiked": np.median(found["spiked"].losses, axis=0),
        "at": setting.horizon // 2,
    }

    names = leaf_names(task)
    rows = ablation_rows(changes)
    layers = rates["trained", setting.horizon]
    kernel = int(np.argmax([size for _, size in names]))
    claims = [*rate_claims(rates, setting, kernel), *ablation_claims(rows)]
    claims += disturbance_claims(spikes, scaled)
    figure = draw(rates, layers, names, kernel, rows, spikes, scaled, setting)
    caption = (
        f"{setting.task}, {setting.horizon} steps, {setting.num_seeds} runs (rates: median of "
        f"runs; a rate is the size of a step over that of Adam's direction); inputs and controls: "
        f"means over {', '.join(setting.ablated)}; bars: two standard "
        f"errors; spike: one loss and its gradient times {SPIKE:g}; Adam with cosine at the best "
        f"of {len(ADAM.values)} rates"
    )
    data = {
        "rates": {f"{name} {length}": x for (name, length), x in rates.items()},
        "leaves": [name for name, _ in names],
        "ablations": rows,
        "spikes": spikes,
        "scales": scaled,
    }
    return Result(claims, rows, figure, jax.tree.map(_plain, data), caption)


# What is run.


class Variant(NamedTuple):
    """Theta, and what all losses and gradients are multiplied by, and those of one step."""

    theta: Any
    scale: float = 1.0
    spike: float = 1.0


class Measured(NamedTuple):
    """Runs under one variant: losses ``[seeds, steps]``, median rates ``[steps, leaves]``."""

    losses: np.ndarray
    rate: np.ndarray


class Observed(NamedTuple):
    """State of ``observed``: steps done, the rule's, Adam's, and the last rates ``[leaves]``."""

    step: jax.Array
    inner: Any
    adam: Any
    rates: jax.Array


def observed(optimizer: LearnedOptimizer, at: int) -> LearnedOptimizer:
    """The optimizer with a ``Variant`` for theta, the spike at step ``at``.

    Its state also has the sizes of the last steps over those of Adam's direction.
    """
    direction = optax.scale_by_adam(0.9, 0.99, eps=0, eps_root=1e-16)

    def bind(variant, num_steps):
        rule = optimizer.bind(variant.theta, num_steps)

        def init(params):
            rates = jnp.zeros(len(jax.tree.leaves(params)))
            return Observed(jnp.int32(0), rule.init(params), direction.init(params), rates)

        def update(grads, state, params=None, value=None, **extra):
            adam, adam_state = direction.update(grads, state.adam)
            factor = variant.scale * jnp.where(state.step == at, variant.spike, 1.0)
            grads = jax.tree.map(lambda x: x * factor, grads)
            steps, inner = rule.update(grads, state.inner, params, value=value * factor, **extra)
            pairs = zip(jax.tree.leaves(steps), jax.tree.leaves(adam), strict=True)
            rates = [_rms(step) / (_rms(one) + 1e-30) for step, one in pairs]
            return steps, Observed(state.step + 1, inner, adam_state, jnp.stack(rates))

        return optax.GradientTransformationExtraArgs(init, update)

    return optimizer._replace(bind=bind)


def measure(
    task: Task,
    optimizer: LearnedOptimizer,
    variants: dict[str, Variant],
    num_steps: int,
    num_seeds: int,
) -> dict[str, Measured]:
    """The same runs under every variant, one program for all."""
    system = inner_training(task, observed(optimizer, num_steps // 2))

    def one(variant, key):
        key_init, key_data = jax.random.split(key)

        def step(state, key):
            state, loss = system.step(variant, state, key)
            return state, (loss, state.opt_state.rates)

        state = system.init(variant, key_init, num_steps)
        return jax.lax.scan(step, state, jax.random.split(key_data, num_steps))[1]

    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *variants.values())
    over_seeds = jax.vmap(one, (None, 0))
    keys = Starts(task).keys(SEED, num_seeds)
    losses, rates = jax.jit(lambda v: jax.lax.map(lambda x: over_seeds(x, keys), v))(stacked)
    losses, rates = np.asarray(losses, np.float64), np.median(rates, axis=1)
    return {name: Measured(losses[i], rates[i]) for i, name in enumerate(variants)}


def lengths(task, controller, theta, setting) -> dict[int, np.ndarray]:
    """Rates of runs of the other lengths, by length."""
    others = [n for n in setting.lengths if n != setting.horizon]
    variant = {"trained": Variant(theta)}
    return {
        n: measure(task, controller, variant, n, setting.num_seeds)["trained"].rate
        for n in progress(others, desc="lengths")
    }


def log_losses(task: Task, losses: np.ndarray) -> np.ndarray:
    """``[..., seeds, steps]`` to the log-loss of the last tenth, ``[..., seeds]``."""
    starts = Starts(task)
    constants = jnp.asarray(starts.constant(starts.keys(SEED, losses.shape[-2])))
    tail = losses[..., -max(1, losses.shape[-1] // 10) :].mean(axis=-1)
    return np.asarray(log_share(jnp.asarray(tail), constants), np.float64)


def ablations(theta: Any) -> dict[str, Any]:
    """Theta without each input, each control, and without all inputs."""
    hidden, last = theta["params"]["hidden"], theta["params"]["last"]
    found = {}
    for i, name in enumerate(INPUTS):
        found[name] = _with(theta, hidden=hidden | {"kernel": hidden["kernel"].at[i].set(0)})
    found[ALL] = _with(theta, hidden=hidden | {"kernel": 0 * hidden["kernel"]})
    for i, name in enumerate(CONTROLS):
        off = {"kernel": last["kernel"].at[:, i].set(0), "bias": last["bias"].at[i].set(0)}
        found[f"control: {name}"] = _with(theta, last=off)
    return found


def ablate(controller, variants, setting, known, data_dir) -> dict[str, np.ndarray]:
    """The rise of the log-loss over the trained theta's, ``[tasks, seeds]`` of each other one."""
    rises = []
    for name in progress(setting.ablated, desc="ablations"):
        task = zoo_task(name).make(data_dir)
        found = known.get(name) or measure(
            task, controller, variants, setting.horizon, setting.num_seeds
        )
        of = {variant: log_losses(task, found[variant].losses) for variant in variants}
        rises.append({variant: of[variant] - of["trained"] for variant in variants})
    return {v: np.stack([rise[v] for rise in rises]) for v in variants if v != "trained"}


def adam_losses(task, setting) -> dict[str, Any]:
    """Adam's median losses at its best rate, with a spike in the middle and without."""
    thetas = {value: theta_of(Setting(value, COSINE)) for value in ADAM.values}
    variants = {f"{v:g}": Variant(x) for v, x in thetas.items()}
    variants |= {f"{v:g}, spiked": Variant(x, spike=SPIKE) for v, x in thetas.items()}
    found = measure(task, ADAM.optimizer(), variants, setting.horizon, setting.num_seeds)
    finals = {v: log_losses(task, found[f"{v:g}"].losses).mean() for v in thetas}
    best = min(finals, key=lambda value: finals[value])
    return {
        "Adam's rate": best,
        "Adam": np.median(found[f"{best:g}"].losses, axis=0),
        "Adam, spiked": np.median(found[f"{best:g}, spiked"].losses, axis=0),
    }


# What is claimed.


def rate_claims(rates, setting, kernel) -> list[Claim]:
    trained = rates["trained", setting.horizon][:, kernel]
    cosine = rates["untrained", setting.horizon][:, kernel]
    at = int(0.75 * setting.horizon)
    share, own = (_smooth(x)[at] / _smooth(x).max() for x in (trained, cosine))
    finals = {n: rates["trained", n] for n in setting.lengths}
    last = max(float(x[-1].max() / x.max()) for x in finals.values())
    return [
        Claim(
            "It starts faster than the rule it began as: the largest rate of the widest tensor is "
            "above the untrained one's.",
            bool(_smooth(trained).max() > _smooth(cosine).max()),
            f"{_smooth(trained).max():.3f} and {_smooth(cosine).max():.3f}; three quarters on it "
            f"is at {share:.0%} of its peak, the untrained rule at {own:.0%}",
        ),
        Claim(
            "It comes to rest by itself at every length: the last rates are below a tenth of the "
            "largest.",
            last < 0.1,
            f"at most {last:.1%} for lengths {', '.join(map(str, setting.lengths))}",
        ),
    ]


def ablation_claims(rows) -> list[Claim]:
    by = {row["held at 0"]: row for row in rows}
    least = by[ALL]["rise"] - 2 * by[ALL]["its error"]
    untrained = by["untrained"]["rise"] - 2 * by["untrained"]["its error"]
    order = sorted(INPUTS, key=lambda name: -by[name]["rise"])
    most = [f"{name} {by[name]['rise']:.3f}" for name in order[:4]]
    return [
        Claim(
            "It listens: deaf to all inputs it is worse by more than two standard errors.",
            least > 0,
            f"rise of the log-loss {by[ALL]['rise']:.3f} +- {by[ALL]['its error']:.3f}; of single "
            f"inputs most: {', '.join(most)}",
        ),
        Claim(
            "Untrained, at its own base rate, the rule is worse by more than two standard errors.",
            untrained > 0,
            f"{by['untrained']['rise']:.3f} +- {by['untrained']['its error']:.3f}",
        ),
    ]


def disturbance_claims(spikes, scaled) -> list[Claim]:
    tail = max(1, len(spikes["Adam"]) // 10)
    rise = {
        name: np.log(spikes[f"{name}, spiked"][-tail:].mean() / spikes[name][-tail:].mean())
        for name in ("controller", "Adam")
    }
    plain = scaled["1"]
    early = slice(0, plain.shape[1] // 10)
    apart = max(float(np.max(np.abs(x[:, early] / plain[:, early] - 1))) for x in scaled.values())
    return [
        Claim(
            "A spike of the loss in the middle of the run costs it at the end at most a tenth more "
            "than it costs Adam.",
            bool(rise["controller"] < rise["Adam"] + 0.1),
            f"log of the median final losses' ratio {rise['controller']:.3f}; Adam "
            f"{rise['Adam']:.3f}",
        ),
        Claim(
            f"The unit of the loss does not matter: with losses times {SCALES[0]:g} and "
            f"{SCALES[-1]:g} the first {EARLY} steps are the same to 1e-3.",
            apart < 1e-3,
            f"largest relative difference {apart:.1e}",
        ),
    ]


def ablation_rows(changes) -> list[dict[str, Any]]:
    """Means over tasks of the rises, and standard errors of their means over seeds."""
    rows = []
    for name, rises in changes.items():
        of_tasks = [estimate(runs) for runs in rises]
        error = float(np.sqrt(np.sum([x.error**2 for x in of_tasks])) / len(of_tasks))
        mean = float(np.mean([x.mean for x in of_tasks]))
        rows.append({"held at 0": name, "rise": mean, "its error": error})
    return rows


# What is drawn.


def draw(rates, layers, names, kernel, rows, spikes, scaled, setting) -> Figure:
    """Rates by layer and by length; ablations; a spike; other units."""
    figure, grid = plots.panels(3, (11, 6.4), rows=2)
    (by_layer, by_length, spike), (inputs, controls, units) = grid
    time = (np.arange(setting.horizon) + 1) / setting.horizon
    drawn = sorted(range(len(names)), key=lambda i: -names[i][1])[:5]
    for i in sorted(drawn):
        by_layer.plot(time, _smooth(layers[:, i]), label=names[i][0], lw=1.2)
    cosine = _smooth(rates["untrained", setting.horizon][:, kernel])
    by_layer.plot(time, cosine, "k--", lw=1, label=f"{names[kernel][0]}, untrained")
    by_layer.set(xlabel="share of the run", ylabel="rate", title="The rate, by tensor")
    by_layer.legend(fontsize=6.5)
    for length in setting.lengths:
        time = (np.arange(length) + 1) / length
        by_length.plot(
            time, _smooth(rates["trained", length][:, kernel]), label=f"{length:,} steps"
        )
    by_length.set(xlabel="share of the run", ylabel="rate", title=f"The rate of {names[kernel][0]}")
    by_length.legend(loc="lower center", fontsize=7)
    for name, color in (("controller", plots.BLUE), ("Adam", plots.VERMILION)):
        spike.plot(spikes[name], color=color, lw=1, label=name)
        spike.plot(spikes[f"{name}, spiked"], color=color, lw=1, ls=":", label=f"{name}, spiked")
    spike.axvline(spikes["at"], color="0.7", lw=0.8)
    spike.set(yscale="log", xlabel="inner step", ylabel="training loss", title="A spike")
    spike.legend(fontsize=7)
    by = {row["held at 0"]: row for row in rows}
    _bars(inputs, {name: by[name] for name in (*INPUTS, ALL)}, "An input held at 0")
    of = {name: by[f"control: {name}"] for name in CONTROLS} | {"all": by["untrained"]}
    _bars(controls, of, "A control held at 0")
    for (name, losses), style in zip(scaled.items(), ("-", "--", ":"), strict=True):
        units.plot(np.median(losses, axis=0), style, lw=1.2, label=f"times {name}")
    units.set(yscale="log", xlabel="inner step", ylabel="loss over its factor", title="Other units")
    units.legend()
    return figure


def _bars(axes, rows, title) -> None:
    names = list(rows)
    rises, errors = ([rows[n][field] for n in names] for field in ("rise", "its error"))
    axes.barh(names, rises, xerr=2 * np.asarray(errors), color=plots.SKY, ecolor="0.3")
    axes.invert_yaxis()
    axes.tick_params(axis="y", labelsize=7)
    axes.axvline(0, color="k", lw=0.6)
    axes.set(xlabel="rise of the log-loss", title=title)


def leaf_names(task: Task) -> list[tuple[str, int]]:
    """Names of the parameters, and their sizes."""
    key = jax.random.key(0)
    spec = jax.eval_shape(lambda: task.init(task.sample(key), key))
    return [(name.removeprefix("params/"), leaf.size) for name, leaf in leaves.named(spec)]


def _with(theta: Any, **layers: Any) -> Any:
    return {"params": theta["params"] | layers}


def _smooth(x: np.ndarray) -> np.ndarray:
    """A running mean over a twentieth of the run."""
    width = max(1, len(x) // 20)
    padded = np.pad(x, (width // 2, width - 1 - width // 2), mode="edge")
    return np.convolve(padded, np.ones(width) / width, mode="valid")


def _rms(x: jax.Array) -> jax.Array:
    return jnp.sqrt(jnp.mean(x * x))


def _plain(x: Any) -> Any:
    return x.tolist() if isinstance(x, np.ndarray) else x


STUDY = Study("what the trained controller does over time, and what it listens to", 8.0, run)
