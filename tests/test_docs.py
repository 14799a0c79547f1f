"""What the README and the documentation say: links, commands, flags, messages and code."""

import ast
import dataclasses
import importlib
import inspect
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from absl import flags

import learned_opt
from launch import choices
from launch import config as cfg
from launch.evaluation.baselines import BASELINES
from launch.suites import SUITES
from tasks.dynamics.control import Control
from tasks.dynamics.mujoco_physics import missing

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
EXAMPLES = sorted(path for path in (ROOT / "examples").iterdir() if path.suffix != ".md")
# The classes of their words `--cfg.a.b=value`, and their presets.
CONFIGURED = {
    "launch.train": "default",
    "launch.sweep": "default",
    "launch.demo": "demo",
    "launch.evaluate": None,
}
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)


def relative(path):
    return path.relative_to(ROOT).as_posix()


def blocks(page, *languages):
    return [text for language, text in FENCE.findall(page.read_text()) if language in languages]


def prose(page):
    return FENCE.sub("", page.read_text())


def commands(page):
    """Every command line of a page: lines of its blocks of commands, and in its sentences."""
    found = [line for text in blocks(page, "sh") for line in joined(text)]
    # Blocks without a language may hold what a command prints.
    bare = [line for text in blocks(page, "") for line in joined(text)]
    spans = [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose(page))]
    start = r"(python -m|make \w|pip install|wandb (leet|sync))"
    return found + [line for line in bare + spans if re.match(start, line)]


def commands_of_example(path):
    """Those that its docstring shows."""
    shown = joined(ast.get_docstring(ast.parse(path.read_text())))
    return [line for line in shown if line.startswith("python -m")]


def joined(text):
    """Commands, one a line, without their comments."""
    lines = text.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := re.sub(r"\s+# .*$", "", line).strip())]


ALL_COMMANDS = sorted(
    {(relative(page), line) for page in PAGES for line in commands(page)}
    | {(relative(p), x) for p in EXAMPLES if p.suffix == ".py" for x in commands_of_example(p)}
)


# The blocks of docs/extend.md; the third stands alone.
MODULES = ("mytask", "mysuite", "own_data", "mylopt", "mymeta")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder to work in, with the modules that pages show."""
    modules = dict(zip(MODULES, blocks(ROOT / "docs/extend.md", "python"), strict=True))
    for name in ("mytask", "mysuite", "mylopt", "mymeta"):
        (tmp_path / f"{name}.py").write_text(modules[name])
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for name in MODULES:
        sys.modules.pop(name, None)


@pytest.fixture
def user(folder):
    """The same with a trained optimizer and a job's metrics."""
    # What the demo trains: it reads the loss, the parameters and the length of the run.
    _, theta = learned_opt.load("controller")
    learned_opt.save(folder / "runs/demo/optimizer", "adam_controller", {}, theta)
    (folder / "runs/mine").mkdir()
    (folder / "runs/mine/metrics.jsonl").write_text('{"step": 1, "meta_loss": 2.0}\n')
    return folder


def parsed(module, words):
    """The configuration that the command would run with; as ``command_line.run`` does it."""
    command = importlib.import_module(module)
    known = flags.FLAGS.flags_by_module_dict()
    own = {"workdir", "data_dir", "import", "quiet", *(flag.name for flag in known.get(module, []))}
    # Two commands have a flag `seeds`, which absl takes for that of the one imported last.
    own |= {held.name for held in vars(command).values() if isinstance(held, flags.FlagHolder)}
    # Paths are defined by one function, so absl does not know whose they are.
    paths = [flag.name for flag in known["launch.path_flags"]]
    own |= {name for name in paths if f'"{name}"' in inspect.getsource(command)}
    preset, rest = CONFIGURED.get(module), list(words)
    values = flags.FlagValues()
    for name in own:
        values[name] = flags.FLAGS[name]
    if module not in CONFIGURED:
        return values([module, *rest])
    cls = command.EvaluationConfig if module == "launch.evaluate" else cfg.Config
    if preset:
        flags.DEFINE_string("preset", preset, "", flag_values=values)
    node, rest = choices.take_words([module, *rest], "cfg")
    choices.check_plain(cls, node, "cfg")
    over = values([word for word in rest if word != "--help"])
    assert len(over) == 1, f"unexpected arguments {over[1:]}"
    base = cfg.load_preset(values["preset"].value) if preset else cls()
    return choices.apply_words(base, node, "cfg")


def check_names_of_evaluation(words):
    """Those of suites, baselines and optimizers, which the command itself looks up when it runs."""
    given = [word.lstrip("-").partition("=")[::2] for word in words]
    known = {
        "suite": set(SUITES),
        "baselines": set(BASELINES),
        "optimizer": {*learned_opt.OPTIMIZERS, *learned_opt.available()},
    }
    for flag, value in given:
        for name in value.split(",") if flag in known else ():
            elsewhere = ":" in name or name.startswith("runs/") or name in ("FOLDER", "DIR")
            assert name in known[flag] or elsewhere, f"--{flag}={name}"


@pytest.mark.parametrize(("page", "line"), ALL_COMMANDS)
def test_every_command_is_one(page, line, folder):
    """Its flags and words are taken by the real parsers; what it names is there."""
    saved = {name: (flags.FLAGS[name].value, flags.FLAGS[name].present) for name in flags.FLAGS}
    for name in saved:
        flags.FLAGS[name].present = 0  # Else a flag that may be given often adds to what it was.
    words = shlex.split(line)
    try:
        if words[:2] == ["python", "-m"] and words[2].startswith("launch."):
            if "FOLDER" not in line:
                parsed(words[2], words[3:])
            if words[2] == "launch.evaluate":
                check_names_of_evaluation(words[3:])
        elif words[:2] == ["python", "-m"]:
            module = words[2].partition(".")
            known = words[2] == "pytest" or (ROOT / module[0] / f"{module[2]}.py").exists()
            assert known, line
        elif words[0] == "make":
            targets = re.findall(r"^(\w[\w-]*):", (ROOT / "Makefile").read_text(), re.M)
            assert set(words[1:]) - {w for w in words if "=" in w} <= set(targets)
        elif words[:2] == ["pip", "install"]:
            assert words[2] == "." or re.search(r"\[train(,control|,search)?\]$", words[2])
        elif words[0] == "wandb":
            from wandb.cli import cli

            assert words[1] in cli.cli.commands
        else:
            assert words[0] in ("tail", "git", "eval"), f"no test knows what {line!r} is"
    finally:
        for name, (value, present) in saved.items():
            flags.FLAGS[name].value, flags.FLAGS[name].present = value, present


def test_there_are_commands_to_check():
    assert len(ALL_COMMANDS) > 40
    with pytest.raises(ValueError, match="horizn"):
        parsed("launch.train", ["--cfg.inner.horizn=3"])
    with pytest.raises(flags.UnrecognizedFlagError):
        parsed("launch.train", ["--suite=smoke"])


def test_every_field_in_a_sentence_is_one():
    """``--cfg.a.b`` names a field of the configuration, of whatever may be chosen there."""
    fields = dict.fromkeys(choices.plain_paths(cfg.Config, "cfg"))
    for kind in choices.KINDS.values():
        word = {"meta-optimizer": "meta"}.get(kind.word, kind.word)
        fields[f"cfg.{word}"] = None
        for name in kind.things():
            for field in dataclasses.fields(choices.find(kind, name)):
                fields[f"cfg.{word}.{field.name}"] = None
    # Of a preset's task that has no name.
    fields |= {f"cfg.task.{field.name}": None for field in dataclasses.fields(Control)}
    named = {path for page in PAGES for path in re.findall(r"--(cfg\.[\w.]*\w)", page.read_text())}
    assert len(named) > 20
    # `.base.`: a field of what another one wraps.
    assert not [path for path in named if path.replace(".base.", ".") not in fields]


@pytest.mark.parametrize("page", [p for p in PAGES[1:] if blocks(p, "python")], ids=relative)
def test_the_python_of_a_page_runs(page, user):
    """Its blocks, one after the other, asserts included. (The README's: `test_readme.py`.)"""
    scope = {"__name__": "page"}
    for text in blocks(page, "python"):
        # `test_readme.py` takes all 300 steps.
        exec(compile(text.replace("range(300)", "range(2)"), relative(page), "exec"), scope)


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_links_and_languages(page):
    text = page.read_text()
    assert {language for language, _ in FENCE.findall(text)} <= {"", "python", "sh", "text"}
    assert text.count("```") == 2 * len(FENCE.findall(text))
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"https?:", target):
            continue
        path, _, anchor = target.partition("#")
        other = (page.parent / path) if path else page
        assert other.exists(), f"{relative(page)} links to {target}"
        if anchor:
            assert anchor in anchors(other), f"{relative(page)} links to {target}"


def anchors(page):
    """Of the headings, as MkDocs and GitHub make them."""
    titles = re.findall(r"^#+ (.*)$", prose(page), re.M)
    return {re.sub(r"[\s]+", "-", re.sub(r"[^\w\s-]", "", x).strip().lower()) for x in titles}


def test_the_readme_is_short_and_pictures_are_small():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120
    pictures = list((ROOT / "docs").rglob("*.png"))
    assert len(pictures) > 5
    assert not [relative(p) for p in pictures if p.stat().st_size >= 100_000]
    shown = "".join(page.read_text() for page in PAGES)
    assert not [relative(p) for p in pictures if p.name not in shown]


def test_every_page_is_in_the_navigation():
    """Of those that are there; and what the navigation names is there."""
    named = set(re.findall(r": ([\w/]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.M))
    made = {f"examples/{path.stem}.md" for path in EXAMPLES if path.suffix in (".py", ".ipynb")}
    folder = ROOT / "docs"
    assert named == made | {p.relative_to(folder).as_posix() for p in folder.rglob("*.md")}


def test_every_study_and_estimator_is_in_the_docs():
    from launch.reproduce import study_names
    from meta_train.estimators import ESTIMATORS

    gallery = (ROOT / "docs/gallery.md").read_text()
    listed = set(re.findall(r"`(\w+)`", " ".join(re.findall(r"^\| (`.*?) \|", gallery, re.M))))
    shortened = {f"reversible{name}" for name in listed if name.startswith("_")}
    assert set(study_names()) == {x for x in listed if not x.startswith("_")} | shortened
    table = (ROOT / "docs/which_estimator.md").read_text()
    assert not [name for name in ESTIMATORS if f"`{name}`" not in table]
    table = (ROOT / "docs/architectures.md").read_text()
    assert not [name for name in learned_opt.OPTIMIZERS if f"`{name}`" not in table]


def test_functions_called_like_their_file_are_in_the_reference():
    """MkDocs takes such a name for the module, unless the page names the function."""
    named = "".join(page.read_text() for page in (ROOT / "docs/api").glob("*.md"))
    found = [
        f"{package}.{name}.{name}"
        for package in ("learned_opt", "tasks", "meta_train", "meta_train.estimators")
        for name in importlib.import_module(package).__all__
        if (ROOT / package.replace(".", "/") / f"{name}.py").exists()
    ]
    assert len(found) > 5 and not [name for name in found if f"::: {name}\n" not in named]


def test_messages_are_those_of_the_code():
    """Each message of the troubleshooting page is in the source, wherever its lines break there."""
    paths = [p for d in ("launch", "learned_opt", "meta_train") for p in (ROOT / d).rglob("*.py")]
    source = "".join(p.read_text() for p in paths)
    source = re.sub(r"""["']\s*\n\s*f?["']""", "", source)
    page = (ROOT / "docs/troubleshooting.md").read_text()
    messages = re.findall(r"^\| (`+) ?(.+?) ?\1 \|", page, re.M)
    assert len(messages) > 25
    missing = [text for _, text in messages if text not in source]
    assert not missing


def test_an_example_task():
    assert importlib.import_module("examples.own_task").main() < 0.05


@pytest.mark.slow
def test_an_example_optimizer():
    own_optimizer = importlib.import_module("examples.own_optimizer")
    first, last = own_optimizer.main(num_steps=60)
    assert last < 0.8 * first


@pytest.mark.slow
def test_an_example_estimator():
    """Its mean is the exact derivative, within the noise of a seed."""
    exact, distance, error = importlib.import_module("examples.own_estimator").main(2_000)
    assert distance < 4 * error < 0.5 * exact


def test_an_example_loop():
    nnx_loop = importlib.import_module("examples.nnx_loop")
    first, last = nnx_loop.main(num_steps=60)
    assert last < 0.5 * first


@pytest.mark.slow
def test_tuning_by_hypergradients():
    first, last = importlib.import_module("examples.tune_adam").main(num_steps=30, horizon=20)
    assert last < 0.8 * first


@pytest.mark.parametrize(
    "name",
    [
        "use_a_trained_optimizer",
        pytest.param("meta_train_on_your_task", marks=pytest.mark.slow),
    ],
)
def test_a_notebook_runs(name, user, monkeypatch):
    """Every cell, assertions included."""
    path = ROOT / f"examples/{name}.ipynb"
    monkeypatch.setenv("MPLBACKEND", "agg")
    cells = json.loads(path.read_text())["cells"]
    source = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert len(source) > 4 and any("assert " in text for text in source)
    scope = {"__name__": "notebook"}
    for text in source:
        exec(compile(text, path.name, "exec"), scope)


def test_every_example_is_listed():
    page = (ROOT / "docs/examples.md").read_text()
    assert len(EXAMPLES) >= 7
    assert not [path.name for path in EXAMPLES if f"(../examples/{path.name})" not in page]
    for path in EXAMPLES:
        assert path.suffix == ".ipynb" or inspect.cleandoc(path.read_text()).startswith('"""')


# Studies run in `test_studies.py`.
TRAININGS = {
    line
    for _, line in ALL_COMMANDS
    if re.match(r"python -m launch.(train|demo) .*dir=", line)
    and not (missing() and "--preset=swimmer" in line)
}


@pytest.mark.slow
@pytest.mark.parametrize("line", sorted(TRAININGS))
def test_a_training_runs(line, folder):
    """Whole, but for its number of steps."""
    words = [word for word in shlex.split(line)[2:] if not word.startswith("--cfg.num_steps")]
    done = subprocess.run(
        [sys.executable, "-m", *words, "--cfg.num_steps=3"],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
