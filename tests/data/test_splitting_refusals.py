"""What cannot be split is refused in one line, and nothing half written stays."""

import shutil
from collections import namedtuple
from pathlib import Path

import pytest
from sample_folders import PATIENT, plain, write_files

from featcache.data import split_outputs
from featcache.data.dataset import scan
from featcache.data.splitting import split
from featcache.errors import ConfigError, DataError, FeatcacheError, FeatcacheWarning

# Refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"fractions": (0.7, 0.3)}, ConfigError, "three shares"),
        ({"fractions": (0.7, 0.2, 0.2)}, ConfigError, "add up to 1, found 0.7,0.2,0.2"),
        ({"fractions": (70, 15, 15)}, ConfigError, "--fractions"),
        ({"fractions": (1.2, -0.1, -0.1)}, ConfigError, "--fractions"),
        ({"fractions": (float("nan"), 0.5, 0.5)}, ConfigError, "--fractions"),
        ({"mode": "move"}, ConfigError, "one of copy, symlink, hardlink, found move"),
        ({"group_by": r"\d+"}, ConfigError, "--group-by"),
        ({"classes": ["a", "covid"]}, DataError, "some of a, b, tiny, found 'covid'"),
        ({"classes": []}, DataError, "--classes"),
        ({"classes": None}, DataError, "class tiny: expected at least 3 images .* enough for 2"),
    ],
)
def test_senseless_options_are_refused(tmp_path, options, error, message):
    source = plain(tmp_path / "raw", a=5, b=5, tiny=2)
    with pytest.raises(error, match=message):
        split(source, tmp_path / "dst", **({"classes": ["a", "b"]} | options))
    assert [path.name for path in tmp_path.iterdir()] == ["raw"]


def test_a_class_of_too_few_groups_is_refused(tmp_path):
    source = write_files(tmp_path / "raw", {f"a/p{n % 2}_{n}.png": None for n in range(20)})
    write_files(source, {f"b/p{n}_{n}.png": None for n in range(10, 20)})
    with pytest.raises(DataError, match=r"class a: .* different groups.* enough for 2"):
        split(source, tmp_path / "m.csv", group_by=PATIENT)
    write_files(source, {"a/p2_0.png": None})
    counts = split(source, tmp_path / "m.csv", group_by=PATIENT).counts
    assert sorted(counts[name]["a"] for name in counts) == [1, 10, 10]


def test_small_classes_reach_every_split(tmp_path):
    source = plain(tmp_path / "raw", a=3, b=4, c=5, d=200)
    counts = split(source, tmp_path / "m.csv", fractions=(0.9, 0.05, 0.05)).counts
    assert all(count for per_class in counts.values() for count in per_class.values())
    assert counts["train"] == {"a": 1, "b": 2, "c": 3, "d": 180}


def test_a_fraction_of_zero_leaves_a_split_out(tmp_path):
    source = plain(tmp_path / "raw", a=10, b=2)
    counts = split(source, tmp_path / "dst", fractions=(0.5, 0, 0.5)).counts
    assert counts == {"train": {"a": 5, "b": 1}, "test": {"a": 5, "b": 1}}
    assert sorted(path.name for path in (tmp_path / "dst").iterdir()) == ["test", "train"]


def test_what_is_split_already_is_refused(tmp_path):
    source = plain(tmp_path / "raw", a=5, b=5)
    split(source, tmp_path / "dst")
    with pytest.raises(DataError, match="not yet split, found layout splits"):
        split(tmp_path / "dst", tmp_path / "again")


def test_destinations_that_are_taken(tmp_path):
    source = plain(tmp_path / "raw", a=5, b=5)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "m.csv").write_text("mine")
    (tmp_path / "folder.csv").mkdir()
    for name in ("full", "file", "m.csv", "folder.csv"):
        with pytest.raises(DataError, match="already there"):
            split(source, tmp_path / name)
    assert (tmp_path / "m.csv").read_text() == "mine"
    for place in (source, source / "dst", source / "a" / "dst"):
        with pytest.raises(DataError, match="split destination"):
            split(source, place)
    (tmp_path / "empty").mkdir()
    split(source, tmp_path / "empty")
    assert len(scan(tmp_path / "empty").samples) == 10


def test_a_full_disk_is_noticed_before(tmp_path, monkeypatch):
    source = plain(tmp_path / "raw", a=5, b=5)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(100, 20, 80))
    with pytest.raises(DataError, match="90 bytes free for a copy, found 80"):
        split(source, tmp_path / "new" / "dst")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_nothing_half_written_stays(tmp_path, monkeypatch, failure):
    source = plain(tmp_path / "raw", a=5, b=5)
    copy, calls = shutil.copyfileobj, []

    def fail_later(*arguments):
        calls.append(arguments)
        if len(calls) == 6:
            raise failure
        copy(*arguments)

    monkeypatch.setattr(shutil, "copyfileobj", fail_later)
    with pytest.raises((FeatcacheError, KeyboardInterrupt), match=r"^disk space: expected|^$"):
        split(source, tmp_path / "dst")
    assert len(calls) == 6
    assert [path.name for path in tmp_path.iterdir()] == ["raw"]
    monkeypatch.undo()
    (tmp_path / "dst.partial").mkdir()  # what a killed run leaves
    (tmp_path / "dst.partial" / "half").write_text("half")
    with pytest.raises(FeatcacheError, match=r"found dst\.partial .*Remove or rename it"):
        split(source, tmp_path / "dst")  # nobody knows whose it is
    assert (tmp_path / "dst.partial" / "half").read_text() == "half"


def test_links_that_cannot_be_made_are_an_error(tmp_path, monkeypatch):
    def refuse(self, target):
        raise OSError(18, "Invalid cross-device link", str(target), None, str(self))

    monkeypatch.setattr(Path, "hardlink_to", refuse)
    with pytest.raises(DataError, match=r"Invalid cross-device link.*--mode copy always works"):
        split(plain(tmp_path / "raw", a=5, b=5), tmp_path / "dst", mode="hardlink")


def test_a_class_without_any_group_is_warned_of(tmp_path):
    source = plain(tmp_path / "raw", a=10)
    write_files(source, {f"b/p{n}_0.png": None for n in range(9)} | {"b/odd.png": None})
    lines = []
    with pytest.warns(FeatcacheWarning, match="matches no file name of a:"):
        summary = split(source, tmp_path / "m.csv", group_by=PATIENT, say=lines.append)
    assert summary.num_matched == {"a": 0, "b": 9}
    assert summary.num_groups == 20
    assert "groups: 20; named in 0 of 10 a, 9 of 10 b" in lines[0]


@pytest.mark.parametrize("clash", ["a/X.PNG", "a/sub/1.png"])
def test_names_that_a_disk_takes_for_one_are_refused(tmp_path, monkeypatch, clash):
    """On a disk that ignores case two folders of images would become one."""
    source = plain(tmp_path / "raw", a=5, b=5)
    write_files(source, dict.fromkeys(["a/x.png", "a/Sub/1.png", clash]))
    options = {"fractions": (1, 0, 0)}
    monkeypatch.setattr(split_outputs, "ignores_case", lambda folder: folder.name == "new")
    with pytest.raises(DataError, match=r"one that takes train/\S+ and train/\S+ for the same"):
        split(source, tmp_path / "dst", **options)
    assert [path.name for path in tmp_path.iterdir()] == ["raw"]
    monkeypatch.undo()
    split(source, tmp_path / "dst", **options)
