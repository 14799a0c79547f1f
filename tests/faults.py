"""Small faults that can be put into a module's text; ``mutate.py`` asks the tests of each."""

import ast
import hashlib
import re
from collections import Counter
from typing import NamedTuple

# Faults that change nothing a test could see: (module, line, before, after) and why.
EQUIVALENT: dict[tuple[str, str, str, str], str] = {
    ("meta_train/estimators/hybrid/state.py", "SEARCH = 2**32 - 2", "2", "3"): (
        "any address that no particle has serves"
    ),
    (
        "meta_train/reversible/arithmetic.py",
        "estimate = (x.astype(jnp.float64) * reciprocal).astype(jnp.int64)",
        "x.astype(jnp.float64)",
        "x",
    ): "the product with a float64 is one, said or not",
    (
        "meta_train/reversible/inner.py",
        "instance = jax.eval_shape(task.sample, jax.random.key(0))",
        "0",
        "1",
    ): "only shapes are asked for",
}

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
