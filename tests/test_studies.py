"""Every study there is, in its quick form: all claims hold, table and figure are written."""

import ast
import json
from pathlib import Path

import numpy as np
import pytest

from launch import reproduce
from launch.studies.optimizers import relu_jumps

STUDIES = Path(reproduce.__file__).parent / "studies"


# Each takes more than half a minute of one core, most of it compiling. A new study is not among
# them: it runs with `make test` unless it is named here.
LONG = {
    "estimator_variance",
    "hybrid_es_cluster",
    "hybrid_es_features",
    "hybrid_es_meta",
    "hybrid_es_sigma",
    "hybrid_es_table",
    "long_horizon_truth",
    "lr_schedule",
    "many_hyperparameters",
    "relu_jumps",
    "reversible_chaos",
    "reversible_init_scales",
    "reversible_lr_schedule",
    "reversible_memory",
    "reversible_precision",
}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] if name in LONG else [])
        for name in reproduce.study_names()
    ],
)
def test_quick_study(name, tmp_path):
    result = reproduce.reproduce(name, tmp_path, quick=True)
    assert result.claims and not [claim for claim in result.claims if not claim.holds]
    assert len({tuple(row) for row in result.table}) == 1  # All rows have the same columns.
    written = json.loads((tmp_path / "result.json").read_text(), parse_constant=pytest.fail)
    assert written["study"] == name and written["quick"] and written["caption"]
    assert len(written["table"]) == len(result.table) and written["data"]
    assert (tmp_path / "figure.png").stat().st_size > 20_000
    for axes in result.figure.axes:
        assert axes.get_xlabel() or axes.get_ylabel() or axes.get_title() or axes.images


def test_every_study_is_found_and_has_a_name_of_its_own(tmp_path, monkeypatch):
    names = reproduce.study_names()
    defining = [path.stem for path in STUDIES.rglob("*.py") if "\nSTUDY = " in path.read_text()]
    assert sorted(defining) == names and len(names) > 20 and set(names) >= LONG
    (tmp_path / f"{names[0]}.py").write_text("\nSTUDY = ()")
    folders = [*reproduce.launch.studies.__path__, str(tmp_path)]
    monkeypatch.setattr("launch.studies.__path__", folders)
    with pytest.raises(RuntimeError, match=f"two studies are called `{names[0]}`"):
        reproduce.study_names()


WALL_CLOCKS = {"perf_counter", "perf_counter_ns", "monotonic", "monotonic_ns", "time", "time_ns"}


def test_no_study_reads_a_wall_clock():
    """Claims rest on counted work, or on processor time: the machine may be busy."""
    seen = 0
    for path in STUDIES.rglob("*.py"):
        seen += 1
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                clock = node.value.id == "time" and node.attr in WALL_CLOCKS
                assert not clock, f"{path.name}:{node.lineno} reads time.{node.attr}"
            if isinstance(node, ast.ImportFrom) and node.module == "time":
                raise AssertionError(f"{path.name}: write time.NAME, so that this test sees it")
    assert seen > 20


def test_the_gap_of_a_jumping_loss_is_without_its_noise():
    """Gaps 3 and 4 and slopes 6 and 8 with errors 1: |gap|^2 is less by 2, and |slope|^2."""
    one = np.ones(2)
    found = relu_jumps.Slopes(one, one, np.array([6.0, 8.0]), one, np.array([3.0, -4.0]), one)
    percent, error = found.relative
    np.testing.assert_allclose(percent, 100 * np.sqrt((25 - 2) / (100 - 2)))
    np.testing.assert_allclose(error, 100 / np.sqrt(100 - 2))  # Of |gap|, 1 in any direction.
    nothing = found._replace(gap=0.5 * one)
    assert nothing.relative[0] == 0.0


def test_directional_slopes_are_those_of_theta():
    """The derivative along the line is that of inner training by theta, times the direction."""
    setting = relu_jumps.Setting("tanh", width=3, batch=4, horizon=3, step_mult=0.01)
    derivative, difference = np.moveaxis(relu_jumps.slopes(setting, 2, 3), -1, 0)
    assert derivative.shape == (2, 3)
    np.testing.assert_allclose(derivative, difference, rtol=0.05, atol=2e-3)  # Smooth: no gap.
    assert len(np.unique(derivative)) == 6
