"""The commands convert and neighbours: what they print, their exits, one line an error."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from command_line import assert_one_line_error
from sample_caches import small


def test_there_and_back(run: Any, tmp_path: Path) -> None:
    cache = small(tmp_path / "c.h5")
    result = run("convert", "c.h5", "c.npz")
    assert result.code == 0
    assert "9 rows (6 train, 3 test), identity as in the cache" in result.out
    facts = json.loads(run("convert", "c.npz", "d.h5", "--json").out)
    assert (facts["content_sha256"], facts["is_unchanged"]) == (cache.content_sha256, True)
    assert "identity: stated, not verified" in run("info", "d.h5").out
    assert run("convert", "c.npz", "d.h5").code == 1
    assert run("convert", "c.npz", "d.h5", "--rebuild", "--quiet").out == ""
    for arguments in (["c.h5", "c.xlsx"], ["c.h5", "c.npz"], ["none.npz", "e.h5"]):
        result = run("convert", *arguments)
        assert result.code == 1
        assert_one_line_error(result)


def test_neighbours(run: Any, tmp_path: Path) -> None:
    small(tmp_path / "c.h5")
    result = run("neighbours", "c.h5", "x", "-k", 3)
    assert result.code == 0
    assert len(result.out.splitlines()) == 4
    facts = json.loads(run("neighbours", "c.h5", "x", "-k", 3, "--json").out)
    assert [row["path"] in result.out for row in facts["rows"]] == [True] * 3
    assert_one_line_error(run("neighbours", "c.h5", "nobody.png"))
    assert run("neighbours", "c.h5", "x", "-k", 0).code == 2
