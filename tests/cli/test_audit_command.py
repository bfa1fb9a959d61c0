"""audit on the command line: exit codes, and one line for bad input."""

from __future__ import annotations

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
    ],
)
def test_bad_input_gets_one_line(
    tmp_path: Path, run: Any, arguments: tuple[str, ...], part: str
) -> None:
    make_cache(tmp_path / "c.h5")
    assert_one_line_error(run("audit", tmp_path / "c.h5", *arguments), part)
