"""The page about jobs: what is in it, of one and of several, half-done and broken ones too."""

import json
import re
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import optax
import pytest

from launch import leaves, report
from launch.run_report import behaviour, body, figures, folder
from learned_opt.base import learned_optimizer
from tasks import quadratic_family
from tests.jobs import SMALL, run


class Page(HTMLParser):
    """Ids, references to them, what is open, and the text."""

    def __init__(self, text):
        super().__init__()
        self.ids, self.references, self.open, self.words = [], set(), [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        if tag not in ("meta", "br", "use"):
            self.open.append(tag)
        for name, value in attributes:
            if name == "id":
                self.ids.append(value)
            self.references |= set(re.findall(r"url\(#(.*?)\)", value or ""))
            if name.endswith("href"):
                assert value.startswith("#")
                self.references.add(value[1:])

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in ("meta", "br", "use"):
            self.open.pop()

    def handle_endtag(self, tag):
        if tag not in ("meta", "br", "use"):
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    """Two small jobs, the second half-done."""
    base = tmp_path_factory.mktemp("jobs")
    run(base / "first")
    run(base / "second", num_steps=7, meta={"learning_rate": 0.02})
    path = base / "second/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_steps": 21}))
    return base


def written(monkeypatch, *words):
    """The page, as the command writes it."""
    flags = report.flags.FLAGS
    saved = {name: (flags[name].value, flags[name].present) for name in ("workdir", "out")}
    monkeypatch.setattr(sys, "argv", ["report", *words])
    try:
        flags["workdir"].present = 0
        flags(["report", *words])
        assert report.main([]) == 0
    finally:
        for name, (value, present) in saved.items():
            flags[name].value, flags[name].present = value, present


def test_two_jobs_on_one_page(jobs, monkeypatch, tmp_path, capsys):
    before = {p: p.stat().st_mtime_ns for p in jobs.rglob("*") if p.is_file()}
    out = tmp_path / "page.html"
    written(monkeypatch, f"--workdir={jobs / 'first'}", f"--workdir={jobs / 'second'}",
            f"--out={out}")  # fmt: skip
    assert f"wrote {out}" in capsys.readouterr().out
    assert {p: p.stat().st_mtime_ns for p in jobs.rglob("*") if p.is_file()} == before
    text = out.read_text()
    assert not re.search(r"https?:|//|@import|url\([^#]|<script|<img", text)
    page = Page(text)
    assert page.open == [] and len(page.ids) == len(set(page.ids)) > 100
    assert page.references <= set(page.ids)
    said = " ".join(page.words)
    for title, names, *_ in body.FIGURES:
        assert (title in said) == (names[0] != "eval/validation"), title
    for words in ("12 of 12", "finished", "7 of 21", "left", "Outer step 12; task quadratic; 8",
                  "meta.learning_rate", "0.02", "Update size against gradient", "MiB",
                  "Entries of theta", "Theta, leaf by leaf: second", "jax_enable_x64"):  # fmt: skip
        assert words in said, words


def test_a_job_of_this_moment(tmp_path):
    """Nothing but a configuration yet; and folders that are none."""
    with pytest.raises(ValueError, match="must be the folder of a job"):
        folder.read(tmp_path, "x", 0.0)
    (tmp_path / "sweep.csv").write_text("")
    with pytest.raises(ValueError, match="is the folder of a sweep"):
        folder.read(tmp_path, "x", 0.0)
    (tmp_path / "config.json").write_text('{"num_steps": 5, "environment": {"a": 1}')
    (tmp_path / "metrics.jsonl").write_text("")
    job = folder.read(tmp_path, "x", time.time())
    assert (job.step, job.rows, job.seconds_left(), job.config) == (0, [], None, {})
    said = " ".join(Page(body.page([job], {}, {}, "now")).words)
    assert job.damaged_lines == 0
    torn = b'{"step": 1}\n{"step": 2\n\xff\0\n[1]\n{"step": "x"}\n{"step": 3}\n{"st'
    (tmp_path / "metrics.jsonl").write_bytes(torn)
    damaged = folder.read(tmp_path, "x", 0.0)
    assert damaged.step == 3 and damaged.damaged_lines == 4
    with pytest.raises(ValueError, match="a file"):
        folder.read(tmp_path / "config.json", "x", 0.0)
    assert "no rows yet" in said and "None yet." in said and "Not evaluated yet" in said


@pytest.mark.parametrize("name", ["config.json", "metrics.jsonl", "page", "optimizer"])
def test_what_is_no_page_is_not_overwritten(name, jobs, monkeypatch):
    before = {p: p.read_bytes() for p in jobs.rglob("*") if p.is_file()}
    words = [f"--workdir={jobs / 'first'}", f"--out={jobs / 'first' / name}"]
    with pytest.raises(ValueError, match=r"--out must be a (page|file)"):
        written(monkeypatch, *words)
    assert {p: p.read_bytes() for p in jobs.rglob("*") if p.is_file()} == before


def test_rows_without_what_every_row_has(tmp_path):
    """As somebody wrote, or edited: the page says what there is."""
    (tmp_path / "config.json").write_text('{"num_steps": 50}')
    for row in (
        {"step": 30, "meta_loss": 2.0},
        {"step": 30, "total_inner_steps": None, "time/wall_seconds": None, "meta_loss": None},
    ):
        sound = [
            {"step": n, "meta_loss": 1.0, "total_inner_steps": 8 * n, "time/wall_seconds": 2.0 * n}
            for n in (10, 20)
        ]
        for rows in ([*sound, row], [row]):
            (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
            job = folder.read(tmp_path, "x", time.time())
            said = " ".join(Page(body.page([job], {}, {}, "now")).words)
            assert "30 of 50" in said and "nan" not in said
            assert ("160" in said) == (len(rows) == 3)
            assert job.seconds_left() == (40 if len(rows) == 3 else None)


@pytest.mark.parametrize("released", [True, False])
def test_a_stopped_job_is_not_said_to_go_on(released, tmp_path, monkeypatch):
    row = {"meta_loss": 1.0, "total_inner_steps": 8}
    rows = [row | {"step": n, "time/wall_seconds": float(n)} for n in (1, 2, 3)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "config.json").write_text(json.dumps({"num_steps": 10}))
    (tmp_path / "lock").write_text(json.dumps({"released": released}) + " " * 90 + "\n")
    written(monkeypatch, f"--workdir={tmp_path}")
    text = (tmp_path / "report.html").read_text()
    assert ("stopped; the same command continues it" in text) == released


def test_time_left_is_that_of_the_late_rows(tmp_path):
    rows = [{"step": 10, "time/wall_seconds": 500.0}]
    rows += [{"step": 10 + i, "time/wall_seconds": 500 + 2.0 * i} for i in range(1, 11)]
    job = folder.JobFolder("x", tmp_path, rows, 0, {"num_steps": 50}, {}, [], {}, 0.0)
    assert job.seconds_left() == 60
    rows[-1]["loss"] = None
    steps, values = job.series("loss")
    assert steps == [20] and np.isnan(values[0])


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["a/b"], ["b"]),
        (["a/b", "c/b"], ["a/b", "c/b"]),
        (["x/a/b", "y/a/b", "d"], ["x/a/b", "y/a/b", "d"]),
    ],
)
def test_names_are_as_short_as_they_tell_jobs_apart(paths, names):
    assert report.short([f"/{path}" for path in paths]) == names
    with pytest.raises(ValueError, match="each job once"):
        report.short([*paths, paths[0]])


def test_an_inner_run_by_hand():
    """Plain SGD: an update is the learning rate times the gradient, and the loss falls."""
    optimizer = learned_optimizer(lambda key: None, lambda rate, steps: optax.sgd(rate))
    found = behaviour.inner_run(quadratic_family(dim=3), optimizer, np.float32(0.03), 6, seed=1)
    assert found.updates.shape == found.grads.shape == found.params.shape == (6, 1)
    np.testing.assert_allclose(found.updates[0], 0.03 * found.grads[0], rtol=1e-5)
    assert found.losses[-1] < found.losses[0] and len(found.layers) == 1


def test_long_curves_are_means_of_neighbours():
    steps = np.arange(1.0, 3 * figures.POINTS + 1)
    values = np.where(steps == 2, np.nan, steps)
    x, y = figures.thinned(steps, values)
    assert len(x) == figures.POINTS and x[0] == 2 and y[0] == 2 and y[1] == 5
    assert figures.thinned(steps[:9], values[:9])[0] is not None


def test_leaves_by_hand():
    tree = {"a": np.array([3.0, 4.0]), "b": np.array([1.0])}
    found = leaves.measure(
        lambda v: {"a": v[:2], "b": v[2:]},
        np.array([3.0, 4.0, 0.0]),
        np.concatenate([tree["a"], tree["b"]]),
        np.array([np.nan, 2.0, -2.0]),
    )
    assert found["theta_rms/a"] == np.sqrt(12.5) and found["theta_rms/b"] == 1
    assert (found["update_rms/a"], found["update_rms/b"], found["meta_grad_rms/b"]) == (0, 1, 2)
    low, high, counts = found["meta_grad_histogram"].values()
    assert (sum(counts), counts[0], counts[-1], low, high) == (2, 1, 1, -2, 2)
    assert len(counts) == leaves.BINS and leaves.histogram(np.array([np.inf])) is None
    assert SMALL.eval_every  # `jobs` has them in its rows.


def test_every_metric_is_in_the_table_of_the_docs(jobs):
    """And what the table says is logged: by these jobs, or by a line of the source."""
    root = Path(__file__).parent.parent
    page = (root / "docs/tracking.md").read_text().partition("With several tasks")[0]
    cells = re.findall(r"^\| (`.*?) \|", page, re.M)
    documented = {name for cell in cells for name in re.findall(r"`([^`]+)`", cell)}
    rows = [row for name in ("first", "second") for row in folder.read(jobs / name, "", 0).rows]
    logged = {re.sub(r"(_rms)/.*", r"\1/LEAF", name) for row in rows for name in row}
    assert logged <= documented and len(logged) > 15
    source = "".join(
        p.read_text() for d in ("launch", "meta_train") for p in (root / d).rglob("*.py")
    )
    for name in documented - logged:
        assert f'"{name.removesuffix("/TASK")}"' in source, name
    assert {"sigma", "eval/validation", "eval/validation/TASK"} == documented - logged
