"""Flags shared by the commands: a preset as the base, single values on top."""

import contextlib
import dataclasses
import os
import sys
from collections.abc import Callable

# Keep absl's C++ libraries from logging before the program says anything.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from launch import config as cfg
from launch.path_flags import define_path

WORKDIR = define_path("workdir", "Folder of what the command reads and writes.")
DATA_DIR = define_path("data_dir", "TFDS data folder (default: TFDS's own).")
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
        with messages():
            first(argv, known_only=True)
            config = dataclasses.asdict(cfg.load_preset(first.preset))
            _check_names(argv[1:], config)
            holder = config_flags.DEFINE_config_dict("cfg", ConfigDict(config))
            rest = parse_flags(argv)
            if len(rest) > 1:
                raise ValueError(f"Unexpected arguments {rest[1:]}; every option is --name=value.")
            return rest

    def start(argv):
        del argv
        quiet()
        with messages():
            return main(cfg.from_dict(cfg.Config, holder.value.to_dict()))

    app.run(start, flags_parser=parse)


def quiet() -> None:
    """Warnings only, unless the user chose; ``app.run`` raises the verbosity to INFO."""
    if not any(word.lstrip("-").startswith(("verbosity", "v=")) for word in sys.argv[1:]):
        logging.set_verbosity(logging.WARNING)


def parse_flags(argv: list[str]) -> list[str]:
    """Parses, lists the shared flags in ``--help`` too, and returns what is no flag."""
    for name in ("workdir", "data_dir", "preset", "cfg"):
        if name in flags.FLAGS:
            flags.FLAGS.register_key_flag_for_module(argv[0], flags.FLAGS[name])
    with messages():
        return flags.FLAGS(argv)


def _check_names(words: list[str], config: dict) -> None:
    """Raises ``ValueError`` for a ``--cfg.a.b`` that is no field, naming those there are."""
    for word in words:
        name = word.lstrip("-").partition("=")[0]
        if not word.startswith("-") or not name.startswith("cfg."):
            continue
        parent, node = "cfg", config
        for part in name.split(".")[1:]:
            if not isinstance(node, dict) or part not in node:
                fields = list(node) if isinstance(node, dict) else []
                raise ValueError(
                    f"--{name}: --{parent} has no field {part!r}; its fields are: "
                    f"{', '.join(fields) or 'none, it is a value'}."
                )
            parent, node = f"{parent}.{part}", node[part]
        if isinstance(node, dict):
            raise ValueError(f"--{name} has fields, set one of them: {', '.join(node)}.")


@contextlib.contextmanager
def messages():
    """Turns a ``ValueError`` or a wrong flag into a message on stderr and exit code 2."""
    try:
        yield
    except flags.UnrecognizedFlagError as error:
        ours = (
            flag.name
            for module, known in flags.FLAGS.flags_by_module_dict().items()
            for flag in known
            if module.startswith("launch.") or module == sys.argv[0]
        )
        valid = ", ".join(f"--{name}" for name in sorted(ours))
        sys.exit(_complain(f"unknown flag --{error.flagname}; the flags are: {valid}."))
    except (ValueError, flags.Error) as error:
        sys.exit(_complain(str(error)))


def _complain(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 2
