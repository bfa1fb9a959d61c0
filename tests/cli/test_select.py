"""The command select: what it prints, its exits, one line an error."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import TINY, assert_one_line_error

from featcache.cache.reading import Cache, open_cache
from featcache.cache.writing import write_cache

IDENTITY = {"backbone": "made elsewhere"}


@pytest.fixture
def hospitals(tmp_path: Path) -> tuple[Cache, Cache]:
    """Caches a.h5 (covid, normal) and b.h5 (normal, viral): four rows in train, four in test."""
    rng = np.random.default_rng(0)

    def made(name: str, classes: list[str]) -> Cache:
        return write_cache(
            tmp_path / f"{name}.h5",
            {split: rng.normal(size=(4, 3)).astype(np.float32) for split in ("train", "test")},
            {split: [0, 0, 1, 1] for split in ("train", "test")},
            {split: [f"{split}/{i}.png" for i in range(4)] for split in ("train", "test")},
            classes=classes, identity=IDENTITY,
        )  # fmt: skip

    return made("a", ["covid", "normal"]), made("b", ["normal", "viral"])


def test_select_joins_and_prints_lines_or_one_object(
    run: Any, hospitals: tuple[Cache, Cache]
) -> None:
    options = ["--prefix", "--rename", "viral=covid"]
    result = run("select", "a.h5", "b.h5", "new.h5", *options)
    assert (result.code, result.err) == (0, "")
    assert result.out.splitlines()[-3:-1] == [
        " train: 4 covid, 4 normal", "  test: 4 covid, 4 normal",
    ]  # fmt: skip
    assert result.out.splitlines()[-1].startswith("new.h5: 16 images (8 of 8 of a.h5, 8 of 8 of b")
    result = run("select", "a.h5", "b.h5", "json.h5", *options, "--json")
    facts = json.loads(result.out)
    assert facts["sources"] == [
        {"path": name, "num_images": 8, "num_taken": 8} for name in ("a.h5", "b.h5")
    ]
    assert facts["splits"]["test"] == {"covid": 4, "normal": 4}
    assert facts["content_sha256"] == open_cache("new.h5").content_sha256
    result = run("select", "a.h5", "quiet.h5", "--quiet")
    assert (result.code, result.out, result.err) == (0, "", "")
    assert "selected_from: " in run("info", "new.h5").out
    assert run("train", "new.h5", "run", "--valid-fraction", "0.3", "--quiet").code == 0


def test_select_by_a_table_warns_of_names_without_a_row(
    run: Any, hospitals: tuple[Cache, Cache], tmp_path: Path
) -> None:
    lines = ["path,target,split", "train/0.png,x,test", "test/3.png,=x,", "gone.png,x,train"]
    (tmp_path / "t.csv").write_text("\n".join(lines))
    result = run("select", "a.h5", "new.h5", "--table", "t.csv", "--classes", "x")
    assert result.code == 0, result.err
    assert result.err == "warning: 1 path of the table without a row: gone.png\n"
    assert "left out: 6 rows that the table does not name, such as train/1.png" in result.out
    assert open_cache("new.h5").classes == ("x",)


def test_mistakes_of_select_are_one_line_and_leave_nothing(
    run: Any, hospitals: tuple[Cache, Cache], tree: Path, tmp_path: Path
) -> None:
    (tmp_path / "odd.csv").write_text("path,target\ntrain/0.png,\x1b[31mred\n")
    assert run("extract", "data", "c.h5", *TINY, "--quiet").code == 0
    before = sorted(tmp_path.rglob("*"))
    for arguments, parts in (
        (["a.h5", "b.h5", "n.h5"], ["train/0.png", "--prefix"]),
        (["a.h5", "c.h5", "n.h5"], ["cache identity", "backbone made elsewhere", "weights_sha2"]),
        (["a.h5", "c.h5"], ["NEW", "a cache that is there already", "--rebuild"]),
        (["a.h5", "a.h5"], ["NEW", "another file than the caches"]),
        (["a.h5", "gone.h5", "n.h5"], ["gone.h5", "no such file"]),
        (["a.h5", "n.h5", "--table", "gone.csv"], ["gone.csv"]),
        (["a.h5", "n.h5", "--classes", "flu"], ["--classes", "covid, normal", "flu"]),
        (["a.h5", "n.h5", "--rename", "flu=x"], ["--rename", "flu=x"]),
        (["a.h5", "n.h5", "--table", "odd.csv", "--classes", "covid"], ["\\x1b[31mred"]),
    ):
        result = run("select", *arguments)
        assert_one_line_error(result, *parts)
        assert "\x1b" not in result.err + result.out
        assert sorted(tmp_path.rglob("*")) == before
    for wrong in (
        ["a.h5"], [], ["a.h5", "n.h5", "--rename", "x"],
        ["a.h5", "n.h5", "--rename", "covid=x", "--rename", "covid=y"],
    ):  # fmt: skip
        assert run("select", *wrong).code == 2
