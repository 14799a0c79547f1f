"""Puts faults into the code, one at a time, and asks the tests of it: ``make mutate``.

A fault is a small change of the text of one module: a flipped comparison, a constant off by one, a
key used twice, a dropped statement. Each is made in a copy of the checkout, where the tests that
call the faulty function run, quickest first, until one fails (or crashes, or takes far too long):
the fault is caught. What survives shows what no test asks. The faults are a function of the text
and the seed.

Which tests call which function is recorded once and kept in ``runs/mutate`` until the sources
change, beside the programs that XLA compiled. Everything runs in processes forked from one that has
already imported JAX, since starting and compiling would take most of the time.

The command exits with 1 if a fault survives. One that no test could tell is entered in
``EQUIVALENT`` of ``faults.py``, with the reason.
"""

import argparse
import ast
import builtins
import contextlib
import hashlib
import importlib
import itertools
import json
import math
import multiprocessing
import os
import runpy
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from faults import EQUIVALENT, Fault, apply, faults_in

ROOT = Path(__file__).resolve().parent.parent
KEPT = ROOT / "runs" / "mutate"
PACKAGES = ("launch", "learned_opt", "meta_train", "tasks", "tests")
# Slow to import, and not ours.
PRELOADED = (
    "jax",
    "flax.linen",
    "hypothesis",
    "matplotlib.pyplot",
    "optax",
    "orbax.checkpoint",
    "pytest",
    "scipy.stats",
    "sklearn.datasets",
    "tensorflow_datasets",
    "wandb",
)

# The modules, and the test files that are asked (those of them that call the faulty function); the
# first pattern that fits counts.
_ESTIMATORS = "estimators estimators_family contracts samplers estimators_variance"
_REVERSIBLE = "reversible_arithmetic reversible_resolution reversible_gradients reversible_sgd"
TESTS = {
    "meta_train/trainer.py": "trainer devices mixture contracts hybrid train",
    "meta_train/devices.py": "devices mixture contracts hybrid train",
    "meta_train/checkpoint.py": "checkpoint train contracts",
    "meta_train/journal.py": "checkpoint train hybrid",
    "meta_train/tracking.py": "tracking train contracts",
    "meta_train/estimators/config.py": "choices contracts",
    "meta_train/estimators/hybrid/replay.py": "hybrid replay_command",
    "meta_train/estimators/hybrid/*.py": "hybrid choices contracts",
    "meta_train/estimators/mixture.py": "mixture contracts",
    "meta_train/estimators/reversible.py": "reversible_estimator contracts",
    "meta_train/estimators/*.py": _ESTIMATORS,
    "meta_train/reversible/*.py": _REVERSIBLE + " reversible_estimator hybrid",
    "meta_train/compiled_apart.py": _REVERSIBLE + " reversible_estimator hybrid",
    "learned_opt/weights.py": "weights mlp_optimizer tuned paths",
    "learned_opt/model_card.py": "weights evaluate readme",
    "learned_opt/paths.py": "paths weights",
    "learned_opt/inspection.py": "describe",
    "learned_opt/width.py": "width contracts",
    "learned_opt/slabs.py": "slabs contracts",
    "learned_opt/*.py": "mlp_optimizer tuned scheduled l3rs nn_adam rnn_mlp small_fc "
    "star celo celo2 velo formats "
    "reversible_estimator readme contracts",
}
# These start processes of their own, in which calls are not seen: they count as callers of all.
PROCESSES = ("tests/test_train.py", "tests/test_checkpoint.py")


def tests_of(module: str) -> list[str]:
    names = next(tests for pattern, tests in TESTS.items() if Path(module).match(pattern))
    return [f"tests/test_{name}.py" for name in names.split()]


def all_modules() -> list[str]:
    found = [path for pattern in TESTS for path in sorted(ROOT.glob(pattern))]
    return list(dict.fromkeys(str(path.relative_to(ROOT)) for path in found))


class Marker(ast.NodeTransformer):
    """Has every function of a module note that it was called; a tracer would see all of JAX."""

    def __init__(self, module: str):
        self.module = module

    def mark(self, line):
        return f"__calls__.add(({self.module!r}, {line}))"

    def visit_FunctionDef(self, node):
        line = min([node.lineno, *(d.lineno for d in node.decorator_list)])
        self.generic_visit(node)
        node.body.insert(ast.get_docstring(node) is not None, ast.parse(self.mark(line)).body[0])
        return node

    def visit_Lambda(self, node):
        line = node.lineno
        self.generic_visit(node)
        both = ast.parse(f"({self.mark(line)}, None)[1]", mode="eval").body
        both.value.elts[1] = node.body
        node.body = both
        return node

    def marked(self, source: str) -> str:
        tree = self.visit(ast.parse(source))
        start = "import builtins\nbuiltins.__calls__ = getattr(builtins, '__calls__', set())"
        at = ast.get_docstring(tree) is not None
        tree.body[at:at] = ast.parse(start).body
        return ast.unparse(ast.fix_missing_locations(tree))


class Recorder:
    """A pytest plugin that notes the functions each test calls, and its processor time."""

    def __init__(self):
        self.tests, self.failed, self.always = {}, [], []
        self.time = 0.0
        builtins.__calls__ = set()

    def called(self):
        found = sorted(builtins.__calls__)
        builtins.__calls__.clear()
        return found

    def pytest_collection_finish(self):
        self.always = self.called()
        self.time = sum(os.times()[:4])

    def pytest_runtest_logreport(self, report):
        calls, seconds = self.tests.get(report.nodeid, ([], 0.0))
        before, self.time = self.time, sum(os.times()[:4])
        self.tests[report.nodeid] = [calls + self.called(), seconds + self.time - before]
        if report.failed:
            self.failed.append(report.nodeid)

    def pytest_sessionfinish(self):
        result = {"tests": self.tests, "always": self.always, "failed": self.failed}
        Path("result.json").write_text(json.dumps(result))


class Chooser:
    """A pytest plugin that runs the given tests, in that order, and none for too long."""

    def __init__(self, seconds: dict[str, float]):
        self.seconds = seconds

    def pytest_collection_modifyitems(self, items):
        order = list(self.seconds)
        items[:] = [item for item in items if item.nodeid in self.seconds]
        items.sort(key=lambda item: order.index(item.nodeid))

    def pytest_runtest_logstart(self, nodeid):
        # Processor time, or on a starved machine any time; either signal ends the process.
        signal.setitimer(signal.ITIMER_PROF, 30 + 10 * self.seconds[nodeid])
        signal.setitimer(signal.ITIMER_REAL, 600 + 100 * self.seconds[nodeid])

    def pytest_runtest_logreport(self, report):
        if report.failed:
            Path("result.json").write_text(json.dumps(report.nodeid))


def run_tests(root: Path, files: list[str], plugin) -> None:
    """In a process of its own: pytest on the checkout in ``root``."""
    os.setsid()
    os.chdir(root)
    sys.dont_write_bytecode = True
    log = os.open("log.txt", os.O_CREAT | os.O_WRONLY)
    os.dup2(log, 1)
    os.dup2(log, 2)
    options = ["-q", "-n", "0", "-p", "no:cacheprovider", "--durations=0"]
    if isinstance(plugin, Chooser):
        options.append("-x")
    code = importlib.import_module("pytest").main([*options, *files], plugins=[plugin])
    sys.stdout.flush()
    os._exit(int(code))


def in_copy(files: list[str], plugin, fault: Fault | None = None):
    """Exit code, and what the plugin left, of these tests in a copy of the checkout."""
    with tempfile.TemporaryDirectory(prefix="mutate-") as folder:
        root = Path(folder).resolve() / "checkout"
        root.mkdir()
        for package in PACKAGES:
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / package, root / package, ignore=ignored)
        for file in (*ROOT.glob("*.toml"), *ROOT.glob("*.md")):
            shutil.copy(file, root)
        if fault:
            path = root / fault.module
            path.write_bytes(apply(path.read_bytes(), fault))
        if isinstance(plugin, Recorder):
            for module in all_modules():
                path = root / module
                path.write_text(Marker(module).marked(path.read_text()))
        process = multiprocessing.get_context("fork").Process(
            target=run_tests, args=(root, files, plugin)
        )
        process.start()
        process.join()
        with contextlib.suppress(ProcessLookupError):  # What its tests may have started.
            os.killpg(process.pid, signal.SIGKILL)
        result = root / "result.json"
        left = json.loads(result.read_text()) if result.exists() else None
        log = (root / "log.txt").read_text(errors="replace")
        return process.exitcode, left, log


def record(file: str) -> dict:
    """What the tests of a file call, from the last time if nothing changed."""
    parts = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
    others = ("contracts/", "test_", "mutate.py", "faults.py")
    digest = hashlib.sha256()
    for path in parts:
        name = str(path.relative_to(ROOT))
        contract = file.endswith("contracts.py") and name.startswith("tests/contracts/")
        if name == file or contract or not name.startswith(tuple(f"tests/{o}" for o in others)):
            digest.update(name.encode() + path.read_bytes())
    kept = KEPT / "calls" / f"{Path(file).stem}.json"
    if kept.exists():
        recorded = json.loads(kept.read_text())
        if recorded["digest"] == digest.hexdigest():
            return recorded
    start = time.monotonic()
    code, recorded, log = in_copy([file], Recorder())
    if code != 0:
        raise SystemExit(f"{log}\n{file} must pass before faults are put into the code.")
    print(f"recorded {file} in {time.monotonic() - start:.0f} s", flush=True)
    kept.parent.mkdir(parents=True, exist_ok=True)
    kept.write_text(json.dumps(recorded | {"digest": digest.hexdigest()}))
    return recorded


def callers(fault: Fault, file: str) -> dict[str, float]:
    """The tests of a file that call the function the fault is in, and their seconds."""
    recorded = record(file)
    unseen = file in PROCESSES
    found = {}
    for test, (calls, seconds) in recorded["tests"].items():
        called = {line for module, line in calls + recorded["always"] if module == fault.module}
        if unseen or fault.scope in called or (called and not fault.scope):
            found[test] = seconds
    return found


def ask(fault: Fault, files: list[str], budget: float, caught_by: Counter) -> str:
    """What catches the fault; empty if nothing does. Files in turn, each up to the budget."""
    for file in files:
        found = callers(fault, file)
        # Quickest first, and those before that have caught others.
        order = sorted(found, key=lambda test: found[test] / (1 + caught_by[test]))
        total = itertools.accumulate(found[test] for test in order)
        asked = {
            test: found[test] for test, sum_ in zip(order, total, strict=True) if sum_ < budget
        }
        if not asked:
            continue
        code, culprit, log = in_copy([file], Chooser(asked), fault)
        if code == 5 or (code == 4 and "rror" not in log):
            raise SystemExit(f"{log}\nThe tests of {fault} were not found.")
        if code:
            caught_by[culprit] += 1
            return culprit or f"exit code {code} in {file}"
    return ""


def choose(modules: list[str], count: int, seed: int):
    """``count`` faults, a module's share as the root of its size, and the equivalent ones met."""
    every = {m: faults_in(m, (ROOT / m).read_bytes(), seed) for m in modules}
    total = sum(len(faults) ** 0.5 for faults in every.values())
    chosen, equivalent = [], []
    for faults in every.values():
        num = math.ceil(count * len(faults) ** 0.5 / total)
        real = [fault for fault in faults if fault.key not in EQUIVALENT][:num]
        last = faults.index(real[-1]) if real else 0
        equivalent += [fault for fault in faults[:last] if fault.key in EQUIVALENT]
        chosen += real
    return chosen, equivalent


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--module", default="", help="only modules whose path has this in it")
    parser.add_argument("--count", type=int, default=150, help="faults, in all")
    parser.add_argument("--seed", type=int, default=0, help="which of them")
    parser.add_argument("--fault", default="", help="only those of these ids, with commas")
    parser.add_argument(
        "--tests",
        default="",
        help="only test files whose path has this in it, or one of these, with commas",
    )
    parser.add_argument("--budget", type=float, default=60, help="seconds of a file's tests")
    parser.add_argument("--list", action="store_true", help="say the faults and run nothing")
    args = parser.parse_args()
    modules = [m for m in all_modules() if args.module in m]
    count = 10**9 if args.fault else args.count
    faults, equivalent = choose(modules, count, args.seed)
    faults = [f for f in faults if not args.fault or f.id in args.fault.split(",")]
    if not faults:
        raise SystemExit("No such faults: `--module` and `--fault` must name some.")
    if args.list:
        print(*faults, sep="\n")
        return 0

    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(KEPT / "xla")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
    runpy.run_path(str(ROOT / "tests" / "conftest.py"))  # Sets the rest, before JAX is imported.
    for name in PRELOADED:
        importlib.import_module(name)

    survived, caught_by = [], Counter()
    for fault in faults:
        start = time.monotonic()
        files = [
            file
            for file in tests_of(fault.module)
            if any(part in file for part in args.tests.split(","))
        ]
        why = ask(fault, files, args.budget, caught_by)
        if not why:
            survived.append(fault)
        print(f"{fault}  [{why or 'SURVIVED'}, {time.monotonic() - start:.0f} s]", flush=True)

    print("\n| module | faults | caught | survived | equivalent |\n|---|---|---|---|---|")
    for name, mine in [*((m, (m,)) for m in modules), ("all", modules)]:
        ours = [sum(f.module in mine for f in group) for group in (faults, survived, equivalent)]
        print(f"| `{name}` | {ours[0]} | {ours[0] - ours[1]} | {ours[1]} | {ours[2]} |")
    for title, group in (("survived", survived), ("equivalent", equivalent)):
        for fault in group:
            reason = EQUIVALENT.get(fault.key, "")
            print(f"{title}: {fault}  {reason}")
    return int(bool(survived))


if __name__ == "__main__":
    sys.exit(main())
