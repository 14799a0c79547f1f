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
``EQUIVALENT``, with the reason.
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
import re
import runpy
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

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

# The modules, and the test files that are asked (those of them that call the faulty function).
_ESTIMATORS = "estimators estimators_family contracts samplers estimators_variance"
_HYBRID = "hybrid contracts"
_REVERSIBLE = "reversible_arithmetic reversible_sgd reversible_estimator hybrid"
TESTS = {
    "meta_train/trainer.py": "trainer devices contracts hybrid train",
    "meta_train/devices.py": "devices contracts hybrid train",
    "meta_train/checkpoint.py": "train contracts",
    "meta_train/tracking.py": "train contracts",
    "meta_train/estimators/hybrid/*.py": _HYBRID,
    "meta_train/estimators/reversible.py": "reversible_estimator contracts",
    "meta_train/estimators/*.py": _ESTIMATORS,
    "meta_train/reversible/*.py": _REVERSIBLE,
    "learned_opt/*.py": "mlp_optimizer tuned reversible_estimator readme contracts",
}
# These start processes of their own, in which calls are not seen.
PROCESSES = {"tests/test_train.py": ("trainer.py", "devices.py", "checkpoint.py", "tracking.py")}

# Faults that change nothing a test could see: (module, line, before, after) and why.
EQUIVALENT: dict[tuple[str, str, str, str], str] = {}

COMPARISONS = {
    ast.Lt: "<=",
    ast.LtE: "<",
    ast.Gt: ">=",
    ast.GtE: ">",
    ast.Eq: "!=",
    ast.NotEq: "==",
    ast.Is: "is not",
    ast.IsNot: "is",
    ast.In: "not in",
    ast.NotIn: "in",
}
ARITHMETIC = {
    ast.Add: "-",
    ast.Sub: "+",
    ast.Mult: "/",
    ast.Div: "*",
    ast.FloorDiv: "*",
    ast.Mod: "//",
    ast.Pow: "*",
    ast.BitAnd: "|",
    ast.BitOr: "&",
    ast.BitXor: "|",
    ast.LShift: ">>",
    ast.RShift: "<<",
}
_SWAPS = (
    "mean sum|minimum maximum|min max|argmin argmax|any all|floor ceil|zeros ones|"
    "zeros_like ones_like"
)
FUNCTIONS = {a: b for pair in _SWAPS.split("|") for a, b in (pair.split(), pair.split()[::-1])}
# Calls that become their first argument, or the object whose method they are.
TO_ARGUMENT = {"fold_in", "stop_gradient", "optimization_barrier", "sqrt", "abs", "square", "exp"}
TO_OBJECT = {"astype", "_replace", "swapaxes"}


class Fault(NamedTuple):
    """One change of a module: ``source[start:end]`` becomes ``after``."""

    module: str
    line: int
    text: str  # The line it is in, stripped.
    scope: int  # First line of the function, 0 outside of all.
    start: int
    end: int
    before: str
    after: str
    kind: str
    id: str = ""

    @property
    def key(self):
        return self.module, self.text, self.before, self.after

    def __str__(self):
        return f"{self.id} {self.module}:{self.line} {self.kind}: {self.before} -> {self.after}"


class Finder(ast.NodeVisitor):
    """All faults of one module; none in words, types, and what an error says."""

    def __init__(self, module: str, source: bytes):
        self.module, self.source, self.scope, self.faults = module, source, 0, []
        lines = source.splitlines(keepends=True)
        self.starts = [sum(map(len, lines[:i])) for i in range(len(lines) + 1)]
        self.visit(ast.parse(source))

    def span(self, node):
        start = self.starts[node.lineno - 1] + node.col_offset
        return start, self.starts[node.end_lineno - 1] + node.end_col_offset

    def text(self, node):
        start, end = self.span(node)
        return self.source[start:end].decode()

    def add(self, kind, node, after):
        start, end = self.span(node)
        line = self.source[self.starts[node.lineno - 1] : self.starts[node.lineno]]
        self.faults.append(
            Fault(
                self.module,
                node.lineno,
                line.decode().strip(),
                self.scope,
                start,
                end,
                re.sub(r"\s+", " ", self.text(node)),
                after,
                kind,
            )
        )

    def within(self, first_line, *nodes):
        outer, self.scope = self.scope, first_line
        for node in nodes:
            self.visit(node)
        self.scope = outer

    def visit_FunctionDef(self, node):
        for default in [*node.args.defaults, *filter(None, node.args.kw_defaults)]:
            self.visit(default)
        first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
        self.within(first, *node.body)

    def visit_Lambda(self, node):
        self.within(node.lineno, node.body)

    def visit_ClassDef(self, node):
        for statement in node.body:
            self.visit(statement)

    def visit_AnnAssign(self, node):
        if node.value is not None:
            self.visit(node.value)

    def skip(self, node):
        pass

    visit_Raise = visit_JoinedStr = visit_Import = visit_ImportFrom = skip

    def visit_If(self, node):
        if isinstance(node.body[0], ast.Raise):
            self.add("check", node.test, "False")
        else:
            self.add("branch", node.test, f"not ({self.text(node.test)})")
        self.generic_visit(node)

    def visit_IfExp(self, node):
        body, test, other = map(self.text, (node.body, node.test, node.orelse))
        self.add("branch", node, f"({other} if {test} else {body})")
        self.generic_visit(node)

    def visit_Expr(self, node):
        if isinstance(node.value, ast.Call):
            self.add("statement", node, "pass")
        if not isinstance(node.value, ast.Constant):
            self.generic_visit(node)

    def visit_AugAssign(self, node):
        self.add("statement", node, "pass")
        self.visit(node.value)

    def visit_Assign(self, node):
        target, value = node.targets[0], node.value
        if isinstance(target, ast.Name) and any(
            isinstance(x, ast.Name) and x.id == target.id for x in ast.walk(value)
        ):
            self.add("statement", node, "pass")
        if isinstance(target, ast.Tuple) and self.text(value).startswith("jax.random.split("):
            self.add("key", value, f"[{self.text(value.args[0])}] * {len(target.elts)}")
        if self.text(target) != "__all__":
            self.generic_visit(node)

    def visit_Compare(self, node):
        if len(node.ops) == 1:
            left, right = self.text(node.left), self.text(node.comparators[0])
            self.add("comparison", node, f"({left} {COMPARISONS[type(node.ops[0])]} {right})")
        self.generic_visit(node)

    def visit_BinOp(self, node):
        symbol = ARITHMETIC.get(type(node.op))
        if symbol and not (isinstance(node.left, ast.Constant) and node.left.value is None):
            left, right = self.text(node.left), self.text(node.right)
            self.add("arithmetic", node, f"(({left}) {symbol} ({right}))")
        self.generic_visit(node)

    def visit_BoolOp(self, node):
        symbol = " or " if isinstance(node.op, ast.And) else " and "
        self.add("logic", node, f"({symbol.join(f'({self.text(v)})' for v in node.values)})")
        self.generic_visit(node)

    def visit_UnaryOp(self, node):
        self.add("logic", node, f"({self.text(node.operand)})")
        self.generic_visit(node)

    def visit_Constant(self, node):
        value = node.value
        if isinstance(value, bool):
            self.add("constant", node, str(not value))
        elif isinstance(value, int):
            self.add("constant", node, str(value + 1))
        elif isinstance(value, float):
            self.add("constant", node, repr(2 * value if value else 1.0))

    def visit_Call(self, node):
        name = getattr(node.func, "attr", getattr(node.func, "id", ""))
        args = list(map(self.text, node.args))
        if name in FUNCTIONS:
            func = self.text(node.func)
            self.add("function", node.func, func[: -len(name)] + FUNCTIONS[name])
        if name in TO_ARGUMENT and args:
            self.add("key" if name == "fold_in" else "call", node, f"({args[0]})")
        if name in TO_OBJECT:
            self.add("call", node, self.text(node.func.value))
        if name in ("where", "select", "cond") and len(args) >= 3:
            for a, b in ((1, 2), (2, 1)):  # Always the one, always the other.
                swapped = [*args]
                swapped[a] = args[b]
                self.add("where", node, f"{self.text(node.func)}({', '.join(swapped)})")
        self.generic_visit(node)


def apply(source: bytes, fault: Fault) -> bytes:
    return source[: fault.start] + fault.after.encode() + source[fault.end :]


def faults_in(module: str, source: bytes, seed: int) -> list[Fault]:
    """All faults of a module, in the random order of the seed, the kinds in turns.

    The order does not change where other lines do, so the same faults are chosen again.
    """
    seen: Counter = Counter()
    named = []
    for fault in Finder(module, source).faults:
        seen[fault.key] += 1
        words = "|".join([*fault.key, str(seen[fault.key]), str(seed)])
        named.append(fault._replace(id=hashlib.sha256(words.encode()).hexdigest()[:8]))
    turns: Counter = Counter()
    ordered = []
    for fault in sorted(named, key=lambda fault: fault.id):
        turns[fault.kind] += 1
        ordered.append((turns[fault.kind], fault.kind != "key", fault.id, fault))
    return [fault for *_, fault in sorted(ordered)]


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
    """A pytest plugin that notes the functions each test calls, and how long it takes."""

    def __init__(self):
        self.tests, self.failed, self.always = {}, [], []
        builtins.__calls__ = set()

    def called(self):
        found = sorted(builtins.__calls__)
        builtins.__calls__.clear()
        return found

    def pytest_collection_finish(self):
        self.always = self.called()

    def pytest_runtest_logreport(self, report):
        calls, seconds = self.tests.get(report.nodeid, ([], 0.0))
        self.tests[report.nodeid] = [calls + self.called(), seconds + report.duration]
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
        signal.setitimer(signal.ITIMER_REAL, 60 + 10 * self.seconds[nodeid])  # Ends the process.

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
    others = ("contracts/", "test_", "mutate.py")
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
    unseen = Path(fault.module).name in PROCESSES.get(file, ())
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
    parser.add_argument("--tests", default="", help="only test files whose path has this in it")
    parser.add_argument("--budget", type=float, default=120, help="seconds of a file's tests")
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
        files = [file for file in tests_of(fault.module) if args.tests in file]
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
