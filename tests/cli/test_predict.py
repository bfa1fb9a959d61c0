"""The command predict: its order, and its exit code where images cannot be read."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from command_line import TINY, assert_one_line_error

from featcache.heads.training import train


@pytest.fixture
def classifier(cache_of_tree: Path, tmp_path: Path) -> list[str]:
    """What follows ``featcache predict``: a run ``r``, and leave to build its backbone."""
    train(cache_of_tree, tmp_path / "r", hidden=(4,), epochs=1, device="cpu")
    return ["predict", "r", *TINY]


@pytest.mark.parametrize("options", [[], ["--json"], ["--quiet"], ["--csv", "p.csv"]])
def test_nothing_but_failures_is_an_error_after_the_facts(
    run: Any, classifier: list[str], tmp_path: Path, options: list[str]
) -> None:
    (tmp_path / "bad").mkdir()
    for name in ("a.png", "b.jpg"):
        (tmp_path / "bad" / name).write_bytes(b"broken")
    result = run(*classifier, "bad", *options)
    assert_one_line_error(result, "found none of 2", "a.png")
    if "--json" in options:
        facts = json.loads(result.out)
        assert (facts["predictions"], len(facts["failures"])) == ([], 2)
    elif "--quiet" in options:
        assert result.out == ""
    else:
        assert "failed: bad/a.png" in result.out
    if "--csv" in options:
        with (tmp_path / "p.csv").open(newline="") as file:
            assert all(row["failure"] for row in csv.DictReader(file))
    assert run(*classifier, "bad/a.png", "data/test", *options).code == 0  # one of 13


def test_images_are_answered_in_the_order_asked_repeats_included(
    run: Any, classifier: list[str], tree: Path
) -> None:
    folder = "data/test/normal"
    inside = sorted(path.name for path in (tree / "test" / "normal").iterdir())
    last, first = f"{folder}/{inside[-1]}", f"{folder}/{inside[0]}"
    asked = [last, first, last, folder, folder]
    facts = json.loads(run(*classifier, *asked, "--json").out)
    names = [row["path"] for row in facts["predictions"]]
    assert names == [last, first, last, *[f"{folder}/{name}" for name in inside] * 2]
    by_name = {row["path"]: row["probs"] for row in facts["predictions"]}
    assert [row["probs"] for row in facts["predictions"]] == [by_name[name] for name in names]
