"""Every JSON that is written is one that every parser reads."""

import ast
import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from meta_train import strict_json

ROOT = Path(__file__).parent.parent
PACKAGES = ("launch", "learned_opt", "meta_train", "tasks")


def writers(source: str) -> list[tuple[int, bool]]:
    """Every use of ``json.dump`` and ``json.dumps``: its line, and whether it refuses NaN.

    A use that is no call (the function handed on) refuses nothing.
    """
    tree = ast.parse(source)
    strict = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            for keyword in node.keywords:
                refuses = isinstance(keyword.value, ast.Constant) and keyword.value.value is False
                if keyword.arg == "allow_nan" and refuses:
                    strict.add(node.func)
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "json":
            names = {alias.name for alias in node.names}
            assert not names & {"dump", "dumps"}, "write json.dumps, so that this test sees it"
        if (
            isinstance(node, ast.Attribute)
            and node.attr in ("dump", "dumps")
            and isinstance(node.value, ast.Name)
            and node.value.id == "json"
        ):
            found.append((node.lineno, node in strict))
    return found


def test_every_writer_refuses_what_is_no_json():
    seen = 0
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            for line, strict in writers(path.read_text()):
                seen += 1
                assert strict, f"{path.relative_to(ROOT)}:{line}: use meta_train.strict_json.dumps"
    assert seen >= 1


def test_lax_writers_are_found():
    assert writers("import json\njson.dumps(1)") == [(2, False)]
    assert writers("import json\njson.dumps(1, allow_nan=True)") == [(2, False)]
    assert writers("import json\njson.dump(1, f, allow_nan=False)") == [(2, True)]
    assert writers("import json\nlist(map(json.dumps, [1]))") == [(2, False)]
    with pytest.raises(AssertionError):
        writers("from json import dumps")


def test_numbers_that_are_not_finite_are_null():
    tree = {
        "a": [float("inf"), 1.5, (float("nan"), np.float32("-inf"))],
        "b": np.array([[1.0, np.nan], [np.inf, 2.0]]),
        "c": jnp.array([1, 2]),
        "d": {"e": np.int32(3), "f": None, "g": "Infinity", "h": True},
    }
    text = strict_json.dumps(tree)

    def refuse(constant):
        raise AssertionError(constant)

    assert json.loads(text, parse_constant=refuse) == {
        "a": [None, 1.5, [None, None]],
        "b": [[1.0, None], [None, 2.0]],
        "c": [1, 2],
        "d": {"e": 3, "f": None, "g": "Infinity", "h": True},
    }
    assert strict_json.dumps({"b": 1, "a": 2}, indent=1, sort_keys=True).startswith('{\n "a": 2')
