"""Sources: whether they can be told within a class, and when the data cannot show it."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import featcache
from featcache.cache.writing import write_cache

PER_CLASS = 60


def make(path: Path, sources: Any, *, signal: float = 6.0) -> Path:
    """A cache of two classes, whose features also tell sources apart, and its table t.csv."""
    rng = np.random.default_rng(1)
    targets = np.repeat([0, 1], PER_CLASS)
    features = rng.normal(size=(len(targets), 12)).astype(np.float32)
    names = [sources(i) for i in range(len(targets))]
    kinds = sorted({*names})
    features[np.arange(len(targets)), [kinds.index(name) for name in names]] += signal
    paths = [f"{i:03}.png" for i in range(len(targets))]
    write_cache(
        path / "c.h5", {"train": features}, {"train": targets}, {"train": paths},
        classes=["covid", "normal"], groups={"train": [f"g{i // 2}" for i in range(len(targets))]},
    )  # fmt: skip
    with (path / "t.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "hospital", "group"])
        writer.writerows([p, name, "of no interest"] for p, name in zip(paths, names, strict=True))
    return path / "c.h5"


def audit_sources(folder: Path, **options: Any) -> tuple[dict[str, Any], list[str]]:
    lines: list[str] = []
    found = featcache.audit(
        folder / "c.h5", only="sources", table=folder / "t.csv", source="hospital",
        say=lines.append, **options,
    )  # fmt: skip
    assert found.sources is not None
    lines = [line for line in lines if not line.startswith("groups: ")]
    assert max(map(len, lines)) <= 80
    return found.sources, lines


def in_pairs(i: int) -> str:
    """Two sources in each class, in blocks of two rows: a group has one source."""
    return "A" if i % 4 < 2 else "B"


def test_sources_that_features_tell_are_told(tmp_path: Path) -> None:
    make(tmp_path, in_pairs)
    facts, lines = audit_sources(tmp_path)
    assert facts["verdict"] == "told"
    for of_class in facts["per_class"].values():
        assert of_class["sources"] == {"A": 30, "B": 30}
        assert of_class["chance"] == 0.5
        assert of_class["balanced_accuracy"] > 0.95
        assert of_class["low"] is None or of_class["low"] > 0.5
    assert lines[1] == "sources (hospital): can be told apart within a class"
    assert "Sources can be told apart within covid, normal" in " ".join(map(str.strip, lines))


def test_sources_that_features_do_not_tell_are_not_shown(tmp_path: Path) -> None:
    make(tmp_path, in_pairs, signal=0.0)
    facts, _ = audit_sources(tmp_path)
    assert facts["verdict"] == "not shown"
    assert all(0.2 < c["balanced_accuracy"] < 0.8 for c in facts["per_class"].values())


def test_one_source_a_class_is_not_separable_by_design(tmp_path: Path) -> None:
    make(tmp_path, lambda i: "A" if i < PER_CLASS else "B")
    facts, lines = audit_sources(tmp_path)
    assert facts["verdict"] == "not separable by design"
    assert {c["reason"] for c in facts["per_class"].values()} == {"one source"}
    assert any("not separable by design" in line for line in lines)


def test_one_source_of_all_rows_confounds_nothing(tmp_path: Path) -> None:
    make(tmp_path, lambda i: "A")
    facts, lines = audit_sources(tmp_path)
    assert facts["verdict"] == "one source"
    assert lines[1] == "sources (hospital): all rows have one"


def test_few_rows_or_groups_of_a_source_are_too_few(tmp_path: Path) -> None:
    make(tmp_path, lambda i: "B" if i % 10 == 0 else "A")
    facts, lines = audit_sources(tmp_path)
    assert facts["verdict"] == "too few"
    assert any("too few: fewer than two sources of 20 rows" in line for line in lines)
    make_again = tmp_path / "again"
    make_again.mkdir()
    make(make_again, in_pairs)
    facts, _ = audit_sources(make_again, group_by=r"^(\d)")
    reasons = {c["reason"] for c in facts["per_class"].values()}
    assert "a source has images in fewer than 5 groups" in reasons


def test_rows_that_the_table_does_not_name_have_no_source(tmp_path: Path) -> None:
    make(tmp_path, in_pairs)
    lines = (tmp_path / "t.csv").read_text("utf-8").splitlines()
    (tmp_path / "t.csv").write_text("\n".join([lines[0], *lines[5:]]), "utf-8")
    facts, _ = audit_sources(tmp_path)
    assert facts["per_class"]["covid"]["sources"] == {"A": 28, "B": 28}


def test_sources_are_left_out_where_no_column_names_them(tmp_path: Path) -> None:
    cache = make(tmp_path, in_pairs)
    found = featcache.audit(cache, say=lambda line: None)
    assert (found.sources, "sources" in found.parts) == (None, False)


def test_a_column_that_is_not_there_or_empty_is_refused(tmp_path: Path) -> None:
    cache = make(tmp_path, in_pairs)
    with pytest.raises(
        featcache.FeatcacheError,
        match=r"^--source: expected a header of the CSV: path, hospital, group, found 'nowhere'",
    ):
        featcache.audit(cache, table=tmp_path / "t.csv", source="nowhere", say=lambda line: None)
    (tmp_path / "t.csv").write_text("path,hospital\n000.png,\n", "utf-8")
    (tmp_path / "other.csv").write_text("image,hospital\n000.png,A\n", "utf-8")
    options = {"table": tmp_path / "other.csv", "source": "hospital", "only": "sources"}
    with pytest.raises(
        featcache.DataError, match=r"Say what they are with --columns path=image\.$"
    ):
        featcache.audit(cache, **options, say=lambda line: None)
    with pytest.raises(featcache.ConfigError, match="names of sources"):  # of fewer than two
        featcache.audit(
            cache, table=tmp_path / "t.csv", source="hospital", columns={"path": "path"},
            say=lambda line: None,
        )  # fmt: skip
    (tmp_path / "other.csv").write_text("image,hospital\n000.png,A\n001,B\n", "utf-8")
    found = featcache.audit(cache, **options, columns={"path": "image"}, say=lambda line: None)
    assert found.sources is not None
    with pytest.raises(featcache.ConfigError, match="--columns: expected path=HEADER and no other"):
        featcache.audit(cache, **options, columns={"target": "hospital"})
    with pytest.raises(featcache.ConfigError, match="names of sources"):
        featcache.audit(cache, table=tmp_path / "t.csv", source="hospital", say=lambda line: None)
