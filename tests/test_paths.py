"""Paths that a user gives."""

from pathlib import Path

import pytest

from learned_opt.paths import user_path, writable_file, writable_folder


def test_home_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert user_path("path", "~/runs/a") == tmp_path / "runs" / "a"
    assert user_path("path", Path("~")) == tmp_path
    assert user_path("path", "runs/~") == Path("runs/~")  # As in a shell.
    assert writable_folder("path", "~/runs/a") == tmp_path / "runs" / "a"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "given", ["", " ", "a\0b", "a\nb", "a\udcffb", None, 3, b"a", "~nobody-of-that-name/a"]
)
@pytest.mark.parametrize("function", [user_path, writable_folder, writable_file])
def test_no_path(function, given):
    with pytest.raises(ValueError, match=r"^--workdir must be"):
        function("--workdir", given)


def test_writable_folder(tmp_path):
    assert writable_folder("path", tmp_path) == tmp_path
    assert writable_folder("path", tmp_path / "a" / "b") == tmp_path / "a" / "b"
    file = tmp_path / "file"
    file.write_text("")
    nowhere, circle = tmp_path / "nowhere", tmp_path / "circle"
    nowhere.symlink_to(tmp_path / "missing")
    circle.symlink_to(circle)
    before = sorted(tmp_path.iterdir())
    for path, problem in (
        (file, "Not a directory"),
        (file / "a", "Not a directory"),
        (nowhere, "No such file"),
        (nowhere / "a", "No such file"),
        (circle / "a", "symbolic links"),
        (tmp_path / ("a" * 300), "name too long"),
        ("/proc/learned_opt", "No such file|not permitted"),  # Nobody can, not even root.
    ):
        with pytest.raises(ValueError, match=rf"^`path` must be a folder.*({problem}).*\.$"):
            writable_folder("path", path)
    assert sorted(tmp_path.iterdir()) == before


def test_writable_file(tmp_path):
    file = tmp_path / "file"
    assert writable_file("--out", file) == file and not file.exists()
    file.write_text("kept")
    assert writable_file("--out", str(file)) == file and file.read_text() == "kept"
    assert writable_file("--out", tmp_path / "a" / "b") == tmp_path / "a" / "b"
    for path, problem in (
        (tmp_path, "it is a folder"),
        (file / "a", "Not a directory"),
        ("/proc/learned_opt/page.html", "No such file|not permitted"),
    ):
        with pytest.raises(ValueError, match=rf"^--out must be a file that.*({problem}).*file\.$"):
            writable_file("--out", path)
    assert list(tmp_path.iterdir()) == [file]
