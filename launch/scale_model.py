"""A model of the outer step on 1 to 10,000 hosts, drawn and printed.

  python -m launch.scale_model --figure=docs/figures/scale.png

What a step takes is the simulated cluster's (``cluster_sim``): shares of work on hosts of unequal
speed, then the exchange, round by round. To it come checkpoints, and failures with the work they
cost. What a step is worth falls with the noise of the meta-gradient: with a population of ``P``
inner runs a step makes ``1 / (1 + B / P)`` of the progress of a step along the exact gradient,
where ``B`` is the noise scale, the squared spread of a particle's contribution over the squared
norm of their mean. Source: McCandlish et al. 2018, for gradients of any kind.
"""

import math
from pathlib import Path
from typing import NamedTuple

import numpy as np

from launch import cluster_sim as sim
from launch import command_line
from launch.path_flags import define_path

_FIGURE = define_path("figure", "Where to draw it; none: only the table.")


class Constants(NamedTuple):
    """What the model is fitted to; times in seconds, sizes in bytes.

    Attributes:
      particles: inner runs of a host.
      particle_seconds: of one particle's truncation.
      theta: what the mean over hosts is of.
      particle_bytes: of one particle's state, in a checkpoint.
      write_rate: bytes a second of the first host's checkpoints.
      save_seconds: of a small checkpoint, that the loop waits for.
      noise_scale: ``B`` above, in inner runs.
      restart: from the command to the first step.
      heartbeat: until a lost host is given up.
      latency, bandwidth: of a link.
      spread: standard deviation of the logarithm of the hosts' speeds.
      between_failures: of one host.
    """

    # PES on the digits, on two cores: docs/speed.md, and the case `scale` of 26 November 2026.
    particles: int = 64
    particle_seconds: float = 25e-3 / 32
    theta: float = 7.0e3
    particle_bytes: float = 71e3
    write_rate: float = 6e8
    save_seconds: float = 0.033
    noise_scale: float = 74.0  # Of the first 50 steps; it grows as the gradient falls.
    restart: float = 20.0
    heartbeat: float = 60.0
    # No machine of ours: Ethernet of 10 Gb/s, hosts of one kind, one failure in 60 days.
    latency: float = 50e-6
    bandwidth: float = 1.25e9
    spread: float = 0.05
    between_failures: float = 60 * 86400.0


class OuterStep(NamedTuple):
    """Seconds of one outer step: its parts, and the ``total``."""

    compute: float
    stragglers: float
    exchange: float
    checkpoints: float
    failures: float

    @property
    def total(self) -> float:
        return sum(self)


HOSTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 10000)
# Of Hybrid-ES: a gradient every so many steps, else a seed and costs of so many candidates a host.
REFRESH_EVERY, COSTS = 5, 4 * 8.0


def outer_step(hosts: int, of: Constants, hybrid: bool = False) -> OuterStep:
    """The mean outer step with so many hosts, each with its own ``of.particles``."""
    compute = of.particles * of.particle_seconds
    speed = np.exp(of.spread * np.random.default_rng(0).normal(size=hosts))
    cluster = sim.Cluster(
        np.arange(hosts),
        speed / speed.mean(),
        np.full(hosts, of.latency),
        np.full(hosts, of.bandwidth),
        np.zeros(hosts),
    )

    def seconds(rounds):
        work = sim.Work(hosts, compute, rounds)
        return sim.simulate_step(cluster, work, proportional=False).seconds

    alone = seconds(sim.silence)
    exchange = seconds(sim.halving_doubling(of.theta)) - alone
    if hybrid:
        costs = seconds(sim.all_gather(hosts * COSTS)) - alone
        exchange = (exchange + (REFRESH_EVERY - 1) * costs) / REFRESH_EVERY
    bare = alone + exchange
    # The first host gathers and writes every host's particles.
    size = hosts * of.particles * of.particle_bytes
    save = of.save_seconds + size / of.bandwidth
    mean_time = of.between_failures / hosts
    # Young's interval, which loses as much to checkpoints as to what is done again; but the write
    # of one, in the background, must end before the next.
    interval = max(math.sqrt(2 * save * mean_time), size / of.write_rate, bare)
    checkpoints = bare * save / interval
    again = of.heartbeat + of.restart + interval / 2
    failures = (bare + checkpoints) * again / mean_time
    return OuterStep(compute, alone - compute, exchange, checkpoints, failures)


def worth(hosts: int, of: Constants) -> float:
    """The progress of one outer step, of that along the exact meta-gradient."""
    return 1 / (1 + of.noise_scale / (hosts * of.particles))


def progress_rate(hosts: int, of: Constants, hybrid: bool = False) -> float:
    """Progress a second, of that of one host."""

    def rate(n):
        return worth(n, of) / outer_step(n, of, hybrid and n > 1).total

    return rate(hosts) / rate(1)


def stops_paying(of: Constants, hybrid: bool = False, gain: float = 1.1) -> int:
    """The fewest hosts, a power of two, that twice as many would not speed up by ``gain``."""
    hosts = 1
    while progress_rate(2 * hosts, of, hybrid) >= gain * progress_rate(hosts, of, hybrid):
        hosts *= 2
    return hosts


def table(of: Constants) -> str:
    """A line for some numbers of hosts, in milliseconds and times."""
    lines = ["hosts   compute  stragglers  exchange  checkpoints  failures  total ms  progress"]
    for hosts in (1, 8, 64, 512, 4096, 10000):
        step = outer_step(hosts, of)
        lines.append(
            f"{hosts:<7}{1e3 * step.compute:8.1f}{1e3 * step.stragglers:12.1f}"
            f"{1e3 * step.exchange:10.2f}{1e3 * step.checkpoints:13.2f}"
            f"{1e3 * step.failures:10.2f}{1e3 * step.total:10.1f}{progress_rate(hosts, of):9.1f}x"
        )
    large = of._replace(theta=4e8)
    for name, some in (("theta as measured", of), ("theta of 100 million numbers", large)):
        for kind, hybrid in (("gradients", False), ("seeds and costs", True)):
            step = outer_step(64, some, hybrid)
            lines.append(
                f"{name}, {kind}: exchange {1e3 * step.exchange:.2f} ms on 64 hosts; twice the "
                f"hosts gain less than 10% from {stops_paying(some, hybrid)} hosts on"
            )
    return "\n".join(lines)


def draw(path: Path, of: Constants) -> None:
    """Left the parts of a step against the hosts, right what they are worth."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    steps = [outer_step(n, of) for n in HOSTS]
    parts = [[1e3 * getattr(step, part) for step in steps] for part in OuterStep._fields]
    left.stackplot(HOSTS, parts, labels=OuterStep._fields)
    left.set(xscale="log", xlabel="hosts", ylabel="ms of an outer step", xlim=(1, HOSTS[-1]))
    left.legend(loc="upper left", fontsize=8)
    right.plot(HOSTS, HOSTS, ":", color="black", label="as many times as hosts")
    large = of._replace(theta=4e8)
    for label, some, hybrid, style in (
        ("gradients", of, False, "-"),
        ("seeds and costs", of, True, "--"),
        ("gradients, theta of 400 MB", large, False, "-"),
        ("seeds and costs, theta of 400 MB", large, True, "--"),
    ):
        right.plot(HOSTS, [progress_rate(n, some, hybrid) for n in HOSTS], style, label=label)
    right.set(xscale="log", yscale="log", xlabel="hosts", ylabel="progress a second, of one host's")
    right.set(ylim=(0.01, 200))
    right.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def main(argv) -> None:
    if argv:
        raise ValueError(f"Unexpected arguments {argv}; every option is --name=value.")
    print(table(Constants()))
    if _FIGURE.value:
        draw(Path(_FIGURE.value), Constants())


if __name__ == "__main__":
    command_line.run_plain(main, __doc__)
