"""audit on the command line: exit codes, and one line for bad input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from command_line import assert_one_line_error
from sample_rows import edited, make_cache, rows_of


def test_strict_on_the_command_line_prints_its_facts_and_one_error(
    tmp_path: Path, run: Any
) -> None:
    part = rows_of("train", [0, 1] * 12)
    hashes = part.image_sha256.copy()
    hashes[:2], hashes[2:4] = 1, 2
    make_cache(tmp_path / "c.h5", train=edited(part, image_sha256=hashes))
    cache = tmp_path / "c.h5"
    result = run("audit", cache, "--only", "same", "--strict")
    assert_one_line_error(result, "2 sets")
    assert "of classes that conflict: 2" in result.out
    result = run("audit", cache, "--only", "same", "--json")
    assert (result.code, '"num_leaks": 2' in result.out) == (0, True)


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (("--only", "same,colours"), "found colours"),
        (("--only", ""), "some of same, near, labels, shortcuts, outliers, sources"),
        (("--only", "shortcuts", "--csv", "x.csv"), "copies to write"),
        (("--only", "sources"), "--table CSV --source COLUMN"),
        (("--table", "t.csv"), "--table and --source together"),
        (("--source", "hospital"), "--table and --source together"),
        (("--table", "t.csv", "--source", "hospital"), "a readable file"),
        (("--copies", "drop"), "--csv FILE beside it"),
        (("--group-by", "no group"), "a group in parentheses"),
    ],
)
def test_bad_input_gets_one_line(
    tmp_path: Path, run: Any, arguments: tuple[str, ...], part: str
) -> None:
    make_cache(tmp_path / "c.h5")
    assert_one_line_error(run("audit", tmp_path / "c.h5", *arguments), part)


def test_info_and_train_tell_what_the_audit_found(tmp_path: Path, run: Any) -> None:
    part = rows_of("train", [0, 1] * 20)
    hashes = part.image_sha256.copy()
    hashes[:2] = 1
    make_cache(tmp_path / "c.h5", train=edited(part, image_sha256=hashes), valid=[0, 1] * 8)
    assert "audit: never audited" in run("info", "c.h5").out
    assert run("audit", "c.h5", "--only", "same,near", "--quiet").code == 0
    out = run("info", "c.h5").out
    assert "audit of same, near: leaks in 1 set of copies" in out
    assert json.loads(run("info", "c.h5", "--json").out)["audit"]["num_leaks"] == 1
    lines = run("train", "c.h5", "r", "--hidden", "none", "--epochs", 1).out.splitlines()
    wanted = "the audit found leaks: 1 set of copies across splits or of two classes"
    assert [line for line in lines if "audit" in line] == [wanted]
