"""Every study there is, in its quick form: all claims hold, table and figure are written."""

import ast
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from launch import reproduce
from launch.studies.optimizers import jumps, relu_jumps
from tasks.dynamics.influence_balancing import OPTIMUM, final_loss
from tasks.dynamics.mujoco_physics import missing

STUDIES = Path(reproduce.__file__).parent / "studies"


# That of `make test`, the cheapest; the others are marked slow, and all together
# run by `pytest -m "slow or not slow" tests/test_studies.py -k quick`.
ALWAYS = {"reversible_regularization"}
PROCESSOR_SECONDS = 180  # About 50 on idle cores; other programs on them make it more than double.


# Without the extra `control` these are not collected; a line of the report says so.
CONTROL = {"swimmer", "swimmer_seeds", "swimmer_variance"}
NAMES = [name for name in reproduce.study_names() if not (missing() and name in CONTROL)]


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if name in ALWAYS else [pytest.mark.slow]) for name in NAMES],
)
def test_quick_study(name, tmp_path):
    """In a process of its own, whose memory and threads go with it, on one device."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.test_studies", name, str(tmp_path)],
        env=os.environ | {"JAX_NUM_CPU_DEVICES": "1"},
        cwd=STUDIES.parents[1],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]


def check(name: str, folder: Path) -> None:
    """All claims hold, the table is one, both files are written, in no more time than said."""
    assert (reproduce.load_study(name).needs == "control") == (name in CONTROL)
    result = reproduce.reproduce(name, folder, quick=True)
    assert result.claims and not [claim for claim in result.claims if not claim.holds]
    assert len({tuple(row) for row in result.table}) == 1  # All rows have the same columns.
    written = json.loads((folder / "result.json").read_text(), parse_constant=pytest.fail)
    assert written["study"] == name and written["quick"] and written["caption"]
    assert len(written["table"]) == len(result.table) and written["data"]
    assert (folder / "figure.png").stat().st_size > 20_000
    for axes in result.figure.axes:
        assert axes.get_xlabel() or axes.get_ylabel() or axes.get_title() or axes.images
        assert axes.has_data()
    assert time.process_time() < PROCESSOR_SECONDS


def test_every_study_is_found_and_has_a_name_of_its_own(tmp_path, monkeypatch):
    names = reproduce.study_names()
    defining = [path.stem for path in STUDIES.rglob("*.py") if "\nSTUDY = " in path.read_text()]
    assert sorted(defining) == names and len(names) > 20 and set(names) > ALWAYS
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
    found = jumps.Slopes(one, one, np.array([6.0, 8.0]), one, np.array([3.0, -4.0]), one)
    percent, error = found.relative
    np.testing.assert_allclose(percent, 100 * np.sqrt((25 - 2) / (100 - 2)))
    np.testing.assert_allclose(error, 100 / np.sqrt(100 - 2))  # Of |gap|, 1 in any direction.
    nothing = found._replace(gap=0.5 * one)
    assert nothing.relative[0] == 0.0


def holding(gap, size_of_gap=lambda setting: 1.0, seen=5.0):
    """What a run finds where slopes are 5, with ReLU derivatives too large by ``gap``."""

    def slopes(gap):
        one = np.ones(8)
        return jumps.Slopes(5 + gap * one, one / 9, 5 * one, one / 9, gap * one, one / 99)

    gaps = {"relu": gap, "tanh": 0.0}
    swept = {
        (name, field, value): slopes(
            gaps[name] * size_of_gap(jumps.JumpSetting(name, **{field: value}))
        )
        for name in gaps
        for field, values in relu_jumps.SWEEPS.items()
        for value in values
    }
    beside = {
        (name, estimator): (5 + gaps[name] if row.differentiates else seen, 0.1)
        for name in gaps
        for estimator, row in jumps.ESTIMATORS.items()
    }
    small = {name: slopes(gap) for name, gap in gaps.items()}
    found = relu_jumps.claims(relu_jumps.Found(small, (*range(8),), 0, beside, swept))
    return [claim.holds for claim in found]


def test_claims_on_jumps_hold_only_where_there_are_jumps():
    def falling(setting):
        return setting.horizon / setting.width / setting.batch

    assert holding(2.0, falling) == [True] * 5
    assert holding(0.0, falling) == [False, True, False, False, False]
    assert holding(2.0, lambda setting: 1.0) == [True, True, True, True, False]  # No trend.
    assert not holding(2.0, lambda setting: 1 / falling(setting))[4]
    assert holding(2.0, falling, seen=7.0)[2] is False  # Evolution strategies miss it too.


def test_final_loss_of_influence_balancing():
    """In the long run ``s[0] = -6 theta``."""
    for theta in (OPTIMUM, 0.5):
        found = final_loss(jnp.float32(theta))
        np.testing.assert_allclose(found, (-6 * theta - 1) ** 2 / 2, atol=1e-5)


def test_directional_slopes_are_those_of_theta():
    """The derivative along the line is that of inner training by theta, times the direction."""
    setting = jumps.JumpSetting("tanh", width=3, batch=4, horizon=3, step_mult=0.01)
    derivative, difference = np.moveaxis(jumps.slopes(setting, (0, 1), 3), -1, 0)
    assert derivative.shape == (2, 3)
    np.testing.assert_allclose(derivative, difference, rtol=0.05, atol=2e-3)  # Smooth: no gap.
    assert len(np.unique(derivative)) == 6


if __name__ == "__main__":
    check(sys.argv[1], Path(sys.argv[2]))
