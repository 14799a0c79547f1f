"""Who may import whom: launch -> meta_train -> {learned_opt, tasks}; only `devices` has pmap."""

import ast
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
ALLOWED = {
    "tasks": {"tasks"},
    "learned_opt": {"learned_opt"},
    "meta_train": {"meta_train"},
    "launch": {"launch", "meta_train", "learned_opt", "tasks"},
}
FOR_ESTIMATORS = (
    "meta_train.checks",
    "meta_train.compiled_apart",
    "meta_train.estimators",
    "meta_train.reversible",
    "meta_train.samplers",
    "meta_train.unroll",
)
# Repeats the train step from a log of messages, so it knows what a train step is.
REPLAY = "meta_train/estimators/hybrid/replay.py"
FOR_REPLAY = ("meta_train.journal", "meta_train.trainer")
MEETING_PLACES = {
    "meta_train/inner.py",
    "meta_train/evaluate.py",
    "meta_train/reversible/inner.py",
}


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


def test_import_directions():
    seen = 0
    for package, allowed in ALLOWED.items():
        for path in (ROOT / package).rglob("*.py"):
            name = path.relative_to(ROOT).as_posix()
            extra = {"learned_opt", "tasks"} if name in MEETING_PLACES else set()
            for module in imports(path):
                top = module.split(".")[0]
                if top in ALLOWED:
                    seen += 1
                    assert top in allowed | extra, f"{name} imports {module}"
                if name.startswith("meta_train/estimators/") and top == "meta_train":
                    known = FOR_ESTIMATORS + (FOR_REPLAY if name == REPLAY else ())
                    assert module.startswith(known), f"{name} imports {module}"
    assert seen > 50


def test_pmap_lives_in_devices():
    users = [
        path.relative_to(ROOT).as_posix()
        for package in ALLOWED
        for path in (ROOT / package).rglob("*.py")
        if "jax.pmap(" in path.read_text() or "lax.pmean(" in path.read_text()
    ]
    assert users == ["meta_train/devices.py"]


def test_what_importing_the_packages_loads():
    """Beyond Flax and optax, nothing but safetensors: no reader of data, no tool of the commands.

    So `import learned_opt` takes hardly more than `import flax, optax`, and the base install is
    enough for it.
    """
    code = """
import importlib, json, sys
import flax, optax
seen, loaded = set(sys.modules), {}
for package in ("tasks", "learned_opt", "meta_train"):
    importlib.import_module(package)
    new = {name.partition(".")[0] for name in set(sys.modules) - seen}
    loaded[package] = sorted(new - sys.stdlib_module_names)
    seen = set(sys.modules)
print(json.dumps(loaded))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout) == {
        "tasks": ["tasks"],
        "learned_opt": ["learned_opt", "safetensors"],
        "meta_train": ["meta_train"],
    }
