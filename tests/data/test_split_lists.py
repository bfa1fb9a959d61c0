"""``--split-list``: files that name the rows of a split, as NIH's test_list.txt does."""

from __future__ import annotations

from pathlib import Path

import pytest
from sample_folders import sheet

from featcache.data.dataset import ImageDataset, scan
from featcache.errors import ConfigError, DataError

PATHS = [f"images_00{i // 2 + 1}/{i}.png" for i in range(4)]
BODY = "".join(f"{path.rpartition('/')[2]},a\n" for path in PATHS)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return sheet(tmp_path / "nih", "path,target\n" + BODY, *PATHS)


def splits(dataset: ImageDataset) -> dict[str, str]:
    return {sample.path.rpartition("/")[2]: sample.split for sample in dataset.samples}


def write(folder: Path, name: str, text: str) -> str:
    (folder / name).write_text(text)
    return str(folder / name)


def test_rows_in_no_list_are_to_train_on(data: Path, tmp_path: Path) -> None:
    test = write(tmp_path, "test_list.txt", "3.png\r\n\r\n0.png\r\nother.png")
    dataset = scan(data, split_list={"test": test})
    assert splits(dataset) == {"0.png": "test", "1.png": "train", "2.png": "train", "3.png": "test"}
    assert dataset.notes == (
        "splits: 1 of 3 names of test_list.txt not in the CSV",
        "splits: 2 rows in no --split-list, taken as train",
    )


def test_with_a_list_to_train_on_the_others_are_left_out(data: Path, tmp_path: Path) -> None:
    lists = {"test": write(tmp_path, "t", "3.png"), "train": write(tmp_path, "u", "0.png\n1.png")}
    dataset = scan(data, split_list=lists)
    assert splits(dataset) == {"0.png": "train", "1.png": "train", "3.png": "test"}
    assert dataset.describe_ignored() == ["ignored: 1 (in no --split-list)"]


def test_a_list_is_found_beside_the_csv_too(data: Path) -> None:
    write(data.parent, "test_list.txt", "3.png")
    assert splits(scan(data, split_list={"test": "moved/test_list.txt"}))["3.png"] == "test"


def test_names_are_paths_or_base_names(tmp_path: Path) -> None:
    file = sheet(tmp_path / "d", "path\na/1.png\nb/1.png\nd/a/2.png\n1.png\n",
                 "a/1.png", "b/1.png", "a/2.png", "1.png")  # fmt: skip
    found = scan(file, split_list={"test": write(tmp_path, "t", "d/b/1.png\n2.png\n1.png\n")})
    assert {sample.path: sample.split for sample in found.samples} == {
        "1.png": "test", "a/1.png": "train", "a/2.png": "test", "b/1.png": "test",
    }  # fmt: skip


@pytest.mark.parametrize(("text", "message"), [
    ("", "paths or file names of the CSV, found no lines"), ("x.png\n", "found none of 1"),
    ("0.png\n1.png\n", "each row in one list, found 1.png in two"), ("\xff", "found no UTF-8"),
])  # fmt: skip
def test_odd_lists_are_refused(data: Path, tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "odd").write_bytes(text.encode("latin-1"))
    lists = {"test": write(tmp_path, "t", "1.png"), "valid": str(tmp_path / "odd")}
    with pytest.raises(DataError, match=f"--split-list.*{message}"):
        scan(data, split_list=lists)


def test_other_mistakes_are_refused(data: Path, tmp_path: Path) -> None:
    test = write(tmp_path, "t", "1.png")
    with pytest.raises(DataError, match="--split-list: expected a readable file"):
        scan(data, split_list={"test": tmp_path / "gone.txt"})
    with pytest.raises(ConfigError, match="SPLIT being train, valid or test, found all="):
        scan(data, split_list={"all": test})
    file = sheet(tmp_path / "e", "path,split\na/1.png,train\nb/1.png,\n", "a/1.png", "b/1.png")
    with pytest.raises(DataError, match=r"a CSV without splits.*--ignore-columns"):
        scan(file, split_list={"test": test})
    with pytest.raises(DataError, match=r"names of one row each, found 1.png, of 2 rows"):
        scan(file, split_list={"test": test}, ignore_columns="split")
