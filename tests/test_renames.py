"""Names beside an output, and renames that replace nothing by mistake."""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path
from typing import NoReturn

import pytest
from failing import failing

from featcache import renames
from featcache.files import write_bytes
from featcache.renames import beside, exchange, remove_temporaries, rename_new

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


def no_renameat2(*_: object) -> NoReturn:
    raise OSError(errno.ENOSYS, "Function not implemented")


@needs_posix
@pytest.mark.parametrize("how", ["renameat2", "link", "neither"])
def test_a_new_name_never_replaces_anything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    if how != "renameat2":
        monkeypatch.setattr(renames, "_rename_by", no_renameat2)
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
