"""Cells of a CSV: none is a formula, and each is read back as it was."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from featcache.csv_files import csv_text, plain_cell, write_csv

FORMULAS = [
    "=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1", "\n=1", " =1", "\u00a0=1", " \u00a0 =1",
    " \t=1", "\n\r\n@x", "=cmd|' /C calc'!A0", '="a,b"', "-", "=\udcff",
]  # fmt: skip
HARMLESS = [
    "covid", "a=b", "a,b", 'say "a"', "'quoted'", "", " ", "a\nb", "a\rb", "a\r\n=b", "x\r=cmd()",
    "x\n=cmd()", "\u202e", "1-2", "Röntgen", "肺",
]  # fmt: skip


def read_back(text: str) -> list[list[str]]:
    return list(csv.reader(io.StringIO(text, newline="")))


@pytest.mark.parametrize("cell", FORMULAS)
def test_no_cell_is_a_formula_for_a_spreadsheet(cell: str) -> None:
    (header, (first, found, last)) = read_back(csv_text("abc", [["x", cell, "y"]]))
    assert (header, first, last) == (["a", "b", "c"], "x", "y")
    assert found.startswith("'")
    assert found[1:] == cell.encode("utf-8", "backslashreplace").decode()


@pytest.mark.parametrize("cell", HARMLESS)
def test_any_other_text_comes_back_as_it_was_in_one_row(cell: str) -> None:
    """Also with CR or LF in it: a file name must not be able to begin a row of its own."""
    assert read_back(csv_text(["a", "b"], [[cell, "end"]])) == [["a", "b"], [cell, "end"]]


_PARTS = [*"'=+-@\t\r\n \u00a0\\x", "udcff", "udc80", "\udcff", "\udc80"]


@given(st.lists(st.sampled_from(_PARTS), max_size=8).map("".join))
def test_what_a_cell_was_comes_back_exactly(text: str) -> None:
    """Apostrophes, backslashes and bytes that are not UTF-8 among each other."""
    _, (cell,) = read_back(csv_text(["a"], [[text + "x"]]))
    assert not cell.lstrip(" \u00a0").startswith(("=", "+", "-", "@", "\t", "\r", "\n"))
    assert plain_cell(cell) == text + "x"


def test_numbers_are_left_alone() -> None:
    text = csv_text(["a", "b", "c", "d"], [[-5, -0.25, 1e-9, None]])
    assert read_back(text) == [["a", "b", "c", "d"], ["-5", "-0.25", "1e-09", ""]]


def test_a_csv_file_is_utf8_whatever_the_names(tmp_path: Path) -> None:
    write_csv(tmp_path / "a.csv", ["path"], [["bad\udcff.png"], ["ä\u202e"], ["a\ud800"]])
    text = (tmp_path / "a.csv").read_bytes().decode("utf-8")
    rows = read_back(text)
    assert [len(row) for row in rows] == [1, 1, 1, 1]
    assert rows[1][0].startswith("bad\\")
    assert [path.name for path in tmp_path.iterdir()] == ["a.csv"]
