from __future__ import annotations

from pathlib import Path

import pytest

from featcache.errors import ConfigError
from featcache.sweeps.journal import Journal

WORK = {"format": "x", "seed": 1, "space": {"a": [1, 2]}}


def test_entries_come_back_in_order(tmp_path: Path) -> None:
    path = tmp_path / "j"
    journal = Journal(path, WORK)
    for i in range(5):
        journal.append({"i": i, "none": None, "x": 0.1 + 0.2})
    assert Journal(path, WORK).entries == journal.entries
    assert [entry["i"] for entry in journal.entries] == list(range(5))
    assert journal.entries[0]["x"] == 0.1 + 0.2


def test_cut_anywhere_it_goes_on_with_the_whole_lines(tmp_path: Path) -> None:
    path = tmp_path / "j"
    journal = Journal(path, WORK)
    for i in range(3):
        journal.append({"i": i})
    whole = path.read_bytes()
    for length in range(len(whole) + 1):
        path.write_bytes(whole[:length])
        again = Journal(path, WORK)
        num_lines = whole[:length].count(b"\n")
        assert [entry["i"] for entry in again.entries] == list(range(max(num_lines - 1, 0)))
        again.append({"i": "next"})
        assert [e["i"] for e in Journal(path, WORK).entries][-1] == "next"
        assert len(Journal(path, WORK).entries) == max(num_lines - 1, 0) + 1


def test_other_work_is_refused_by_what_differs(tmp_path: Path) -> None:
    Journal(tmp_path / "j", WORK).append({})
    before = (tmp_path / "j").read_bytes()
    other = WORK | {"seed": 2, "folds": 5}
    wanted = "command that began it: folds null, seed 1, found folds 5, seed 2"
    with pytest.raises(ConfigError, match=wanted):
        Journal(tmp_path / "j", other)
    assert (tmp_path / "j").read_bytes() == before


@pytest.mark.parametrize(
    "data", [b"[]\n", b"not json\n", b'{"a": 1}\n\xff\n', b"[" * 10**5 + b"\n"]
)
def test_other_files_are_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "j").write_bytes(data)
    with pytest.raises(ConfigError, match="unfinished sweep: expected"):
        Journal(tmp_path / "j", WORK)


def test_an_entry_that_is_none_is_refused(tmp_path: Path) -> None:
    Journal(tmp_path / "j", WORK)
    with (tmp_path / "j").open("ab") as file:
        file.write(b"[1]\n")
    with pytest.raises(ConfigError, match=r"expected its journal, .*remove the folder"):
        Journal(tmp_path / "j", WORK)
