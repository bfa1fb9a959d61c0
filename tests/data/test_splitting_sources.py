"""What can be split besides class folders: a CSV, and images without classes."""

import csv

import pytest
from sample_folders import plain, plant, sheet, write_files

from featcache.data.dataset import scan
from featcache.data.splitting import split
from featcache.errors import ConfigError, DataError


def rows_of(file):
    with file.open(newline="", encoding="utf-8") as opened:
        return [*csv.DictReader(opened)]


def write_list(folder, header="path,target,group"):
    """Write images of twelve patients in one folder, half of them of class b, and a CSV of them."""
    write_files(folder, {f"images/{n}.png": None for n in range(60)})
    lines = [f"images/{n}.png,{'ab'[n % 2]},p{n % 12}" for n in range(60)]
    (folder / "all.csv").write_text("\n".join([header, *lines]))
    return folder / "all.csv"


def test_a_csv_becomes_a_csv_with_splits(tmp_path):
    source, said = write_list(tmp_path / "d"), []
    summary = split(source, tmp_path / "lists" / "split.csv", say=said.append)
    assert (summary.num_groups, summary.classes, summary.mode) == (12, ("a", "b"), "csv")
    assert "groups: 12, of the CSV" in said
    rows = rows_of(tmp_path / "lists" / "split.csv")
    wanted = {(r["path"], r["target"], r["group"]) for r in rows_of(source)}
    assert {(r["path"].removeprefix("../d/"), r["target"], r["group"]) for r in rows} == wanted
    assert {r["split"] for r in rows} == {"train", "valid", "test"}
    splits = {}
    for row in rows:
        splits.setdefault(row["group"], set()).add(row["split"])
    assert all(len(found) == 1 for found in splits.values())
    assert len(scan(tmp_path / "lists" / "split.csv").samples) == 60
    # as the same images, paths and groups in class folders
    for row in rows_of(source):
        target = tmp_path / "raw" / row["target"] / row["group"] / row["path"].rpartition("/")[2]
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((tmp_path / "d" / row["path"]).read_bytes())
    folders = split(tmp_path / "raw", tmp_path / "raw.csv", group_by_path=r"/?(p\d+)/")
    assert folders.counts["train"] == summary.counts["train"]


def test_absolute_paths_stay_absolute(tmp_path):
    source = plain(tmp_path / "raw", a=5, b=5)
    lines = [f"{path.as_posix()},{path.parent.name}" for path in source.rglob("*.png")]
    (tmp_path / "all.csv").write_text("\n".join(["path,target", *lines]))
    split(tmp_path / "all.csv", tmp_path / "split.csv")
    assert {f"{r['path']},{r['target']}" for r in rows_of(tmp_path / "split.csv")} == {*lines}
    assert split(tmp_path / "all.csv", tmp_path / "again.csv").num_groups is None


def test_headers_of_a_csv_are_named(tmp_path):
    source = write_list(tmp_path, "path,diagnosis,patient_id")
    with pytest.raises(DataError, match="'diagnosis' "):
        split(source, tmp_path / "split.csv")
    columns = {"target": "diagnosis", "group": "patient_id"}
    assert split(source, tmp_path / "split.csv", columns=columns).num_groups == 12
    summary = split(
        source, tmp_path / "one.csv", columns={"target": "diagnosis"}, ignore_columns="patient_id"
    )
    assert (summary.num_groups, len(rows_of(tmp_path / "one.csv"))) == (None, 60)
    with pytest.raises(ConfigError, match="--columns: expected a CSV"):
        split(plain(tmp_path / "raw", a=3), tmp_path / "x.csv", columns=columns)


def test_a_csv_that_is_split_already_is_split_anew_on_request(tmp_path):
    split(write_list(tmp_path), tmp_path / "split.csv")
    with pytest.raises(DataError, match=r"not yet split, found rows of train, valid, test .*anew"):
        split(tmp_path / "split.csv", tmp_path / "again.csv", seed=1)
    split(tmp_path / "split.csv", tmp_path / "again.csv", seed=1, ignore_columns="split")
    split(tmp_path / "all.csv", tmp_path / "first.csv", seed=1)
    assert (tmp_path / "again.csv").read_bytes() == (tmp_path / "first.csv").read_bytes()


def test_a_csv_becomes_no_tree(tmp_path):
    with pytest.raises(DataError, match=r"a new \.csv for a SOURCE that is a CSV, found a folder"):
        split(write_list(tmp_path), tmp_path / "tree")


def test_rows_without_a_class_are_shared_out_too(tmp_path):
    text = "path,target\n" + "".join(f"{n}.png,{'a' * (n % 2)}\n" for n in range(40))
    source = sheet(tmp_path, text, *(f"{n}.png" for n in range(40)))
    summary = split(source, tmp_path / "split.csv", fractions=(0.5, 0.25, 0.25))
    assert summary.counts["valid"] == {"a": 5, "unlabelled": 5}
    assert scan(tmp_path / "split.csv").count()["test"] == {"unlabelled": 5, "a": 5}


def test_folders_that_are_no_classes_are_split_as_they_are(tmp_path):
    paths = [f"images_00{n % 3}/{n}.png" for n in range(30)]
    source = plant(tmp_path / "nih", *paths)
    summary = split(source, tmp_path / "dst", no_classes=True, fractions=(0.8, 0.1, 0.1))
    assert summary.classes == ()
    assert summary.counts == {
        "train": {"unlabelled": 24}, "valid": {"unlabelled": 3}, "test": {"unlabelled": 3},
    }  # fmt: skip
    dataset = scan(tmp_path / "dst", no_classes=True)
    assert sorted(s.path.partition("/")[2] for s in dataset.samples) == sorted(paths)
    split(source, tmp_path / "m.csv", no_classes=True)
    assert {row["target"] for row in rows_of(tmp_path / "m.csv")} == {""}
    flat = plant(tmp_path / "flat", *(f"{n}.png" for n in range(9)))
    with pytest.raises(DataError, match=r"found layout images .*--no-classes"):
        split(flat, tmp_path / "x")
    assert split(flat, tmp_path / "x", no_classes=True).counts["train"] == {"unlabelled": 6}
