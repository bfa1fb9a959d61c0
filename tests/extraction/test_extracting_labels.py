"""Caches of several labels per image: what they hold, how they are updated, what is refused."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sample_images import write_image

import featcache
from featcache.backbones.backbone import Backbone
from featcache.errors import CacheError, ConfigError, DataError, FeatcacheWarning
from featcache.extraction.extraction import extract, plan

ROWS = ["1,0,", "0,1,", ",1,", ",,1", "-1,1,0", "1,0,0"]
LABELS = ["B", "A", "No Finding"]


def write_table(folder: Path, rows: list[str] = ROWS) -> Path:
    lines = ["path,B,A,No Finding,split"]
    for i, row in enumerate(rows):
        if not (folder / f"{i}.png").exists():
            write_image(folder / f"{i}.png", i)
        lines.append(f"{i}.png,{row},{'test' if i % 3 == 2 else 'train'}")
    (folder / "t.csv").write_text("\n".join(lines) + "\n")
    return folder / "t.csv"


@pytest.fixture
def made(tmp_path: Path, tiny_backbone: Backbone) -> Any:
    """``made(**options)``: extract the table as it is now into c.h5, and return the summary."""

    def run(name: str = "c.h5", **options: Any) -> featcache.ExtractionSummary:
        data = options.pop("data", tmp_path / "t.csv")
        return extract(data, tmp_path / name, backbone=tiny_backbone, **options)

    return run


def targets(tmp_path: Path, name: str = "c.h5") -> dict[str, Any]:
    cache = featcache.open_cache(tmp_path / name)
    return {
        path: [None if math.isnan(value) else value for value in row.tolist()]
        for split in cache.splits.values()
        for path, row in zip(split.paths, split.targets, strict=True)
    }


def test_a_cache_of_labels_differs_in_its_targets_alone(tmp_path: Path, made: Any) -> None:
    write_table(tmp_path)
    made(target_columns=LABELS, blank="unknown")
    made("one.h5", columns={"target": "A"}, ignore_columns=["B", "No Finding"])
    several, one = (featcache.open_cache(tmp_path / name) for name in ("c.h5", "one.h5"))
    assert (several.task, several.classes) == ("multilabel", ("A", "B"))
    assert several.fingerprint == one.fingerprint
    for name, split in several.splits.items():
        assert split.targets.dtype == np.float32
        assert np.array_equal(split.features, one.splits[name].features)
        assert split.paths == one.splits[name].paths
    assert targets(tmp_path) == {
        "0.png": [0, 1], "1.png": [1, 0], "2.png": [1, None], "3.png": [0, 0],
        "4.png": [1, None], "5.png": [0, 1],
    }  # fmt: skip
    listing = several.provenance["listing"]
    assert listing == {"target_columns": LABELS, "blank": "unknown"}
    featcache.verify(tmp_path / "c.h5")


def test_changed_labels_need_no_forward_pass(
    tmp_path: Path, made: Any, tiny_backbone: Backbone
) -> None:
    write_table(tmp_path)
    first = made(target_columns=LABELS, blank="unknown")
    again = made()
    assert (first.num_new, again.status) == (6, "up to date")
    write_table(tmp_path, ["0,0,", *ROWS[1:]])
    found = featcache.verify(tmp_path / "c.h5", data=tmp_path / "t.csv", backbone=tiny_backbone)
    assert found.relabelled == ("0.png",)
    changed = made()
    assert (changed.status, changed.num_new, changed.num_kept) == ("extracted", 0, 6)
    assert targets(tmp_path)["0.png"] == [0, 0]
    other = made(blank="no", uncertain="yes")
    assert (other.status, other.num_new) == ("extracted", 0)
    assert targets(tmp_path)["2.png"] == [1, 0]
    assert targets(tmp_path)["4.png"] == [1, 1]
    made("fresh.h5", target_columns=LABELS, blank="no", uncertain="yes")
    caches = [featcache.open_cache(tmp_path / name) for name in ("c.h5", "fresh.h5")]
    assert caches[0].content_sha256 == caches[1].content_sha256
    fewer = made(target_columns=["B"])
    assert (fewer.num_new, featcache.open_cache(tmp_path / "c.h5").classes) == (0, ("B",))
    joined = "path,target\n" + "".join(f"{i}.png,x|y\n" for i in range(6))
    (tmp_path / "t.csv").write_text(joined)
    assert made(target_separator="|").num_new == 0
    assert {tuple(row) for row in targets(tmp_path).values()} == {(1, 1)}


def test_labels_may_replace_classes_but_not_the_other_way(
    tmp_path: Path, made: Any, tree: Path
) -> None:
    write_table(tmp_path)
    made(columns={"target": "A"}, ignore_columns=["B", "No Finding"])
    several = made(target_columns=LABELS, blank="no")
    assert (several.num_new, targets(tmp_path)["2.png"]) == (0, [1, 0])
    before = (tmp_path / "c.h5").read_bytes()
    for options in ({"no_classes": True}, {"columns": {"target": "A"}}, {"data": tree}):
        with pytest.raises(CacheError, match=r"found several labels per image.*--target-columns"):
            made(**options)
    assert (tmp_path / "c.h5").read_bytes() == before
    rebuilt = made(rebuild=True, columns={"target": "A"}, ignore_columns=["B", "No Finding"])
    assert rebuilt.splits["train"] == {"unlabelled": 1, "0": 1, "1": 2}


def test_failures_are_counted_per_split(tmp_path: Path, made: Any) -> None:
    """Whatever their labels; a failure has no target of its own."""
    write_table(tmp_path)
    for name in ("0.png", "1.png"):
        (tmp_path / name).write_bytes(b"broken")
    options: dict[str, Any] = {"target_columns": LABELS, "blank": "unknown"}
    with pytest.raises(DataError, match="at most 1 of 4 failed in train, found 2"):
        made(max_errors=1, **options)
    with pytest.warns(FeatcacheWarning, match="2 images could not be read"):
        made(max_errors=2, **options)
    cache = featcache.open_cache(tmp_path / "c.h5")
    assert [(f.path, f.split, f.target) for f in cache.failures] == [
        ("0.png", "train", -1), ("1.png", "train", -1),
    ]  # fmt: skip
    for name in ("0.png", "1.png"):
        (tmp_path / name).unlink()
    write_table(tmp_path)
    assert made(max_errors=2).num_new == 2
    for i in (2, 5):
        (tmp_path / f"{i}.png").write_bytes(b"broken")
    with pytest.raises(DataError, match="test/images: expected at least one readable image"):
        made(max_errors=2)


def test_an_update_does_not_undo_a_selection(tmp_path: Path, made: Any) -> None:
    table = write_table(tmp_path)
    made(target_columns=LABELS, blank="unknown")
    featcache.select(tmp_path / "c.h5", tmp_path / "s.h5", classes=["A"])
    with pytest.raises(CacheError, match=r"0.png in train/A=0, as selected, found train/A=0, B=1"):
        made("s.h5", target_columns=LABELS, blank="unknown")
    assert made("s.h5", target_columns=["A", "No Finding"], blank="unknown").num_new == 0
    assert table.exists()


def test_a_limit_and_a_plan_know_labels(tmp_path: Path, made: Any, tiny_backbone: Backbone) -> None:
    write_table(tmp_path)
    options: dict[str, Any] = {"target_columns": LABELS, "blank": "no"}
    lines: list[str] = []
    planned = plan(tmp_path / "t.csv", tmp_path / "c.h5", backbone=tiny_backbone,
                   say=lines.append, group_by=r"^(\d)", **options)  # fmt: skip
    assert planned.splits == {"train": {"A": 2, "B": 1}, "test": {"A": 1, "B": 1}}
    assert lines[0] == " train: 4 images; yes: 2 A, 1 B"
    assert "groups: 6; named in 6 of 6 images" in lines
    assert made(limit=2, **options).splits == {"train": {"A": 0, "B": 1}, "test": {"A": 1, "B": 0}}


def test_bad_options_are_told_before_anything_is_done(tmp_path: Path, made: Any) -> None:
    write_table(tmp_path)
    with pytest.raises(ConfigError, match="--uncertain: expected unknown or yes or no"):
        made(target_columns=LABELS, uncertain="perhaps")
    with pytest.raises(ConfigError, match="--blank: expected --target-columns or"):
        made(blank="no")
