"""Folders that are not what their place says: named, and never left out without a word."""

from __future__ import annotations

import os
import re
import sys
import zipfile
from pathlib import Path

import pytest
from sample_folders import plant, table

from featcache.data.dataset import scan
from featcache.data.splitting import split
from featcache.errors import DataError, FeatcacheWarning

needs_posix = pytest.mark.skipif(sys.platform != "linux", reason="names that are not UTF-8")


def pack(folder: Path) -> Path:
    """Return a zip of a folder's files, the folder itself not in it."""
    with zipfile.ZipFile(folder.with_suffix(".zip"), "w") as archive:
        for file in sorted(folder.rglob("*.png")):
            archive.write(file, file.relative_to(folder))
    return folder.with_suffix(".zip")


DEEPER: dict[str, tuple[tuple[str, ...], str]] = {
    "splits in the only folder": (
        ("x/train/a/1.png", "x/train/b/2.png", "x/test/a/3.png", "x/test/b/4.png"), "test, train",
    ),
    "a train alone": (("x/train/a/1.png", "x/train/b/2.png"), "train"),
    "splits in every class": (
        ("a/train/1.png", "a/val/2.png", "b/train/3.png", "b/val/4.png"), "train, val",
    ),
    "splits beside images": (("a/1.png", "a/Train/x/2.png", "b/3.png"), "Train"),
    "splits in a split": (("train/x/train/a/1.png", "train/x/test/a/2.png"), "test, train"),
}  # fmt: skip


@pytest.mark.parametrize("name", DEEPER)
@pytest.mark.parametrize("kind", ["folder", "zip", "zip of a zip's folder"])
def test_splits_where_images_should_be_are_named(name: str, kind: str, tmp_path: Path) -> None:
    paths, found = DEEPER[name]
    top = "top/" if kind.startswith("zip of") else ""
    root = plant(tmp_path / "d", *(top + path for path in paths))
    if kind == "zip" and paths[0].startswith("x/"):  # the one top folder of a zip is skipped
        assert scan(pack(root)).classes == ("a", "b")
        return
    with pytest.raises(DataError, match=rf"class folder: .*the split folders {found}"):
        scan(root if kind == "folder" else pack(root))


def test_the_folder_to_name_is_told(tmp_path: Path) -> None:
    plant(tmp_path / "d", *DEEPER["splits in the only folder"][0])
    wanted = re.escape(f"Name the folder that holds them: {tmp_path / 'd' / 'x'}")
    with pytest.raises(DataError, match=wanted):
        scan(tmp_path / "d")
    assert scan(tmp_path / "d" / "x").classes == ("a", "b")
    plant(tmp_path / "e", *DEEPER["splits in every class"][0])
    with pytest.raises(DataError, match="Set splits above classes"):
        split(tmp_path / "e", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("paths", [
    ("covid/test/1.png", "normal/2.png"),  # a kind of test
    ("vehicles/train/1.png", "vehicles/car/2.png", "animals/cat/3.png"),
    ("covid/p1/1.png", "covid/p2/1.png", "normal/p3/1.png"),
    ("train/a/p1/1.png", "train/b/p2/2.png", "valid/a/1.png", "valid/b/2.png"),
    ("1.png", "2.png"), ("a/1.png",), ("a/x/1.png",),
])  # fmt: skip
def test_ordinary_folders_ask_nothing(paths: tuple[str, ...], tmp_path: Path) -> None:
    assert len(scan(plant(tmp_path / "d", *paths)).samples) == len(paths)


@pytest.mark.parametrize("prefix", ["archive/", "train/archive/"])
def test_classes_a_level_too_deep_are_warned_of(prefix: str, tmp_path: Path) -> None:
    root = plant(tmp_path / "d", prefix + "covid/1.png", prefix + "normal/2.png")
    with pytest.warns(FeatcacheWarning, match="'archive' is the only class .*'covid' and 'normal'"):
        assert scan(root).classes == ("archive",)


@needs_posix
@pytest.mark.parametrize("path", ["caf\udce9/1.png", "train/caf\udce9/1.png"])
def test_a_class_folder_that_is_not_utf8_is_named(path: str, tmp_path: Path) -> None:
    others = ("train/a/1.png",) if path.startswith("train") else ("a/1.png",)
    root = plant(tmp_path / "d", *others)
    file = Path(os.fsdecode(os.fsencode(root) + b"/" + os.fsencode(path)))
    file.parent.mkdir(parents=True)
    file.write_bytes(b"1")
    with pytest.raises(DataError, match=r"classes: expected names in UTF-8.*caf.udce9.*Rename it"):
        scan(root)
    with pytest.raises(DataError, match=r"caf.udce9"):
        split(root, tmp_path / "out")


@needs_posix
def test_a_folder_below_a_class_need_not_be_utf8(tmp_path: Path) -> None:
    root = plant(tmp_path / "d", "a/1.png", "b/2.png")
    for path in ("b/p\udcff/3.png", "b/p\udcff/q\udcfe/4.png"):
        (root / path).parent.mkdir()
        (root / path).write_bytes(b"1")
    assert table(scan(root)) == [
        ("all", "a", "a/1.png"), ("all", "b", "b/2.png"), ("all", "b", "b/p\udcff/3.png"),
        ("all", "b", "b/p\udcff/q\udcfe/4.png"),
    ]  # fmt: skip
    assert not scan(root).num_ignored


@pytest.mark.parametrize("name", ["b/4X.png", "bX/4.png", "X.png", "b/4.pngX", "b/X"])
def test_a_zip_name_with_nul_is_named(name: str, tmp_path: Path) -> None:
    """zipfile cuts a name off at a NUL: ``b/4.png`` of ``b/4.png<NUL>.txt``."""
    file = tmp_path / "d.zip"
    with zipfile.ZipFile(file, "w") as archive:
        for path in ("a/1.png", "a/2.png", "b/3.png", name):
            archive.writestr(path, path)
    file.write_bytes(file.read_bytes().replace(name.encode(), name.replace("X", "\0").encode()))
    with pytest.raises(DataError, match=r"zip member: expected a name without NUL, found .*x00"):
        scan(file)
