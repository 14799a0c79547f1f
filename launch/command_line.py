"""Flags shared by the commands: a preset as the base, single values on top."""

import dataclasses
import os
import sys
from collections.abc import Callable

# Keep absl's C++ libraries from logging before the program says anything.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from launch import config as cfg

_HELP = f"Base configuration, a file of launch/configs: {cfg.preset_names()}."


def run(main: Callable[[cfg.Config], int], preset: str = "default") -> None:
    """Parses the flags and runs ``main(config)``; a ``ValueError`` ends as one clear message.

    ``--preset`` is read first, so that every ``--cfg.a.b=value`` overrides it.
    """
    holder = None

    def parse(argv):
        nonlocal holder
        first = flags.FlagValues()
        for flag_values in (first, flags.FLAGS):
            flags.DEFINE_string("preset", preset, _HELP, flag_values=flag_values)
        with _messages():
            first(argv, known_only=True)
            holder = config_flags.DEFINE_config_dict(
                "cfg", ConfigDict(dataclasses.asdict(cfg.load_preset(first.preset)))
            )
            rest = app.parse_flags_with_usage(argv)
            if len(rest) > 1:
                raise ValueError(f"Unexpected arguments {rest[1:]}; every option is --name=value.")
            return rest

    def start(argv):
        del argv
        if not any(word.lstrip("-").startswith(("verbosity", "v=")) for word in sys.argv[1:]):
            logging.set_verbosity(logging.WARNING)  # `app.run` raised it to INFO.
        with _messages():
            return main(cfg.from_dict(cfg.Config, holder.value.to_dict()))

    app.run(start, flags_parser=parse)


class _messages:
    """Turns a ``ValueError`` into a message on stderr and exit code 2."""

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        if kind is not None and issubclass(kind, ValueError):
            print(f"error: {error}", file=sys.stderr)
            sys.exit(2)
        if kind is not None and issubclass(kind, KeyError):
            print(f"error: {error.args[0]}", file=sys.stderr)
            sys.exit(2)
        return False
