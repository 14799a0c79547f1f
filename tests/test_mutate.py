"""The faults that ``make mutate`` puts into the code, and how it sees which tests call what."""

import builtins
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent))
import faults
import mutate

SOURCE = '''
"""Words 1 + 1."""

def scale(x: int = 2, *, up=True) -> float:
    """Words 2 + 2."""
    if x < 0:
        raise ValueError(f"{x + 1} is below {0}")
    a, b = jax.random.split(key)
    x = jnp.mean(x)
    y = (lambda z: -z)(x)
    return jnp.where(up and not b, jax.random.fold_in(a, 7), y)
'''
EXPECTED = {
    ("x < 0", "False"),
    ("x < 0", "(x <= 0)"),
    ("2", "3"),
    ("0", "1"),
    ("7", "8"),
    ("True", "False"),
    ("jax.random.split(key)", "[key] * 2"),
    ("x = jnp.mean(x)", "pass"),
    ("jnp.mean", "jnp.sum"),
    ("-z", "(z)"),
    ("up and not b", "((up) or (not b))"),
    ("not b", "(b)"),
    ("jax.random.fold_in(a, 7)", "(a)"),
}


def test_faults_of_a_source():
    found = faults.faults_in("m.py", SOURCE.encode(), seed=0)
    pairs = {(fault.before, fault.after) for fault in found}
    wheres = {after for before, after in pairs if before.startswith("jnp.where")}
    assert len(wheres) == 2
    assert {pair for pair in pairs if not pair[0].startswith("jnp.where")} == EXPECTED
    assert {fault.scope for fault in found if fault.before == "-z"} == {10}
    assert {fault.scope for fault in found if fault.before in ("2", "True")} == {0}
    # Other lines above change nothing in which are chosen; another seed does.
    moved = faults.faults_in("m.py", b"import os\n\n" + SOURCE.encode(), seed=0)
    assert [fault.id for fault in moved] == [fault.id for fault in found]
    other = faults.faults_in("m.py", SOURCE.encode(), seed=1)
    assert [(f.before, f.after) for f in other] != [(f.before, f.after) for f in found]


@pytest.mark.parametrize("module", mutate.all_modules())
def test_every_module_has_faults_and_test_files(module):
    source = (mutate.ROOT / module).read_bytes()
    for fault in faults.faults_in(module, source, seed=0)[:5]:
        assert source[fault.start : fault.end] != fault.after.encode()
        compile(faults.apply(source, fault), module, "exec")
    for file in mutate.tests_of(module):
        assert (mutate.ROOT / file).is_file()


def test_calls_are_seen(monkeypatch):
    monkeypatch.setattr(builtins, "__calls__", set(), raising=False)
    found: dict = {}
    exec(mutate.Marker("m.py").marked('def f():\n    "Words."\n    return lambda: 3\n'), found)
    assert found["f"].__doc__ == "Words."
    assert builtins.__calls__ == set()
    inner = found["f"]()
    assert builtins.__calls__ == {("m.py", 1)}
    assert inner() == 3
    assert builtins.__calls__ == {("m.py", 1), ("m.py", 3)}
