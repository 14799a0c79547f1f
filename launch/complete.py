"""Completes the words of the commands in a shell.

  eval "$(learned-opt-complete --script)"      # bash; in ~/.bashrc to have it always
  autoload -U bashcompinit && bashcompinit && eval "$(learned-opt-complete --script)"   # zsh

Then TAB completes the flags of learned-opt-train and its like, fields (--cfg.inner.<TAB>), and
names: of tasks, optimizers, estimators, presets, suites, studies (--cfg.task=<TAB>). Names are read
from the source, so that nothing slow is imported; fields of what is chosen (--cfg.task.<TAB>) take
a second or two.
"""

import ast
import dataclasses
import importlib
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

COMMANDS = (
    "train", "evaluate", "report", "sweep", "demo", "describe", "replay", "reproduce", "benchmark",
    "rollout",
)  # fmt: skip
# Of those with a configuration: its class, and whether there are presets.
CONFIGURED = {
    "train": ("launch.config", "Config"),
    "sweep": ("launch.config", "Config"),
    "demo": ("launch.config", "Config"),
    "evaluate": ("launch.evaluate", "EvaluationConfig"),
}
# Where names are written: by kind, the file and the dict in it.
_WRITTEN = {
    "TaskConfig": ("tasks/__init__.py", "TASKS"),
    "OptimizerConfig": ("learned_opt/weights.py", "OPTIMIZERS"),
    "EstimatorConfig": ("meta_train/estimators/__init__.py", "ESTIMATORS"),
    "MetaOptimizerConfig": ("meta_train/meta_optimizers.py", "META_OPTIMIZERS"),
}

SCRIPT = r"""_learned_opt_complete() {
  local line="${COMP_LINE:0:COMP_POINT}" word
  word="${line##* }"
  local IFS=$'\n'
  COMPREPLY=($(learned-opt-complete "$line" 2>/dev/null))
  # Bash takes what follows the last = for the word.
  if [[ "$word" == *=* && "${COMP_WORDBREAKS}" == *=* ]]; then
    COMPREPLY=("${COMPREPLY[@]#"${word%=*}="}")
  fi
}
complete -o nospace -o default -F _learned_opt_complete"""


def completions(line: str) -> list[str]:
    """What the last word of a command line may become; all of it, from its first letter on."""
    words = line.split(" ")
    name = Path(words[0]).name.removeprefix("learned-opt-")
    if name not in COMMANDS or len(words) < 2:
        return []
    word = words[-1]
    if "=" in word:
        flag, _, given = word.partition("=")
        found = [f"{flag}={value}" for value in values(flag.lstrip("-"))]
        if flag == "--vary":  # A field, as in a word of its own, without what begins one.
            fields = flags_of(name, f"--{given}", words)
            found = [f"{flag}={x.removeprefix('--')}" for x in fields if x.startswith("--cfg.")]
    elif not word.startswith("-"):
        found = positional(name)
    else:
        found = flags_of(name, word, words)
    return sorted(entry for entry in found if entry.startswith(word))


def values(name: str) -> Iterable[str]:
    """What a flag or field may be, where that is known."""
    from launch import config as cfg

    written = {
        "cfg.task": "TaskConfig",
        "cfg.optimizer": "OptimizerConfig",
        "cfg.estimator": "EstimatorConfig",
        "cfg.estimator.base": "EstimatorConfig",
        "cfg.meta": "MetaOptimizerConfig",
    }
    if name in written:
        return names(written[name])
    if name in ("suite", "cfg.validation"):
        from launch.suites import SUITES, TO_CHOOSE_BY

        return TO_CHOOSE_BY if name == "cfg.validation" else SUITES
    if name in ("optimizer", "cfg.init_from"):
        packaged = (Path(__file__).parent.parent / "learned_opt/pretrained").glob("*/config.json")
        return [file.parent.name for file in packaged]
    if name == "preset":
        return [*cfg.preset_names(), *(f"{x}_digits" for x in names("OptimizerConfig"))]
    chosen: dict[str, Iterable[str]] = {
        "cfg.trains": cfg.TRAINS,
        "cfg.wandb_mode": cfg.WANDB_MODES,
        "cfg.inner.meta_loss": cfg.META_LOSSES,
        "cfg.inner.reduction": cfg.REDUCTIONS,
        "cfg.inner.scale": cfg.SCALES,
        "choose_by": ("training", "validation"),
    }
    return chosen.get(name, ())


def positional(name: str) -> list[str]:
    """Words without a flag that a command takes."""
    if name == "reproduce":
        from launch.reproduce import study_names

        return study_names()
    return names("OptimizerConfig") if name == "describe" else []


def flags_of(name: str, word: str, words: list[str]) -> list[str]:
    """The flags of a command, and the fields of its configuration, as far as ``word`` asks.

    Of a thing that ``words`` choose (``--cfg.task=quadratic``) the fields are its own; of one that
    they do not, those of all.
    """
    from absl import flags

    from launch import choices

    module = importlib.import_module(f"launch.{name}")
    command_line = importlib.import_module("launch.command_line")
    known = flags.FLAGS.flags_by_module_dict()
    own = [*known.get(module.__name__, []), *known[command_line.__name__]]
    # Paths are defined by one function, so absl does not know whose they are.
    text = Path(module.__file__ or "").read_text()
    shared = ("workdir", "data_dir")
    defined = re.findall(r'define_paths?\(\s*"(\w+)"', text)
    own += [f for f in known["launch.path_flags"] if f.name in (*shared, *defined)]
    found = [f"--{flag.name}{'' if flag.boolean else '='}" for flag in own]
    if name not in CONFIGURED:
        return found
    if name != "evaluate":
        found.append("--preset=")
    where, cls = CONFIGURED[name]
    config: Any = getattr(importlib.import_module(where), cls)
    chosen = tuple(f"--cfg.{kind}." for kind in ("task", "optimizer", "estimator", "meta"))
    if name != "evaluate" and word.startswith(chosen):
        part = word.split(".")[1]
        kind = choices.KINDS[f"{'MetaOptimizer' if part == 'meta' else part.title()}Config"]
        given = [each.partition("=")[2] for each in words if each.startswith(f"--cfg.{part}=")]
        things = [thing for thing in given[-1:] if thing in kind.things()] or kind.things()
        fields = {
            field.name
            for thing in things
            for field in dataclasses.fields(choices.find(kind, thing))
        }
        return [f"--cfg.{part}.{field}=" for field in fields]
    return [*found, *(f"--{path}=" for path in choices.plain_paths(config, "cfg"))]


def names(kind: str) -> list[str]:
    """The names of a kind's dict, as its file says."""
    file, variable = _WRITTEN[kind]
    text = (Path(__file__).parent.parent / file).read_text()
    for node in ast.parse(text).body:
        if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == variable:
            assert isinstance(node.value, ast.Dict)
            return [ast.literal_eval(key) for key in node.value.keys if key is not None]
    raise RuntimeError(f"{file} has no dict {variable}")


def cli() -> None:
    """The installed command."""
    given = sys.argv[1:]
    if given == ["--script"]:
        print(SCRIPT, " ".join(f"learned-opt-{name}" for name in COMMANDS))
    elif len(given) == 1 and not given[0].startswith("-"):
        print("\n".join(completions(given[0])))
    else:
        print((__doc__ or "").strip())
        sys.exit(0 if given in (["--help"], ["-h"]) else 2)


if __name__ == "__main__":
    cli()
