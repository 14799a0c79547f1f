"""Memory and time of exact hypergradients against the number of training steps."""

from matplotlib.figure import Figure

from launch.benchmarks import reversible as benchmark
from launch.studies.base import Claim, Result, Study
from launch.studies.shared import plots
from meta_train.progress import progress

QUICK_STEPS = (50, 200, 800)
STEPS = (100, 1000, 10_000)
STYLES = {
    "backpropagation": ("C0", "o"),
    "every step recomputed": ("C1", "s"),
    "two nested loops": ("C2", "D"),
    "reversible": ("C3", "*"),
}


def run(quick: bool, data_dir: str | None) -> Result:
    """The benchmark at three lengths, and the checkpointing frontier at the middle one.

    Always on the bundled digits, the benchmark's fixed case: ``data_dir`` changes nothing.
    """
    del data_dir
    steps = QUICK_STEPS if quick else STEPS
    slots = (4, 8, 20) if quick else benchmark.SLOTS
    repeats = 6 if quick else 15
    measured = {}
    for num_steps in progress(steps, desc="steps"):
        candidates = benchmark.methods(num_steps)
        if num_steps == steps[1]:
            candidates |= benchmark.frontier(num_steps, slots)
        measured[num_steps] = benchmark.measure(candidates, num_steps, repeats)
    rows = [row for num_steps in steps for row in measured[num_steps]]
    middle = {row.method: row for row in measured[steps[1]]}
    ours = {num_steps: find(measured[num_steps], "reversible") for num_steps in steps}
    ratio = middle["backpropagation"].temporary_mib / middle["reversible"].temporary_mib
    least = 50 if quick else 200
    # Of a few milliseconds, what surrounds the steps is a large part.
    timed = steps[2] if quick else steps[1]
    fastest = min(row.milliseconds for row in measured[timed])
    slower = ours[timed].milliseconds / fastest
    growth = (ours[steps[2]].temporary_mib - ours[steps[1]].temporary_mib) * benchmark.MIB
    tape_growth = (
        (benchmark.tape(steps[2])["bits"] - benchmark.tape(steps[1])["bits"])
        / 8
        * benchmark.num_parameters()
    )
    dominated = [
        row.method
        for row in middle.values()
        if row.method.startswith("binomial")
        and row.temporary_mib <= ours[steps[1]].temporary_mib
        and row.milliseconds <= ours[steps[1]].milliseconds
    ]
    claims = [
        Claim(
            f"At T = {steps[1]:,} the reversible gradient takes at most 1/{least} of the "
            "temporary memory of backpropagation.",
            ratio >= least,
            f"{middle['backpropagation'].temporary_mib:.1f} MiB / "
            f"{middle['reversible'].temporary_mib:.3f} MiB = {ratio:.0f}",
        ),
        Claim(
            f"At T = {timed:,} it takes at most {2.0 if quick else 1.2} times the processor time "
            "of the fastest method.",
            slower <= (2.0 if quick else 1.2),
            f"{ours[timed].milliseconds:.1f} ms, {slower:.2f} times the fastest",
        ),
        Claim(
            "No choice of checkpoints is both smaller and faster.",
            not dominated,
            f"binomial checkpointing with {', '.join(map(str, slots))} states",
        ),
        Claim(
            "Its temporary memory grows with T through the tape alone (twice at most: a loop "
            "may hold a copy).",
            growth <= 2 * tape_growth + 8 * 4 * (steps[2] - steps[1]),
            f"T = {steps[1]:,} to {steps[2]:,}: {growth / 1e3:.0f} kB, tape {tape_growth / 1e3:.0f}"
            f" kB, per-step scalars {8 * 4 * (steps[2] - steps[1]) / 1e3:.0f} kB at most",
        ),
    ]
    table = [row._asdict() for row in rows]
    caption = (
        f"digits tanh MLP {benchmark.SIZES}, batch {benchmark.BATCH}, T on the axis; one setup; "
        f"the least processor time of at most {repeats} turns"
    )
    return Result(claims, table, draw(measured, steps), {"rows": table}, caption)


def find(rows, method):
    """The row of a method."""
    return next(row for row in rows if row.method == method)


def draw(measured, steps) -> Figure:
    """Memory and time against T, and the frontier at the middle T."""
    figure, (memory, time, both) = plots.panels(3, (11.5, 3.5))
    for method, (color, marker) in STYLES.items():
        rows = [find(measured[num_steps], method) for num_steps in steps]
        line = {"color": color, "marker": marker, "ms": 11 if marker == "*" else 5, "label": method}
        memory.plot(steps, [row.temporary_mib for row in rows], **line)
        time.plot(steps, [1e3 * row.milliseconds / row.steps for row in rows], **line)
    memory.set(ylabel="temporary memory (MiB)", title="Memory", yscale="log")
    time.set(ylabel="processor time per training step (µs)", title="Time", ylim=(0, None))
    memory.legend()
    benchmark.draw_frontier(both, measured[steps[1]])
    both.set_title(f"Memory against time, T = {steps[1]:,}")
    for axes in (memory, time):
        axes.set_xlabel("training steps T")
        plots.steps_axis(axes, steps)
    return figure


STUDY = Study("memory and time of hypergradients: backpropagation, checkpoints, reversal", 3.0, run)
