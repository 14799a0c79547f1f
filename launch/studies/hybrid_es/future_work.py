"""What the items of the poster's future work share."""

from collections.abc import Callable
from typing import Any, NamedTuple

from launch.studies.base import Claim
from launch.studies.hybrid_es.hybrid_training import Recipe
from launch.studies.shared import plots

NUM_STEPS = 300
TUNED = Recipe("select", refresh_every=10, rate=1.0, sigma=3.0)
OURS, OTHER = plots.VERMILION, plots.GRAY  # colours


class Item(NamedTuple):
    """One future-work item: its claim, rows of the table, what to draw and how.

    A row is what was measured, its value and what was expected of it.
    """

    claim: Claim
    rows: list[tuple[str, Any, str]]
    data: dict[str, Any]
    draw: Callable[[Any], None]
