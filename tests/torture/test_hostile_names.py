"""Names made to harm, as files, classes and groups, through the real commands and their output.

JSON gives every name back as it is; a CSV does so by ``plain_cell`` and holds no formula; what a
terminal gets holds no control character. Nothing writes HTML yet: whoever does must escape.
"""

from __future__ import annotations

import csv
import json
import os
import unicodedata
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bounded import command
from PIL import Image

from featcache.csv_files import plain_cell
from featcache.data.dataset import scan
from featcache.errors import DataError

NAMES = {
    "terminal commands": "\x1b[31mred\x1b]0;owned\x07",
    "one-byte command": "a\x9b31mb\x7f",
    "right to left": "gpj.\u202egnp",
    "newline": "a\nfeatcache: all is well",
    "carriage return": "bad\rgood",
    "tab": "\tname",
    "equals": '=HYPERLINK("http:x","y")',
    "plus": "+1+1",
    "minus": "-1+1",
    "at": "@SUM(1)",
    "quotes": "a\"b,c'd;e",
    "apostrophe": "'=1",
    "script": "<script>alert(1)",
    "image": "<img src=x onerror=alert(1)>",
    "mathematics": "$\\frac{$",
    "path": "a..\\..\\x",
    "long": "x" * 200,
    "no width": "a\u200bb\ufeff",
    "hard space and formula": "\u00a0=1+1",
    "looks undecodable": "literal\\udcff",
    "undecodable": "bad\udcff\udcfe",
}
FILES = list(NAMES.values())
CLASSES = [name for name in FILES if name.isascii() or "\udcff" not in name]
GROUP_BY = r"(?s)^(.+)\.png$"
TINY = ["--backbone", "python:tiny_network:build"]


def write_image(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (33, 34), np.uint8)
    Image.fromarray(pixels).save(path)


def plant(root: Path) -> dict[str, str]:
    """Make split folders in which each name is a class and a file; return path -> class."""
    truth = {}
    for number, split in enumerate(("train", "valid", "test")):
        for i, name in enumerate(CLASSES):
            file = f"{FILES[(i + 7 * number) % len(FILES)]}.png"
            write_image(root / split / name / file, 100 * number + i)
            truth[f"{split}/{name}/{file}"] = name
    (root / "train" / CLASSES[0] / f"{NAMES['newline']}.jpg").write_bytes(b"<html>\x1b[2J")
    return truth


def assert_clean(text: str) -> None:
    """Insist that a terminal is told nothing but lines of text."""
    steering = {c for c in text if unicodedata.category(c) in {"Cc", "Cf", "Co", "Cs", "Zl", "Zp"}}
    assert steering <= {"\n"}, sorted(steering)
    assert not any(line.startswith("featcache: all is well") for line in text.split("\n"))


def read_csv(path: Path) -> list[dict[str, str]]:
    """Read a CSV as a spreadsheet does, which must find no formula; then undo what kept it so."""
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, strict=True))
    cells = [cell for row in rows for cell in (*row, *row.values())]
    numbers = ("-", "0", "1")
    for cell in cells:
        shown = cell.lstrip(" \u00a0")
        is_formula = shown.startswith(("=", "+", "-", "@", "\t", "\r", "\n"))
        assert not is_formula or shown.lstrip("-")[:1] in numbers[1:], cell
        assert not is_formula or "+" not in shown, cell
    return [{key: plain_cell(cell) for key, cell in row.items()} for row in rows]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache and a run made of such names: ``data``, ``c.h5``, ``run``."""
    root = tmp_path_factory.mktemp("names")
    plant(root / "data")
    done = command(
        root, "extract", "data", "c.h5", *TINY, "--group-by", GROUP_BY, "--max-errors", 1
    )
    assert done.code == 0, done.err
    assert "<html>" not in done.out
    assert_clean(done.out + done.err)
    assert r"a\nfeatcache: all is well.jpg" in done.out  # listed, and in one line
    done = command(root, "train", "c.h5", "run", "--hidden", "none", "--epochs", 2)
    assert done.code == 0, done.err
    assert_clean(done.out + done.err)
    return root


def truth_of(folder: Path) -> dict[str, str]:
    images = [os.fspath(path.relative_to(folder)) for path in folder.glob("data/*/*/*.png")]
    return {path.removeprefix("data/"): path.split("/")[2] for path in images}


def stem(path: str) -> str:
    return path.rpartition("/")[2].removesuffix(".png")


def same_names(found: Iterable[str], wanted: Iterable[str]) -> bool:
    return sorted(map(os.fsencode, found)) == sorted(map(os.fsencode, wanted))


def test_info(folder: Path, tally: Any) -> None:
    for place in ("c.h5", "run"):
        done = command(folder, "info", place)
        assert done.code == 0
        assert_clean(done.out + done.err)
        facts = json.loads(command(folder, "info", place, "--json").out)
        assert facts["classes"] == sorted(CLASSES)
    facts = json.loads(command(folder, "info", "c.h5", "--json").out)
    (failure,) = facts["failures"]
    assert failure["path"] == f"train/{CLASSES[0]}/{NAMES['newline']}.jpg"
    assert failure["reason"] == "an HTML or XML page"
    tally("hostile names", "info: text clean, JSON exact", len(NAMES))


def test_extract_again_as_json(folder: Path, tally: Any) -> None:
    arguments = ["extract", "data", "again.h5", *TINY, "--max-errors", 1, "--json"]
    done = command(folder, *arguments)
    assert_clean(done.out + done.err)
    facts = json.loads(done.out)
    counted = {name for split in facts["splits"].values() for name in split}
    assert counted == set(CLASSES)
    tally("hostile names", "extract: JSON exact", len(NAMES))


def test_evaluate(folder: Path, tally: Any) -> None:
    positive = NAMES["terminal commands"]
    other = ["--cache", "c.h5"]  # of another cache no picture is drawn, which takes seconds
    done = command(folder, "evaluate", "run", "--positive", positive, "--split", "valid", *other)
    assert done.code == 0, done.err
    assert_clean(done.out + done.err)
    done = command(folder, "evaluate", "run", "--csv", "test.csv", "--json", *other)
    assert done.code == 0, done.err
    facts = json.loads(done.out)
    assert facts["classes"] == sorted(CLASSES)
    assert set(facts["per_class"]) == set(CLASSES)
    truth = {path: name for path, name in truth_of(folder).items() if path.startswith("test/")}
    assert {row["path"] for row in facts["mistakes"]} <= truth.keys()
    rows = read_csv(folder / "test.csv")
    assert {row["path"]: row["target"] for row in rows} == truth
    assert all(row["group"] == stem(row["path"]) for row in rows)
    assert {row["pred"] for row in rows} <= set(CLASSES)
    assert len(rows[0]) == 4 + len(CLASSES)
    tally("hostile names", "evaluate: text clean, JSON and CSV exact", len(NAMES))


def test_predict(folder: Path, tally: Any) -> None:
    images = [f"data/{path}" for path in truth_of(folder)]
    done = command(folder, "predict", "run", "data", *TINY, "--csv", "p.csv")
    assert done.code == 0, done.err
    assert_clean(done.out + done.err)
    rows = read_csv(folder / "p.csv")
    assert same_names([row["path"] for row in rows if not row["failure"]], images)
    (failed,) = (row for row in rows if row["failure"])
    assert failed["path"] == f"data/train/{CLASSES[0]}/{NAMES['newline']}.jpg"
    facts = json.loads(command(folder, "predict", "run", *images, *TINY, "--json").out)
    assert same_names([row["path"] for row in facts["predictions"]], images)
    done = command(folder, "predict", "run", "--cache", "c.h5", "--csv", "c.csv")
    assert_clean(done.out + done.err)
    rows = read_csv(folder / "c.csv")
    assert same_names([row["path"] for row in rows if not row["failure"]], truth_of(folder))
    tally("hostile names", "predict: text clean, JSON and CSV exact", len(NAMES))


def test_verify(folder: Path, tally: Any) -> None:
    done = command(folder, "verify", "c.h5", "--data", "data", "--samples", "all", *TINY)
    assert done.code == 0, done.err
    assert_clean(done.out + done.err)
    victim = next(path for path in truth_of(folder) if NAMES["newline"] in stem(path))
    whole = (folder / "data" / victim).read_bytes()
    try:
        write_image(folder / "data" / victim, 10**6)
        done = command(folder, "verify", "c.h5", "--data", "data", "--samples", "all", *TINY)
    finally:
        (folder / "data" / victim).write_bytes(whole)
    assert_clean(done.out + done.err)
    assert r"a\nfeatcache: all is well.png" in done.out + done.err
    tally("hostile names", "verify: text clean", len(NAMES))


def test_split_into_a_csv_and_back(tmp_path: Path, tally: Any) -> None:
    truth = {}
    for i, name in enumerate(CLASSES):
        for number in range(4):
            file = f"{FILES[(i + 5 * number) % len(FILES)]}.png"
            write_image(tmp_path / "raw" / name / file, 100 * number + i)
            truth[f"{name}/{file}"] = name
    done = command(tmp_path, "split", "raw", "table.csv", "--fractions", "0.5,0.25,0.25")
    assert done.code == 0, done.err
    assert_clean(done.out + done.err)
    read_csv(tmp_path / "table.csv")
    dataset = scan(tmp_path / "table.csv")
    assert dataset.splits == ("train", "valid", "test")
    found = {s.path.removeprefix("./"): dataset.classes[s.target] for s in dataset.samples}
    assert found == {f"raw/{path}": name for path, name in truth.items()}
    for sample in dataset.samples:
        assert dataset.read(sample) == (tmp_path / sample.path).read_bytes()
    done = command(tmp_path, "extract", "table.csv", "c.h5", *TINY, "--json")
    assert done.code == 0, done.err
    facts = json.loads(done.out)
    assert facts["num_images"] == len(truth)
    tally("hostile names", "split: CSV and back exact", len(NAMES))


def test_groups_go_through_a_csv(tmp_path: Path, tally: Any) -> None:
    for i, name in enumerate(FILES):
        write_image(tmp_path / "raw" / "a" / f"{name}.png", i)
    done = command(tmp_path, "split", "raw", "table.csv", "--group-by", GROUP_BY)
    assert done.code == 0, done.err
    assert_clean(done.out + done.err)
    dataset = scan(tmp_path / "table.csv")
    assert same_names([str(s.group) for s in dataset.samples], FILES)
    assert all(s.group == stem(s.path) for s in dataset.samples)
    tally("hostile names", "groups: CSV and back exact", len(NAMES))


def test_classes_and_groups_that_no_folder_can_be_called(tmp_path: Path, tally: Any) -> None:
    """Of a CSV: paths in class names lead nowhere, as no file is ever named after a class."""
    names = ["../../x", "/etc/x", "..", "a/b", "C:\\x", "CON", "<!--</script>"]
    lines = ["path,target,split,group"]
    for split in ("train", "valid", "test"):
        for i, name in enumerate(names):
            for number in range(2):
                write_image(tmp_path / "in" / "i" / f"{split}{i}{number}.png", 10 * i + number)
                lines.append(f"i/{split}{i}{number}.png,{name},{split},{name}")
    (tmp_path / "in" / "t.csv").write_text("\n".join(lines), "utf-8")
    before = {path for path in tmp_path.rglob("*") if path.is_file()}
    for arguments in (
        ["extract", "t.csv", "c.h5", *TINY],
        ["train", "c.h5", "run", "--hidden", "none", "--epochs", 1],
        ["evaluate", "run", "--csv", "e.csv"],
    ):
        done = command(tmp_path / "in", *arguments)
        assert done.code == 0, done.err
        assert_clean(done.out + done.err)
    made = {path for path in tmp_path.rglob("*") if path.is_file()} - before
    inside = tmp_path / "in"
    beside = {path for path in made if path.parent == inside}
    assert {path.name for path in beside} - {".c.h5.lock"} <= {"c.h5", "e.csv", "c.h5.lock"}
    assert all(path.is_relative_to(inside / "run") for path in made - beside)
    assert {row["target"] for row in read_csv(inside / "e.csv")} == set(names)
    tally("hostile names", "classes of a CSV: nothing outside written", len(names))


@pytest.mark.parametrize("column", ["path", "target", "group"])
def test_nul_is_refused(tmp_path: Path, column: str, tally: Any) -> None:
    """In a cache, whose strings end at NUL, two names would be one."""
    write_image(tmp_path / "1.png", 0)
    row = {"path": "1.png", "target": "a", "group": "g"}
    row[column] += "\0"
    (tmp_path / "t.csv").write_text("path,target,group\n" + ",".join(row.values()), "utf-8")
    with pytest.raises(DataError, match="without NUL"):
        scan(tmp_path / "t.csv")
    tally("hostile names", "NUL refused")


def test_errors_and_usage_are_clean(folder: Path, tally: Any) -> None:
    """Names given on the command line, as a shell's ``*`` does, are not echoed raw."""

    def commands(name: str) -> list[list[str]]:
        return [
            ["info", name], ["verify", name], ["predict", "run", name, *TINY],
            ["evaluate", "run", "--split", name], ["evaluate", "run", "--positive", name + "?"],
            ["train", "c.h5", name, "--schedule", name], ["extract", name, name, *TINY],
            ["split", name, "x.csv", "--classes", name],
        ]  # fmt: skip

    worst = NAMES["terminal commands"]
    tried = [*commands(worst), ["info", f"--{worst}"], [worst]]
    tried += [["info", "c.h5", name] for name in (worst, NAMES["newline"])]
    tried += [commands(name)[i % 8] for i, name in enumerate(NAMES.values())]
    for arguments in tried:
        done = command(folder, *arguments)
        assert done.code in {1, 2}, (arguments, done)
        assert_clean(done.out + done.err)
        tally("hostile names", "error clean")
