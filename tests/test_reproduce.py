"""The reproduce command: exit codes, files, and what it says about wrong names."""

import json
import os
import re
import subprocess
import sys

import pytest

from launch import reproduce

STUDY_SOURCE = """
from matplotlib.figure import Figure

from launch.studies.base import Claim, Result, Study


def run(quick, data_dir):
    figure = Figure()
    figure.add_subplot().plot([1, 2])
    data = dict(values=[1, float("inf")])
    claim = Claim("One is {relation} two.", 1 {relation} 2, f"quick={{quick}}")
    return Result([claim], [dict(name="one", value=1.0)], figure, data, "2 seeds")


STUDY = Study("compares one and two", 0.1, run)
"""


@pytest.fixture
def studies(tmp_path):
    """A folder with a study whose claim holds and one whose claim does not."""
    folder = tmp_path / "studies"
    folder.mkdir()
    (folder / "below.py").write_text(STUDY_SOURCE.format(relation="<"))
    (folder / "above.py").write_text(STUDY_SOURCE.format(relation=">"))
    return folder


def command(studies, *args):
    """Runs the command in a process of its own, with the studies of a folder added."""
    program = (
        f"import runpy, launch.studies; launch.studies.__path__.append({str(studies)!r}); "
        "runpy.run_module('launch.reproduce', run_name='__main__')"
    )
    return subprocess.run(
        [sys.executable, "-c", program, *args],
        env={**os.environ, "PYTHONPATH": os.getcwd()},
        capture_output=True,
        text=True,
    )


def test_a_study_whose_claims_hold_exits_with_zero(studies, tmp_path):
    done = command(studies, "below", f"--workdir={tmp_path}/out", "--quick")
    assert done.returncode == 0, done.stderr
    assert "[holds] One is < two." in done.stdout
    result = json.loads((tmp_path / "out/result.json").read_text())
    assert result["claims"] == [
        {"sentence": "One is < two.", "holds": True, "evidence": "quick=True"}
    ]
    assert result["data"] == {"values": [1, None]} and result["caption"] == "2 seeds"
    assert not re.search(r"^[IW]\d{4} ", done.stderr, re.M), done.stderr  # No log lines.
    assert (tmp_path / "out/figure.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "figure.png",
        "result.json",
    ]


def test_a_failed_claim_exits_with_a_code_of_its_own(studies, tmp_path):
    done = command(studies, "above", f"--workdir={tmp_path}/out")
    assert done.returncode == reproduce.CLAIM_FAILED, done.stderr
    assert "[FAILS] One is > two." in done.stdout


def test_an_unknown_name_lists_the_valid_ones(studies, tmp_path):
    done = command(studies, "belo", f"--workdir={tmp_path}/out")
    assert done.returncode == 2
    assert "there is no study `belo`" in done.stderr
    assert "above" in done.stderr and "below" in done.stderr
    with pytest.raises(ValueError, match="no study `base`"):
        reproduce.load_study("base")


def test_a_table_has_aligned_columns():
    table = reproduce.format_table([{"name": "a", "value": 1.23456}, {"name": "bcd", "value": 2}])
    assert table == "name  value\na     1.235\nbcd   2"
