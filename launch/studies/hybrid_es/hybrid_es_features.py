"""Hybrid-ES: what the poster leaves for the future, each with a check that it works.

python -m launch.reproduce hybrid_es_features --workdir=DIR [--data_dir=DIR]

Adaptive sigma, masks, learned features, other distributions, compression, a cluster of unequal
workers. Where a classifier is trained, candidates are ranked and mirrored, with a gradient
every 10 steps at rate 1, and sigma is in units of the deviation of the gradient's components.
"""

from functools import partial

from launch.studies.base import Result, Study
from launch.studies.hybrid_es import hybrid_training as training
from launch.studies.hybrid_es.future_messages import cluster, compressed, learned
from launch.studies.hybrid_es.future_search import adaptive_sigma, distributions, masks
from launch.studies.hybrid_es.future_work import NUM_STEPS
from launch.studies.shared import plots
from launch.studies.shared.compare import in_parallel

ITEMS = {
    "1 sigma": adaptive_sigma,
    "2 masks": masks,
    "3 learned features": learned,
    "4 distributions": distributions,
    "5 compression": compressed,
    "6 cluster": cluster,
}


def run(quick: bool, data_dir: str | None) -> Result:
    problem = training.problem(data_dir)
    seeds = 1 if quick else 5
    items = in_parallel(
        {name: partial(build, problem, seeds, quick) for name, build in ITEMS.items()}
    )
    figure, panels = plots.panels(3, (11, 6.2), rows=2)
    for axes, (name, item) in zip(panels.flat, items.items(), strict=True):
        item.draw(axes)
        axes.set_title(name)
    table = [
        {"item": name, "measured": what, "value": value, "limit": limit}
        for name, item in items.items()
        for what, value, limit in item.rows
    ]
    data = {name: item.data for name, item in items.items()}
    caption = training.caption(data_dir, NUM_STEPS, f"points and bars: means of {seeds} seeds")
    return Result([item.claim for item in items.values()], table, figure, data, caption)


STUDY = Study("Hybrid-ES: sigma, masks, learned features, samplers, compression, cluster", 3.0, run)
