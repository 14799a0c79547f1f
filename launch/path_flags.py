"""Flags whose value is a path: read by one function, whatever the command."""

from typing import Any

from absl import flags


class _PathParser(flags.ArgumentParser):
    def __init__(self, flag: str):
        super().__init__()
        self._flag = flag

    def parse(self, argument: Any) -> str:
        from learned_opt.paths import user_path  # With JAX, which takes a second.

        return str(user_path(self._flag, argument))

    def flag_type(self) -> str:
        return "path"


def define_path(name: str, help_text: str, **options: Any) -> flags.FlagHolder:
    """A flag for one path; its value is a string with ``~`` expanded, or None."""
    parser = _PathParser(f"--{name}")
    return flags.DEFINE(
        parser, name, None, help_text, serializer=flags.ArgumentSerializer(), **options
    )


def define_paths(name: str, help_text: str, **options: Any) -> flags.FlagHolder:
    """A flag for paths that may be given several times; their strings are a list, or None."""
    parser = _PathParser(f"--{name}")
    return flags.DEFINE_multi(parser, flags.ArgumentSerializer(), name, None, help_text, **options)
