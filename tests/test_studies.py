"""Every study, in its quick version: all claims hold, and its files are written."""

import json

import pytest

from launch import reproduce


@pytest.mark.parametrize(
    "name",
    [
        "estimator_variance",
        "influence_balancing",
        "learned_optimizer",
        "lr_schedule",
        "many_hyperparameters",
        "table1",
        "toy_regression",
    ],
)
def test_quick_study(name, tmp_path):
    result = reproduce.reproduce(name, str(tmp_path), quick=True)
    failed = [claim for claim in result.claims if not claim.holds]
    assert not failed
    written = json.loads((tmp_path / "result.json").read_text())
    assert written["study"] == name and written["quick"] and written["table"]
    assert (tmp_path / "figure.png").stat().st_size > 20_000
