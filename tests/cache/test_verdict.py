"""The verdict beside a cache: tied to its content, no stranger's file is written over."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
from sample_caches import TINY
from sample_images import write_tree
from sample_rows import array_of, edited, make_cache, rows_of

import featcache
from featcache.cache.verdict import read_verdict, say_verdict, verdict_path
from featcache.errors import FeatcacheWarning

FAST: dict[str, Any] = {"hidden": (), "epochs": 1, "device": "cpu"}


def copies_of(rows: Any, number: int) -> Any:
    """Rows of which the first pairs are one image each, with two classes."""
    hashes = rows.image_sha256.copy()
    for i in range(number):
        hashes[2 * i] = hashes[2 * i + 1]
    return edited(rows, image_sha256=hashes)


def audited(path: Path, number: int = 0, **options: Any) -> Path:
    make_cache(path, train=copies_of(rows_of("train", [0, 1] * 20), number), valid=[0, 1] * 8)
    featcache.audit(path, only=options.pop("only", "same,near"), say=lambda line: None, **options)
    return path


def line_of(path: Path) -> list[str]:
    lines: list[str] = []
    say_verdict(featcache.open_cache(path), lines.append)
    return lines


def test_a_verdict_counts_until_the_content_changes(tmp_path: Path) -> None:
    cache = audited(tmp_path / "c.h5", 3)
    found = featcache.info(cache).audit  # type: ignore[union-attr]
    assert found is not None
    assert (found["num_leaks"], found["parts"]) == (3, ["same", "near"])
    assert "3 sets of copies" in found["verdict"]
    assert line_of(cache) == [
        "the audit found leaks: 3 sets of copies across splits or of two classes"
    ]
    rows = rows_of("train", [0, 1] * 20)
    features = array_of(rows)
    features[5] += 1
    make_cache(cache, train=edited(rows, features=features), valid=[0, 1] * 8)
    assert read_verdict(featcache.open_cache(cache)) is None
    assert line_of(cache) == [f"this cache was never audited: featcache audit {cache}"]
    featcache.audit(cache, only="same,near", say=lambda line: None)
    assert line_of(cache) == []


def test_a_part_of_the_copies_makes_no_verdict(tmp_path: Path) -> None:
    cache = audited(tmp_path / "c.h5", only="same,outliers")
    assert [path.name for path in tmp_path.iterdir()] == ["c.h5"]
    assert len(line_of(cache)) == 1


@pytest.mark.parametrize("verb", ["train", "sweep", "crossval"])
def test_who_trains_is_told_in_one_line(tmp_path: Path, verb: str) -> None:
    options: dict[str, Any] = FAST
    if verb == "sweep":
        options = {"trials": 2, "repeats": 2, "device": "cpu"}
        (tmp_path / "s.toml").write_text("hidden = [[], [2]]\nepochs = 1\n", "utf-8")
        options |= {"space": tmp_path / "s.toml"}
    elif verb == "crossval":
        options = FAST | {"folds": 2}
    make_cache(tmp_path / "c.h5")
    said = []
    for run in ("before", "after"):
        lines: list[str] = []
        getattr(featcache, verb)(tmp_path / "c.h5", tmp_path / run, say=lines.append, **options)
        said.append([line for line in lines if "audit" in line])
        featcache.audit(tmp_path / "c.h5", only="same,near", say=lambda line: None)
    command = f"featcache audit {tmp_path / 'c.h5'}"
    assert said == [[f"this cache was never audited: {command}"], []]


def test_an_edited_or_newer_verdict_counts_as_none(tmp_path: Path) -> None:
    cache = audited(tmp_path / "c.h5", 1)
    path = verdict_path(cache)
    whole = path.read_text("utf-8")
    path.write_text(whole.replace('"num_leaks": 1', '"num_leaks": 0'), "utf-8")
    assert len(line_of(cache)) == 1
    for text in (whole.replace('_version": 1', '_version": 2'), "[1]", "", "\x00"):
        path.write_text(text, "utf-8")
        assert "never audited" in line_of(cache)[0]
    path.write_text(whole, "utf-8")
    assert "found leaks" in line_of(cache)[0]


def test_an_audit_of_less_does_not_replace_the_verdict_of_one_of_more(tmp_path: Path) -> None:
    def audit(**options: Any) -> tuple[list[str], int, int]:
        lines: list[str] = []
        featcache.audit(tmp_path / "c.h5", say=lines.append, **options)
        kept = [line for line in lines if "stays" in line]
        found = featcache.info(tmp_path / "c.h5").audit  # type: ignore[union-attr]
        assert found is not None
        return kept, found["num_images"], len(found["parts"])

    write_tree(tmp_path / "data", {"train": 6, "test": 2})
    tiny = {"backbone": TINY, "progress": False, "say": lambda line: None}
    featcache.extract(tmp_path / "data", tmp_path / "c.h5", **tiny)
    data, copies = {"data": tmp_path / "data"}, {"only": "same,near"}
    assert audit(**copies) == ([], 0, 2)
    assert audit() == ([], 0, 5)
    with_more = "an earlier audit's verdict stays: same, near, labels, shortcuts, outliers; "
    assert audit(**copies) == ([with_more + "0 images read"], 0, 5)
    assert audit(**copies, **data) == ([], 16, 2)
    assert audit() == (["an earlier audit's verdict stays: same, near; 16 images read"], 16, 2)
    assert audit(**data) == ([], 16, 5)
    next((tmp_path / "data" / "test" / "covid").iterdir()).unlink()
    assert audit(**data) == ([with_more + "16 images read"], 16, 5)
    write_tree(tmp_path / "data2", {"train": 7, "test": 2})
    featcache.extract(tmp_path / "data2", tmp_path / "c.h5", rebuild=True, **tiny)
    assert audit(**copies) == ([], 0, 2)  # other content: nothing is known of it


def test_the_command_that_is_named_can_be_typed(tmp_path: Path) -> None:
    (tmp_path / "my caches").mkdir()
    (line,) = line_of(make_cache(tmp_path / "my caches" / "a cache with quite a long name.h5").path)
    words = shlex.split(line)
    assert words[-1] == str(tmp_path / "my caches" / "a cache with quite a long name.h5")


@pytest.mark.parametrize("kind", ["a stranger's file", "a folder", "a link"])
def test_what_is_not_ours_stays_and_the_audit_does_not_fail(tmp_path: Path, kind: str) -> None:
    make_cache(tmp_path / "c.h5")
    place = tmp_path / "c.h5.audit.json"
    assert verdict_path(tmp_path / "c.h5") == place
    if kind == "a stranger's file":
        place.write_text('{"mine": 1}', "utf-8")
    elif kind == "a folder":
        place.mkdir()
    else:
        (tmp_path / "mine.json").write_text("{}", "utf-8")
        place.symlink_to(tmp_path / "mine.json")
    with pytest.warns(FeatcacheWarning, match=r"the verdict is not kept in c\.h5\.audit\.json"):
        found = featcache.audit(tmp_path / "c.h5", only="same,near", say=lambda line: None)
    assert found.num_leaks == 0
    assert not place.is_file() or json.loads(place.read_text("utf-8")) in ({"mine": 1}, {})


def test_a_folder_that_cannot_be_written_does_not_fail_the_audit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_cache(tmp_path / "c.h5")
    monkeypatch.setattr("featcache.outputs.os.access", lambda *_: False)  # as for other users
    with pytest.warns(FeatcacheWarning, match="the verdict is not kept") as caught:
        featcache.audit(tmp_path / "c.h5", only="same,near", say=lambda line: None)
    assert len(caught) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["c.h5"]


def test_the_verdict_lies_beside_the_file_and_not_beside_a_link(tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    make_cache(tmp_path / "far" / "c.h5")
    (tmp_path / "l.h5").symlink_to(tmp_path / "far" / "c.h5")
    featcache.audit(tmp_path / "l.h5", only="same,near", say=lambda line: None)
    assert (tmp_path / "far" / "c.h5.audit.json").is_file()
    assert line_of(tmp_path / "l.h5") == line_of(tmp_path / "far" / "c.h5") == []
