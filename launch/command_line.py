"""What the commands share: flags, help, and messages; a preset as the base, values on top."""

import contextlib
import errno
import os
import re
import shutil
import signal
import site
import sys
import sysconfig
import textwrap
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# Keep absl's C++ libraries from logging before the program says anything.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

from absl import app, flags, logging

from launch import choices
from launch import config as cfg
from launch.own_modules import imported
from launch.path_flags import define_path, define_paths

# A disk that is full or fails; EX_IOERR.
EXIT_DISK = 74
_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EFBIG}

WORKDIR = define_paths("workdir", "Folder of what the command reads and writes.")
DATA_DIR = define_path("data_dir", "TFDS data folder (default: TFDS's own).")
IMPORT = flags.DEFINE_multi_string(
    "import", [], "Module to import first, for things of yours that a file names."
)
QUIET = flags.DEFINE_bool("quiet", False, "Neither progress nor remarks, only results and faults.")


def run(
    main: Callable[[Any], int],
    cls: type = cfg.Config,
    preset: str | None = "default",
    doc: str | None = None,
) -> None:
    """Parses the flags and runs ``main(config)``; a ``ValueError`` ends as one clear message.

    Args:
      main: ``config -> exit code``; what is slow to import, it imports.
      cls: dataclass of the words ``--cfg.a.b=value``.
      preset: default of ``--preset``, the base that the words change; None for a command without
        presets, whose base is ``cls()``.
      doc: what ``--help`` says first.
    """
    if preset is not None:
        flags.DEFINE_string(
            "preset",
            preset,
            f"Base configuration: {', '.join(cfg.preset_names())}, OPTIMIZER_digits for any of "
            "the optimizers, or a module with get_config.",
        )
    config = None

    def parse(argv):
        nonlocal config
        with messages(cls):
            node, rest = choices.take_words(argv, "cfg")
            helping, rest = take_help(rest)
            choices.check_plain(cls, node, "cfg")
            rest = parse_flags(rest, cls)
            if len(rest) > 1:
                raise ValueError(f"Unexpected arguments {rest[1:]}; every option is --name=value.")
            import_modules()
            base = cls() if preset is None else cfg.load_preset(flags.FLAGS.preset)
            config = choices.apply_words(base, node, "cfg")
            if helping:
                print(help_text(config, doc))
                sys.exit(0)
            return rest

    def start(argv):
        del argv
        quiet()
        sys.stdout, sys.stderr = _Forgiving(sys.stdout), _Forgiving(sys.stderr)
        with messages(cls):
            return main(config)

    app.run(start, flags_parser=parse)


def run_plain(main: Callable[[list[str]], int | None], doc: str | None) -> None:
    """The same for a command without a configuration: ``main(words that are no flags)``."""

    def parse(argv):
        helping, rest = take_help(argv)
        rest = parse_flags(rest)
        if helping:
            with messages():
                print(help_text(None, doc))
            sys.exit(0)
        return rest

    def start(argv):
        quiet()
        with messages():
            return main(argv[1:])

    app.run(start, flags_parser=parse)


def take_help(argv: list[str]) -> tuple[bool, list[str]]:
    """Whether help is asked for, and the other words."""
    asks = {"--help", "-help", "-h", "--helpfull", "-?"}
    return bool(asks & set(argv)), [word for word in argv if word not in asks]


def workdirs() -> list[str]:
    """The values of ``--workdir``.

    Raises:
      ValueError: if there is none.
    """
    if not WORKDIR.value:
        raise ValueError("--workdir=FOLDER is missing: what the command reads and writes is there.")
    return WORKDIR.value


def required_workdir() -> str:
    """The value of ``--workdir``.

    Raises:
      ValueError: if it was not given, or several times.
    """
    workdirs()
    return given_workdir() or ""


def given_workdir() -> str | None:
    """The value of ``--workdir``, None without one.

    Raises:
      ValueError: if it was given several times.
    """
    given = WORKDIR.value or []
    if len(given) > 1:
        raise ValueError(f"--workdir must be given once, got {', '.join(given)}; leave one.")
    return given[0] if given else None


def command(name: str) -> str:
    """How to start another command of ours, as this one was started."""
    if os.path.basename(sys.argv[0]).startswith("learned-opt-"):
        return f"learned-opt-{name}"
    return f"python -m launch.{name}"


def import_modules() -> None:
    """Imports what ``--import`` names."""
    if "" not in sys.path:  # Modules of the user's, as with `python -m`; after ours.
        sys.path.append("")
    for name in IMPORT.value:
        try:
            imported(name)
        except ValueError as error:
            raise ValueError(f"--import {error}") from error.__cause__


def quiet() -> None:
    """Of absl warnings only, unless the user chose; ``app.run`` raises the verbosity to INFO.

    With ``--quiet`` neither progress nor remarks of ours.
    """
    if QUIET.value:
        from meta_train.progress import be_quiet

        be_quiet()
    if not any(word.lstrip("-").startswith(("verbosity", "v=")) for word in sys.argv[1:]):
        logging.set_verbosity(logging.WARNING)


def parse_flags(argv: list[str], cls: type | None = None) -> list[str]:
    """Parses, lists the shared flags in ``--help`` too, and returns what is no flag."""
    for name in ("workdir", "data_dir", "preset"):
        if name in flags.FLAGS:
            flags.FLAGS.register_key_flag_for_module(argv[0], flags.FLAGS[name])
    with messages(cls):
        check_known(argv[1:], cls)
        return flags.FLAGS(argv)


def check_known(words: list[str], cls: type | None) -> None:
    """Raises ``ValueError`` on the first word that is no flag, before any flag reads its value."""
    for word in words:
        name = word.lstrip("-").partition("=")[0]
        if word == "--":
            return
        if word.startswith("-") and not {name, name.removeprefix("no")} & set(flags.FLAGS):
            raise ValueError(_unknown_flag(name, cls))


@contextlib.contextmanager
def messages(cls: type | None = None) -> Iterator[None]:
    """Turns a ``ValueError`` or a wrong flag into a message on stderr and exit code 2.

    Output that nobody reads any more ends the command in silence.

    Args:
      cls: dataclass of the words ``--cfg.a.b=value``, among which an unknown flag may be meant.
    """
    try:
        yield
    except flags.UnrecognizedFlagError as error:
        sys.exit(_complain(_unknown_flag(error.flagname, cls)))
    except flags.IllegalFlagValueError as error:
        sys.exit(_complain(_wrong_value(str(error))))
    except (ValueError, flags.Error) as error:
        sys.exit(_complain(re.sub(r"^flag ", "", str(error)) + _raised_outside(error)))
    except (OverflowError, MemoryError) as error:
        if not (words := _of_size(error)):
            raise
        sys.exit(_complain(words))
    except OSError as error:
        if words := of_full_disk(error):
            print(f"error: {words}", file=sys.stderr)
            sys.exit(EXIT_DISK)
        if not isinstance(error, BrokenPipeError):
            raise
        # Who reads the output has gone (`| head`); Python would write the rest when it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)


def _raised_outside(error: Exception) -> str:
    """Where code of somebody's own raised it; empty if this library or a package did."""
    frames = traceback.extract_tb((error.__cause__ or error).__traceback__)
    where = Path(frames[-1].filename) if frames else Path()
    ours = Path(__file__).parent.parent
    packages = (*(ours / name for name in choices.OURS), *map(Path, site.getsitepackages()))
    installed = (*packages, Path(sysconfig.get_path("stdlib")))
    if not where.is_file() or any(where.is_relative_to(folder) for folder in installed):
        return ""
    return f" (raised in {where}, line {frames[-1].lineno})"


def _of_size(error: Exception) -> str:
    """What to say of an array with more entries than any has (JAX's error), or of more gibibytes
    than this machine has (NumPy's); empty if it is another error, such as that of a full memory.
    """
    words = " ".join(str(error).split())
    if not re.search(r"parsing an argument to a jitted|Unable to allocate .* [GTPEZY]iB", words):
        return ""
    return f"a size asked for is beyond this machine ({words[:200]}); make it smaller."


def of_full_disk(error: OSError) -> str:
    """What to say of a disk that cannot be written; empty if it is another error."""
    if error.errno not in _DISK:
        return ""
    where = f" at {error.filename}" if error.filename else ""
    return (
        f"the disk cannot be written{where} ({error.strerror}); make room, and run the same "
        "command again."
    )


class _Forgiving:
    """A stream whose words may be lost, as on a full disk, without ending the program."""

    def __init__(self, stream: Any):
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with self._losing():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._losing():
            self._stream.flush()

    @contextlib.contextmanager
    def _losing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno not in _DISK:
                raise


def _complain(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 2


def _own_flags() -> dict[str, flags.Flag]:
    """The flags of the commands, absl's own left out."""
    return {
        flag.name: flag
        for module, known in flags.FLAGS.flags_by_module_dict().items()
        for flag in known
        if module.startswith("launch.") or module == sys.argv[0]
    }


def _unknown_flag(name: str, cls: type | None) -> str:
    own = sorted(_own_flags())
    fields = list(choices.plain_paths(cls, "cfg")) if cls else []
    # What is forgotten most is the prefix, so a field's own name counts for the whole.
    by_name = {path.rpartition(".")[2]: path for path in fields} | {flag: flag for flag in own}
    meant = re.search(r"Did you mean '(.*)'", choices.suggest(name, by_name))
    hint = f" Did you mean --{by_name[meant[1]]}?" if meant else ""
    listed = ", ".join(f"--{flag}" for flag in own)
    return f"unknown flag --{name}; the flags are: {listed}{', --cfg.*' if cls else ''}.{hint}"


def _wrong_value(message: str) -> str:
    """absl's message on a value that a flag does not take, in our words."""
    found = re.match(r"flag --(\w+)=(.*?): (.*)$", message, re.S)
    if not found or found[1] not in flags.FLAGS:
        return re.sub(r"^flag ", "", message)
    name, given, reason = found.groups()
    parser = flags.FLAGS[name].parser
    hint = ""
    if isinstance(parser, flags.EnumParser):
        wanted = f"one of {', '.join(parser.enum_values)}"
        hint = choices.suggest(given, parser.enum_values)
    elif isinstance(parser, flags.BooleanParser):
        wanted = "true or false"
    elif isinstance(parser, flags.IntegerParser | flags.FloatParser):
        wanted = "a whole number" if isinstance(parser, flags.IntegerParser) else "a number"
        limits = {"at least": parser.lower_bound, "at most": parser.upper_bound}
        said = [f"{word} {limit}" for word, limit in limits.items() if limit is not None]
        wanted = " ".join([wanted, " and ".join(said)]).rstrip()
    else:
        return reason  # Of a parser of ours.
    return f"--{name} must be {wanted}, got {given!r}.{hint}"


def help_text(config: Any, doc: str | None = None) -> str:
    """What the command does, its flags, and every field of the configuration, if it has one."""
    width = min(shutil.get_terminal_size((100, 24)).columns, 120)
    lines = [(doc or "").strip(), "", "Flags:", ""]
    for name, flag in sorted(_own_flags().items()):
        words = (flag.help or "").partition(";    repeat")[0]  # absl's note on flags given twice
        lines += _entry(f"--{name}", flag.default, words, width)
    if config is None:
        return "\n".join(lines)
    lines += ["", "Configuration, with the values of this command:", ""]
    for flag_name, value, words in choices.describe(config, "cfg"):
        lines += _entry(flag_name, value, words, width)
    return "\n".join(lines)


# Characters of a value from which on help shows only its beginning.
_LONG_VALUE = 200


def _entry(flag: str, value: Any, words: str, width: int) -> list[str]:
    if len(str(value)) > _LONG_VALUE:
        words = f"{words} (Shortened; `{command('train')} --dry_run` shows the whole.)".lstrip()
        value = f"{str(value)[: width - len(flag) - 10]} ..."
    head = f"  {flag}={value}" if value not in (None, [], "") else f"  {flag}"
    indent = " " * 42
    body = textwrap.wrap(words, width, initial_indent=indent, subsequent_indent=indent)
    if body and len(head) < len(indent) - 1:
        return [head.ljust(len(indent)) + body[0].lstrip(), *body[1:]]
    return [head, *body]
