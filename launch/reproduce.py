"""Runs a published experiment again and checks its claims.

    python -m launch.reproduce --list
    python -m launch.reproduce NAME --workdir=DIR [--quick] [--data_dir=DIR]

Prints a table and each claim, and writes ``result.json`` and ``figure.png`` to the
working directory. Exits with 3 if a claim does not hold. A study is a file
``launch/studies/FOLDER/NAME.py`` that defines ``STUDY``; see ``launch/studies/base.py``.
"""

import ast
import importlib
import os
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags

import launch.studies
from launch import command_line
from launch.choices import suggest
from launch.command_line import DATA_DIR, required_workdir

if TYPE_CHECKING:
    from launch.studies.base import Result, Study

CLAIM_FAILED = 3  # wrong usage is 2
DPI = 200


def _files() -> dict[str, tuple[str, Path]]:
    """The modules and files below ``launch.studies`` that define ``STUDY``, by their own names.

    As their files say: importing all of them to know what there is would take seconds.
    """
    found: dict[str, tuple[str, Path]] = {}
    for folder in map(Path, launch.studies.__path__):
        for path in sorted(folder.rglob("*.py")):
            if "\nSTUDY = " not in path.read_text():
                continue
            parts = path.relative_to(folder).with_suffix("").parts
            if path.stem in found:
                raise RuntimeError(f"two studies are called `{path.stem}`; the second is {path}.")
            found[path.stem] = ".".join((launch.studies.__name__, *parts)), path
    return dict(sorted(found.items()))


def study_names() -> list[str]:
    """The names of the studies."""
    return list(_files())


def load_study(name: str) -> "Study":
    """The study of that name.

    Raises:
      ValueError: if there is none.
    """
    files = _files()
    if name not in files:
        raise ValueError(
            f"there is no study `{name}`; the studies are: {', '.join(files)}."
            f"{suggest(name, files)}"
        )
    return importlib.import_module(files[name][0]).STUDY


def listing() -> str:
    """One line a study: its name, the expected minutes of the full run, what it shows."""
    studies = {name: _written(path) for name, (_, path) in _files().items()}
    width = max(map(len, studies), default=0)
    return "\n".join(
        f"{name:{width}}  {minutes:5.1f} min  {summary}"
        + (f"; needs the extra {needs}" if needs else "")
        for name, (summary, minutes, needs) in studies.items()
    )


def _written(path: Path) -> tuple[str, float, str]:
    """Summary, minutes and needs of a study, as its file says; importing all takes seconds."""
    (call,) = [
        node.value
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "STUDY"
    ]
    assert isinstance(call, ast.Call)
    given = dict(zip(("summary", "minutes", "run"), call.args, strict=False))
    given |= {word.arg or "": word.value for word in call.keywords}
    needs = ast.literal_eval(given["needs"]) if "needs" in given else ""
    return ast.literal_eval(given["summary"]), ast.literal_eval(given["minutes"]), needs


def reproduce(
    name: str, workdir: str | Path, quick: bool = False, data_dir: str | None = None
) -> "Result":
    """Runs one study, prints what it found and writes ``result.json`` and ``figure.png``.

    Each file appears whole or not at all, the figure first.

    Raises:
      ValueError: if there is no such study.
    """
    import matplotlib

    from launch.studies.shared import plots

    matplotlib.use("agg")
    study = load_study(name)
    folder = Path(workdir)
    start = time.monotonic()
    with matplotlib.rc_context(plots.STYLE):  # Colours by number are looked up at the end.
        result = study.run(quick, data_dir, *([folder] if study.keeps else []))
        seconds = time.monotonic() - start
        folder.mkdir(parents=True, exist_ok=True)
        _write(folder / "figure.png", lambda path: _save_figure(result, path))
    _write(folder / "result.json", lambda path: _save_json(name, quick, seconds, result, path))
    print(format_table(result.table))
    print()
    for claim in result.claims:
        print(f"[{'holds' if claim.holds else 'FAILS'}] {claim.sentence}\n        {claim.evidence}")
    print(f"\n{seconds:.0f} s; wrote {folder / 'result.json'} and {folder / 'figure.png'}")
    return result


def format_table(rows: list[dict[str, Any]]) -> str:
    """Rows with equal keys as aligned columns under their names."""
    if not rows:
        return "(no rows)"
    cells = [list(rows[0])] + [[_cell(value) for value in row.values()] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in cells
    )


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _write(path: Path, save: Callable[[Path], None]) -> None:
    """Writes to a temporary file beside ``path``, then renames it into place."""
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        save(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _save_figure(result: "Result", path: Path) -> None:
    """With the caption under it, in lines as long as the figure is wide."""
    lines = textwrap.wrap(result.caption, int(15 * result.figure.get_figwidth()))
    result.figure.text(0.5, -0.01, "\n".join(lines), ha="center", va="top", size=7, color="0.35")
    result.figure.savefig(path, dpi=DPI, bbox_inches="tight")


def _save_json(name: str, quick: bool, seconds: float, result: "Result", path: Path) -> None:
    import jax

    from meta_train import strict_json

    record = {
        "study": name,
        "quick": quick,
        "seconds": round(seconds, 1),
        "jax": jax.__version__,
        "device": jax.devices()[0].device_kind,
        "caption": result.caption,
        "claims": [claim._asdict() for claim in result.claims],
        "table": result.table,
        "data": result.data,
    }
    path.write_text(strict_json.dumps(record, indent=1))


def main(argv: list[str]) -> int:
    if _LIST.value:
        print(listing())
        return 0
    names = ", ".join(study_names())
    if len(argv) != 1:
        raise ValueError(f"give one study name, got {argv}; the studies are: {names}.")
    if argv[0] not in study_names():
        load_study(argv[0])  # Refuses it.
    given = required_workdir()
    from learned_opt.paths import writable_folder

    workdir = writable_folder("--workdir", given)  # Not only at the end.
    from meta_train.devices import configure_cpu_devices

    configure_cpu_devices(1)  # The compiler's flags of jobs: most of a quick form is compiling.
    result = reproduce(argv[0], workdir, _QUICK.value, DATA_DIR.value)
    return 0 if all(claim.holds for claim in result.claims) else CLAIM_FAILED


def cli() -> None:
    """The installed command."""
    command_line.run_plain(main, __doc__)


_QUICK = flags.DEFINE_bool("quick", False, "A smaller version, at most 60 s on 2 cores.")
_LIST = flags.DEFINE_bool("list", False, "List the studies with their expected time, and exit.")

if __name__ == "__main__":
    cli()
