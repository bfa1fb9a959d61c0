"""Names beside an output, and renames that replace nothing by mistake."""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path

import pytest
from failing import failing

from featcache import renames
from featcache.errors import ConfigError
from featcache.files import write_bytes
from featcache.outputs import Kind, Output
from featcache.renames import (
    beside,
    exchange,
    find_windows_fault,
    ignores_case,
    remove_temporaries,
    rename_new,
)

needs_posix = pytest.mark.skipif(sys.platform == "win32", reason="links and long names of POSIX")


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


@needs_posix
@pytest.mark.parametrize("name", ["n" * 255, "ä" * 127, "n" * 250 + ".h5"])
def test_names_as_long_as_the_system_allows_have_companions(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    write_bytes(path, b"x")
    write_bytes(path, b"y")
    assert [p.name for p in tmp_path.iterdir()] == [name]
    partial, other = beside(path, ".partial"), beside(tmp_path / (name[:-1] + "m"), ".partial")
    assert partial != other
    partial.mkdir()


@needs_posix
def test_only_temporaries_of_that_file_are_removed(tmp_path: Path) -> None:
    ours, long = "0123456789abcdef.tmp", "n" * 255
    mine = [".a.notes.tmp", ".a.77.tmp", f".a.b.{ours}", f"a.{ours}", ".a.0123456789abcdef.tmp2"]
    for name in [f".a.{ours}", *mine]:
        (tmp_path / name).write_bytes(b"x")
    remove_temporaries(tmp_path / "a")
    assert names(tmp_path) == sorted(mine)
    beside(tmp_path / long, f".{ours}", ".").touch()
    remove_temporaries(tmp_path / ("n" * 254 + "m"))
    assert len(names(tmp_path)) == len(mine) + 1
    remove_temporaries(tmp_path / long)
    assert names(tmp_path) == sorted(mine)


@needs_posix
@pytest.mark.parametrize("how", ["renameat2", "EINVAL", "ENOSYS", "EPERM", "neither"])
def test_a_new_name_never_replaces_anything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    if how != "renameat2":
        code = getattr(errno, how, errno.ENOSYS)  # EPERM: as containers forbid it
        monkeypatch.setattr(renames, "_rename_by", failing(OSError(code, os.strerror(code))))
        assert not exchange(tmp_path / "a", tmp_path / "b")
    if how == "neither":
        monkeypatch.setattr(os, "link", failing(PermissionError(errno.EPERM, "no links")))
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "letter").write_text("dear")
    (tmp_path / "link").symlink_to("file")
    (tmp_path / "dangling").symlink_to("nowhere")
    before = names(tmp_path)
    for target in ("file", "folder", "link", "dangling"):
        (tmp_path / "new").write_text("new")
        with pytest.raises(FileExistsError):
            rename_new(tmp_path / "new", tmp_path / target)
        (tmp_path / "new").unlink()
        (tmp_path / "new").mkdir()
        with pytest.raises(FileExistsError):
            rename_new(tmp_path / "new", tmp_path / target)
        (tmp_path / "new").rmdir()
        assert names(tmp_path) == before
    (tmp_path / "new").write_text("new")
    rename_new(tmp_path / "new", tmp_path / "name")
    assert (tmp_path / "name").read_text() == "new"
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "name",
    ["nul.csv", "CON", "aux.h5", "Com1.tar.gz", "lpt³", "NUL .csv", "run.", "run ", "a.h5:b",
     "a?.csv", "a|b", "tab\t"],
)  # fmt: skip
def test_names_that_windows_would_write_elsewhere_are_no_outputs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    output = Output(tmp_path / name, "CACHE", Kind("cache", "a new file"))
    output.check()
    monkeypatch.setattr(sys, "platform", "win32")
    with pytest.raises(ConfigError, match=r"CACHE: expected a new file, found .*Windows.* another"):
        output.check()


@pytest.mark.parametrize("name", ["null.csv", "a.nul", "com10", "c.h5.partial", "ä b.h5", ".a"])
def test_other_names_are_outputs_on_windows(name: str) -> None:
    assert find_windows_fault(name) is None


def test_whether_case_counts_is_asked_of_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "new").mkdir()
    assert not ignores_case(tmp_path / "new")  # Linux' own file systems
    (tmp_path / "NEW").mkdir()
    assert not ignores_case(tmp_path / "new")
    (tmp_path / "NEW").rmdir()
    (tmp_path / "NEW").symlink_to("new")  # the nearest thing to a disk that ignores case
    assert ignores_case(tmp_path / "new")
