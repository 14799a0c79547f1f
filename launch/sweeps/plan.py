"""The runs of a sweep: a grid of values or draws at random, each with several seeds."""

import itertools
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from launch import choices
from launch import config as cfg
from launch.config import Config

# Of what --random draws, besides the number of the run.
_SEED = 0
# Draws in a row that may be known or no configuration.
_TRIES = 100
_RANGE = re.compile(r"([^,()]+)\.\.([^,()]+)$")


class Run(NamedTuple):
    """A run: its number, the folder's name, the values it varies, its seed and configuration."""

    number: int
    name: str
    values: dict[str, str]
    seed: int
    config: Config

    @property
    def words(self) -> list[str]:
        """What is added to the words that all runs share."""
        return [*(f"--{key}={value}" for key, value in self.values.items()),
                f"--cfg.seed={self.seed}"]  # fmt: skip


# By field: values listed, or the ends of a range.
Fields = dict[str, list[str] | tuple[float, float]]


def plan(base: Config, vary: Sequence[str], seeds: int, draws: int | None = None) -> list[Run]:
    """All runs.

    Args:
      base: the configuration of all runs, but for what they vary.
      vary: ``cfg.a.b=VALUE,VALUE,...``, or ``cfg.a.b=LOW..HIGH`` for ``draws`` at random.
      seeds: runs of each setting; from ``base.seed`` on.
      draws: settings to draw; None: all combinations.

    Raises:
      ValueError: naming what is wrong, with the field.
    """
    fields = varied(vary)
    if draws is None:
        ranges = [name for name, values in fields.items() if isinstance(values, tuple)]
        if ranges:
            raise ValueError(
                f"--vary={ranges[0]}=LOW..HIGH is for --random=N and --search=N; list its values."
            )
        every: Any = itertools.product(*fields.values())
        settings = [dict(zip(fields, values, strict=True)) for values in every]
    else:
        settings = list(itertools.islice(_draws(base, fields), draws))
        if len(settings) < draws:
            raise ValueError(
                f"--random={draws}: --vary has {len(settings)} settings that differ and are "
                f"configurations, as far as {_TRIES} draws in a row can tell; ask for so many."
            )
    runs = runs_of(base, settings, seeds)
    if len({repr(run.config) for run in runs}) < len(runs):
        raise ValueError("--vary must give each value once; two runs would be the same.")
    return runs


def _draws(base: Config, fields: Fields) -> Iterator[dict[str, str]]:
    """Settings at random that differ, until a hundred draws in a row gave none.

    With a range among the fields, what is no configuration is drawn anew (an odd number of
    particles, say).
    """
    known: set[str] = set()
    number = failures = 0
    refused = None
    while failures < _TRIES:
        setting = _drawn(base, fields, number)
        number, failures = number + 1, failures + 1
        try:
            config = repr(_config(base, setting, base.seed))
        except ValueError as error:
            if all(isinstance(values, list) for values in fields.values()):
                raise
            refused = error
            continue
        if config not in known:
            known.add(config)
            failures = 0
            yield setting
    if refused and not known:
        raise refused


def varied(vary: Sequence[str]) -> Fields:
    """What ``--vary`` says: by field the values listed, or the ends of a range.

    Raises:
      ValueError: as ``plan``.
    """
    fields = dict(map(_field, vary))
    if len(fields) < len(vary):
        raise ValueError("--vary must name each field once; give all its values together.")
    if not fields:
        raise ValueError(
            "--vary is missing: --vary=cfg.meta.learning_rate=1e-4,1e-3 says what differs "
            "between runs."
        )
    if "cfg.seed" in fields:
        raise ValueError("--vary=cfg.seed: give --seeds=N, the runs of each setting.")
    return fields


def runs_of(
    base: Config, settings: Sequence[dict[str, str]], seeds: int, first: int = 0
) -> list[Run]:
    """The runs of settings, numbered from ``first``; those of a setting stand together.

    Raises:
      ValueError: on a setting that is no configuration, naming ``--vary``.
    """
    every = [(s, seed) for s in settings for seed in range(base.seed, base.seed + seeds)]
    return [
        Run(first + i, _name(setting, seed), setting, seed, _config(base, setting, seed))
        for i, (setting, seed) in enumerate(every)
    ]


def _field(word: str) -> tuple[str, list[str] | tuple[float, float]]:
    name, equals, text = word.removeprefix("--").partition("=")
    # At commas outside of brackets.
    values = [value.strip() for value in re.split(r",(?![^()]*\))", text)]
    if not equals or not all(values) or not name.startswith("cfg."):
        raise ValueError(f"--vary must be cfg.a.b=VALUE,VALUE,..., got {word!r}.")
    if len(values) > 1 or not (found := _RANGE.match(text)):
        return name, values
    try:
        low, high = map(float, found.groups())
    except ValueError:
        low = high = 0.0
    if not 0 < low < high < math.inf:
        raise ValueError(
            f"--vary={name}=LOW..HIGH needs finite numbers with 0 < LOW < HIGH, got {text}."
        )
    return name, (low, high)


def _drawn(base: Config, fields: Fields, number: int) -> dict[str, str]:
    """Values of a setting at random: of a list each alike, of a range by its logarithm.

    The same for a number whatever else is drawn, so a sweep may be asked for more.
    """
    found = {}
    for place, (name, values) in enumerate(fields.items()):
        random = np.random.default_rng([_SEED, number, place])
        if isinstance(values, list):
            found[name] = values[random.integers(len(values))]
            continue
        drawn = float(np.exp(random.uniform(*np.log(values))))
        found[name] = str(round(drawn)) if is_whole(base, name) else f"{drawn:.4g}"
    return found


def is_whole(base: Config, name: str) -> bool:
    value: Any = base
    for part in name.split(".")[1:]:
        value = getattr(value, part, None)
    return isinstance(value, int)


def _config(base: Config, setting: dict[str, str], seed: int) -> Config:
    words = [*(f"--{name}={value}" for name, value in setting.items()), f"--cfg.seed={seed}"]
    node, _ = choices.take_words(words, "cfg")
    try:
        choices.check_plain(cfg.Config, node, "cfg")
        config = choices.apply_words(base, node, "cfg")
        # What functions refuse, as their own code knows it, before any run starts.
        if config.trains == "optimizer":
            config.optimizer.make()
        config.meta.make(config.num_steps)
        return config
    except ValueError as error:
        at = ", ".join(f"{name}={value}" for name, value in setting.items())
        raise ValueError(f"--vary gives {at}, which is refused: {error}") from None


def _name(setting: dict[str, str], seed: int) -> str:
    """The folder's: short names of fields, as far as they differ, and the seed."""
    short = {name: name.rpartition(".")[2] for name in setting}
    if len(set(short.values())) < len(short):
        short = {name: name.removeprefix("cfg.") for name in setting}
    parts = [f"{short[name]}={value}" for name, value in setting.items()]
    return re.sub(r"[^\w.,=()+-]", "_", ",".join([*parts, f"seed={seed}"]))
