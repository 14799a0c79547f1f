"""What a reproduction study is: one published experiment, run again, with its claims checked."""

from collections.abc import Callable
from typing import Any, NamedTuple

from matplotlib.figure import Figure


class Claim(NamedTuple):
    """One sentence of a paper, or of ours; whether it held in this run; the numbers it rests on."""

    sentence: str
    holds: bool
    evidence: str


class Result(NamedTuple):
    """What a study returns.

    Attributes:
      claims: the checked claims; the command exits non-zero if one does not hold.
      table: rows to print, each a dict with the same keys.
      figure: the figure to save; axes labelled with units.
      data: everything needed to draw the figure again, JSON-serializable.
      caption: goes under the figure: the task, its horizon, how many seeds (runs, repeats), and
        what bands, bars and lines are.
    """

    claims: list[Claim]
    table: list[dict[str, Any]]
    figure: Figure
    data: dict[str, Any]
    caption: str


class Study(NamedTuple):
    """A reproduction.

    Attributes:
      summary: one line for ``--list``: what it shows and its source.
      minutes: expected time of the full run on 2 cores.
      run: ``(quick, data_dir) -> Result``. ``quick`` finishes within 60 s on 2 cores;
        ``data_dir`` is where downloaded datasets lie (``None``: bundled data only).
        Shows its own progress with ``meta_train.progress``.
      keeps: whether ``run`` also gets the folder of its results, in which it keeps parts of them,
        so that a run that was stopped goes on.
      needs: an extra of ``pyproject.toml`` that it needs besides `train`, if any.
    """

    summary: str
    minutes: float
    run: Callable[..., Result]
    keeps: bool = False
    needs: str = ""
