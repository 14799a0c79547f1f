"""Every study there is, in its quick form: all claims hold, table and figure are written."""

import json
import re

import matplotlib.figure
import pytest

from launch import reproduce


@pytest.mark.parametrize("name", reproduce.study_names())
def test_quick_study(name, tmp_path, monkeypatch):
    drawn = []
    save = matplotlib.figure.Figure.savefig

    def savefig(figure, *args, **kwargs):
        drawn.append(figure)
        save(figure, *args, **kwargs)

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", savefig)
    result = reproduce.reproduce(name, str(tmp_path), quick=True)
    assert result.claims and not [claim for claim in result.claims if not claim.holds]
    assert len({tuple(row) for row in result.table}) == 1  # All rows have the same columns.
    written = json.loads((tmp_path / "result.json").read_text(), parse_constant=pytest.fail)
    assert written["study"] == name and written["quick"]
    assert len(written["table"]) == len(result.table)
    assert (tmp_path / "figure.png").stat().st_size > 20_000
    title = drawn[0].get_suptitle()
    assert re.search(r"\d", title), "a figure's title says the task, the horizon, the seeds"
    for axes in drawn[0].axes:
        if axes.has_data() and axes.get_xticks().size:
            assert axes.get_xlabel() or axes.get_ylabel() or axes.get_title()


def test_a_name_belongs_to_one_study(tmp_path, monkeypatch):
    name = reproduce.study_names()[0]
    (tmp_path / f"{name}.py").write_text("STUDY = None or ()")
    monkeypatch.setattr(
        "launch.studies.__path__", [*reproduce.launch.studies.__path__, str(tmp_path)]
    )
    with pytest.raises(RuntimeError, match=f"two studies are called `{name}`"):
        reproduce.study_names()
