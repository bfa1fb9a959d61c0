"""Audit: planted copies are found, independent rows are none, and shortcuts are named."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sample_images import write_tree
from sample_rows import array_of, edited, make_cache, rows_of

import featcache
from featcache.backbones.backbone import Backbone
from featcache.cache.writing import write_cache
from featcache.evaluation import audit_copies, audit_folds
from featcache.evaluation.audit_shortcuts import file_facts

WIDTH = 64


def quiet(cache: Path, **options: Any) -> featcache.Audit:
    return featcache.audit(cache, say=lambda line: None, **options)


def planted(path: Path) -> Path:
    """Three splits with one file across splits, one of two classes, one of two groups."""
    parts = {name: rows_of(name, [0, 1] * 30, width=WIDTH) for name in ("train", "valid", "test")}
    hashes = {name: part.image_sha256.copy() for name, part in parts.items()}
    features = {name: array_of(part) for name, part in parts.items()}
    for one, other in ((("train", 0), ("test", 2)), (("train", 4), ("train", 5)),
                       (("valid", 6), ("valid", 8))):  # fmt: skip
        hashes[other[0]][other[1]] = hashes[one[0]][one[1]]
        features[other[0]][other[1]] = features[one[0]][one[1]]
    groups = {name: [f"{name}{i}" for i in range(60)] for name in parts}
    groups["test"][2] = "train0"  # one group, so that only the split differs
    groups["train"][5] = "train4"
    make_cache(path, **{
        name: edited(part, image_sha256=hashes[name], features=features[name], groups=groups[name])
        for name, part in parts.items()
    })  # fmt: skip
    return path


def with_near(path: Path, num_pairs: int = 6, noise: float = 0.02) -> Path:
    """Independent rows, of which some of test are those of train with a little noise."""
    rng = np.random.default_rng(5)
    train, test = (rng.normal(size=(n, WIDTH)).astype(np.float32) for n in (150, 50))
    test[:num_pairs] = train[:num_pairs] + noise * rng.normal(size=(num_pairs, WIDTH))
    write_cache(
        path, {"train": train, "test": test},
        {"train": ["a", "b"] * 75, "test": ["a", "b"] * 25},
        {"train": [f"train/{i:03}.png" for i in range(150)],
         "test": [f"test/{i:03}.png" for i in range(50)]},
    )  # fmt: skip
    return path


def paths_of(examples: Any) -> list[list[str]]:
    return [[row["path"] for row in example] for example in examples]


# ------------------------------------------------------------------------------------------- same


def test_a_file_in_two_splits_classes_or_groups_is_named(tmp_path: Path) -> None:
    found = quiet(planted(tmp_path / "c.h5"), only="same")
    assert found.same is not None
    assert (found.near, found.shortcuts) == (None, None)
    assert (found.same["num_sets"], found.same["num_rows"]) == (3, 6)
    kinds = {
        "across_splits": [["train/0000.png", "test/0002.png"]],
        "label_conflicts": [["train/0004.png", "train/0005.png"]],
        "across_groups": [["valid/0006.png", "valid/0008.png"]],
    }
    for kind, paths in kinds.items():
        assert found.same[kind]["num_sets"] == 1
        assert paths_of(found.same[kind]["examples"]) == paths
    assert found.num_leaks == 2


def test_copies_of_image_files_are_found_in_what_extract_makes(
    tmp_path: Path, tiny_backbone: Backbone
) -> None:
    tree = write_tree(tmp_path / "data")
    covid = sorted((tree / "train" / "covid").iterdir())
    shutil.copy(covid[0], tree / "test" / "covid" / f"other{covid[0].suffix}")
    shutil.copy(covid[1], tree / "train" / "normal" / f"other{covid[1].suffix}")
    featcache.extract(tree, tmp_path / "c.h5", backbone=tiny_backbone, say=lambda line: None)
    found = quiet(tmp_path / "c.h5", only="same")
    assert found.same is not None
    kinds = ("across_splits", "label_conflicts")
    assert [found.same[kind]["num_sets"] for kind in kinds] == [1, 1]
    assert found.num_leaks == 2


def test_an_unlabelled_copy_contradicts_nobody(tmp_path: Path) -> None:
    part = rows_of("train", [0, -1] * 15)
    hashes = part.image_sha256.copy()
    hashes[1] = hashes[0]
    make_cache(tmp_path / "c.h5", train=edited(part, image_sha256=hashes))
    found = quiet(tmp_path / "c.h5", only="same")
    assert found.same is not None
    assert (found.same["num_sets"], found.same["label_conflicts"]["num_sets"]) == (1, 0)
    assert found.num_leaks == 0


def test_labels_of_several_conflict_where_yes_meets_no(tmp_path: Path) -> None:
    cache = write_cache(
        tmp_path / "c.h5", np.eye(4, dtype=np.float32),
        np.array([[1, 0], [1, np.nan], [0, 0], [1, 1]]), list("abcd"), classes=["x", "y"],
    )  # fmt: skip
    rows = audit_copies.AuditRows.of(cache)
    assert not rows.disagree([0, 1])
    assert rows.disagree([0, 1, 2])
    assert rows.disagree([0, 3])


def test_a_cache_without_hashes_is_said(tmp_path: Path) -> None:
    lines: list[str] = []
    found = featcache.audit(with_near(tmp_path / "c.h5"), only="same", say=lines.append)
    assert found.same is not None
    assert (found.same["num_unknown"], found.same["num_sets"]) == (200, 0)
    assert any("200 rows have none" in line for line in lines)


# ------------------------------------------------------------------------------------------- near


def test_near_copies_are_found_and_nothing_else(tmp_path: Path) -> None:
    found = quiet(with_near(tmp_path / "c.h5"), only="near")
    assert found.near is not None
    assert (found.near["num_pairs"], found.near["num_sets"]) == (6, 6)
    assert found.near["across_splits"]["num_sets"] == 6
    assert found.num_leaks == 6
    assert len(found.near["pairs"]) == 5
    for pair in found.near["pairs"]:
        one, other = (row["path"].split("/")[1] for row in pair["rows"])
        assert one == other


def test_blocks_find_what_one_matrix_finds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = audit_copies.AuditRows.of(featcache.open_cache(with_near(tmp_path / "c.h5")))
    whole = audit_copies.find_near(rows)
    monkeypatch.setattr(audit_copies, "_BLOCK_ROWS", 7)
    parted = audit_copies.find_near(rows)
    assert sorted(parted.pairs.tolist()) == sorted(whole.pairs.tolist())
    assert parted.threshold == pytest.approx(whole.threshold, abs=1e-6)
    assert parted.median == pytest.approx(whole.median, abs=1e-6)
    features = np.concatenate([s.read_features() for s in rows.cache.splits.values()])
    scaled = (features - features.mean(0)) / features.std(0)
    scaled /= np.linalg.norm(scaled, axis=1, keepdims=True)
    first = scaled[whole.pairs[:, 0]] * scaled[whole.pairs[:, 1]]
    assert whole.similarities == pytest.approx(first.sum(axis=1), abs=1e-5)


@pytest.mark.parametrize(("width", "most"), [(4, 3), (10, 2), (200, 1)])
def test_independent_rows_are_no_copies(width: int, most: int) -> None:
    """20 caches of 404 rows; one in twenty may pass the threshold, in few dimensions too."""
    passed = 0
    for seed in range(20):
        rows = np.random.default_rng(seed).normal(size=(404, width))
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        alike = rows @ rows.T
        np.fill_diagonal(alike, -1)
        nearest = alike.max(axis=1)
        passed += nearest.max() >= audit_copies.choose_threshold(nearest)[0]
    assert passed <= most


def test_rows_of_few_features_are_alike_and_no_copies(tmp_path: Path) -> None:
    """Many pairs lie above the floor; the threshold from the neighbours is far above it."""
    features = np.random.default_rng(0).normal(size=(404, 4)).astype(np.float32)
    write_cache(tmp_path / "c.h5", features, ["a", "b"] * 202, [f"{i:03}" for i in range(404)])
    found = quiet(tmp_path / "c.h5", only="near")
    assert found.near is not None
    assert found.near["threshold"] > 0.99
    assert found.near["num_pairs"] == 0


def test_many_copies_do_not_raise_the_threshold() -> None:
    rng = np.random.default_rng(1)
    null = np.tanh(rng.gumbel(0.4, 0.1, 404))
    alone, _ = audit_copies.choose_threshold(null)
    null[:80] = 0.999
    with_copies, _ = audit_copies.choose_threshold(null)
    assert alone <= with_copies < 0.97


def test_few_rows_have_no_near_copies(tmp_path: Path) -> None:
    write_cache(tmp_path / "c.h5", np.ones((5, 3), np.float32), list("aabba"), list("vwxyz"))
    lines: list[str] = []
    found = featcache.audit(tmp_path / "c.h5", only="near", say=lines.append)
    assert found.near is not None
    assert (found.near["threshold"], found.near["num_pairs"]) == (None, 0)
    assert any("too few" in line for line in lines)


def test_more_pairs_than_are_kept_are_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = with_near(tmp_path / "c.h5", num_pairs=40)
    monkeypatch.setattr(audit_copies, "_MAX_PAIRS", 10)
    found = quiet(cache, only="near")
    assert found.near is not None
    assert (found.near["num_pairs"], found.near["is_cut"]) == (10, True)


# -------------------------------------------------------------------------------------- shortcuts


def named(path: Path, names: Any, *, signal: float) -> Path:
    """A cache of 60 rows a class whose features tell the class as well as ``signal`` says."""
    rng = np.random.default_rng(2)
    targets = np.repeat([0, 1], 60)
    features = rng.normal(size=(120, 20)).astype(np.float32)
    features[:, 0] += signal * targets
    write_cache(
        path, {"train": features}, {"train": targets}, {"train": [names(i) for i in range(120)]},
        classes=["a", "b"], groups={"train": [f"g{i // 2}" for i in range(120)]},
    )  # fmt: skip
    return path


def test_a_name_that_tells_the_class_is_a_shortcut(tmp_path: Path) -> None:
    cache = named(tmp_path / "c.h5", lambda i: f"{'x' * (1 + i // 60)}{i:03}.png", signal=0.0)
    found = quiet(cache, only="shortcuts").shortcuts
    assert found is not None
    assert (found["verdict"], found["best"]["balanced_accuracy"]) == ("not shown to beat", 1.0)
    assert found["facts"][0]["fact"] in {"name length", "all together"}
    assert found["head"] < 0.7


def test_a_head_that_tells_more_beats_the_shortcuts(tmp_path: Path) -> None:
    cache = named(tmp_path / "c.h5", lambda i: f"{'x' * (1 + i % 3)}{i:03}.png", signal=8.0)
    lines: list[str] = []
    found = featcache.audit(cache, only=["shortcuts"], say=lines.append).shortcuts
    assert found is not None
    assert found["verdict"] == "beats"
    assert "does not prove that it reads the images" in found["sentence"]
    assert found["head"] > 0.95
    low, mean = found["difference"]["low"], found["difference"]["mean"]
    assert low is None or 0 < low < mean
    assert max(map(len, lines)) <= 80


def test_too_few_rows_or_groups_are_said(tmp_path: Path) -> None:
    write_cache(tmp_path / "c.h5", np.eye(8, dtype=np.float32), ["a", "b"] * 4, list("stuvwxyz"))
    few = quiet(tmp_path / "c.h5", only="shortcuts").shortcuts
    assert few is not None
    assert few["verdict"] == "too few"
    rng = np.random.default_rng(0)
    write_cache(
        tmp_path / "g.h5", rng.normal(size=(80, 4)).astype(np.float32), ["a", "b"] * 40,
        [f"{'n' * (1 + i % 2)}{i}" for i in range(80)], groups=["p", "q"] * 40,
    )  # fmt: skip
    grouped = quiet(tmp_path / "g.h5", only="shortcuts").shortcuts
    assert grouped is not None
    assert (grouped["verdict"], grouped["num_folds"]) == ("too few", 0)


def test_nothing_but_copies_looks_at_test(tmp_path: Path) -> None:
    """Other features and names in test change no figure."""
    rng = np.random.default_rng(4)
    train = rng.normal(size=(120, 6)).astype(np.float32)
    figures = []
    for scale, ending in ((1, "png"), (50, "jpg")):
        test = scale * rng.normal(size=(40, 6)).astype(np.float32)
        write_cache(
            tmp_path / "c.h5", {"train": train, "test": test},
            {"train": ["a", "b"] * 60, "test": ["a", "b"] * 20},
            {"train": [f"{'n' * (1 + i % 3)}{i}.png" for i in range(120)],
             "test": [f"t{i}.{ending}" for i in range(40)]}, overwrite=True,
        )  # fmt: skip
        found = quiet(tmp_path / "c.h5", only="shortcuts,labels,outliers")
        figures.append((found.shortcuts, found.labels, found.outliers))
    assert figures[0] == figures[1]
    assert figures[0][0] is not None
    assert figures[0][0]["splits"] == ["train"]


def test_without_rows_to_train_on_copies_are_looked_for(tmp_path: Path) -> None:
    make_cache(tmp_path / "c.h5", test=[0, 1] * 30)
    said: list[str] = []
    found = featcache.audit(tmp_path / "c.h5", say=said.append)
    assert (found.parts, found.labels) == (("same", "near"), None)
    assert said[0] == "copies only: there is no split train or all for the other parts"
    with pytest.raises(featcache.CacheError, match="rows to train on, found only test"):
        quiet(tmp_path / "c.h5", only="labels")


def test_the_facts_are_of_the_name_and_not_of_the_folder() -> None:
    facts = file_facts(["covid/A1.PNG", "normal/b22.jpg", "normal/_.png"], np.array([1, 1, 1]))
    assert set(facts) == {"file ending", "name length", "digits in name", "kind of first letter"}
    sizes = file_facts(["a.png", "b.png"], np.array([1, 2]))
    assert [*sizes] == ["file size"]
    assert facts["name length"].ravel().tolist() == [2, 3, 1]
    assert facts["digits in name"].ravel().tolist() == [1, 2, 0]
    assert facts["file ending"].shape == (3, 2)
    assert not file_facts(["covid/a.png", "normal/b.png"], np.array([3, 3]))


# ------------------------------------------------------------------------------------ what is made


def test_select_takes_the_table_and_keeps_copies_together(tmp_path: Path) -> None:
    cache, table = planted(tmp_path / "c.h5"), tmp_path / "copies.csv"
    quiet(cache, only=("same", "near"), csv=table)
    with table.open(newline="", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 180
    assert sum(line["copies"] != "" for line in lines) == 6
    again = tmp_path / "new.h5"
    said: list[str] = []
    with pytest.warns(featcache.FeatcacheWarning, match="two classes for the same bytes"):
        featcache.select(cache, again, table=table, fractions=(0.6, 0.2, 0.2), say=said.append)
    assert not any("not used" in line for line in said)  # the column copies is for people
    made = quiet(again, only="same")
    assert made.same is not None
    assert made.same["num_sets"] == 3
    assert made.same["across_splits"]["num_sets"] == made.same["across_groups"]["num_sets"] == 0
    assert made.num_leaks == 1  # the two classes of one file are for a person to settle


def test_without_groups_only_copies_get_one(tmp_path: Path) -> None:
    table = tmp_path / "copies.csv"
    quiet(with_near(tmp_path / "c.h5"), only="near", csv=table)
    with table.open(newline="", encoding="utf-8") as file:
        groups = {line["path"]: line["group"] for line in csv.DictReader(file)}
    assert sum(group != "" for group in groups.values()) == 12
    assert groups["train/003.png"] == groups["test/003.png"] != groups["test/004.png"]


def test_dropped_copies_leave_the_row_of_test_and_none_of_two_classes(tmp_path: Path) -> None:
    cache, table = planted(tmp_path / "c.h5"), tmp_path / "copies.csv"
    quiet(cache, only=("same", "near"), csv=table, copies="drop")
    with table.open(newline="", encoding="utf-8") as file:
        named = {line["path"] for line in csv.DictReader(file)}
    assert len(named) == 176
    assert "test/0002.png" in named
    assert named.isdisjoint({"train/0000.png", "train/0004.png", "train/0005.png"})
    assert len({"valid/0006.png", "valid/0008.png"} & named) == 1
    featcache.select(cache, tmp_path / "new.h5", table=table, say=lambda _: None)
    made = quiet(tmp_path / "new.h5", only="same")
    assert made.same is not None
    assert made.same["num_sets"] == made.num_leaks == 0
    assert made.splits == {"train": 57, "valid": 59, "test": 60}


def test_groups_by_a_pattern_stand_in_for_the_cache_s(tmp_path: Path) -> None:
    said: list[str] = []
    cache = planted(tmp_path / "c.h5")
    found = featcache.audit(cache, only="same", group_by=r"^(\d)", say=said.append)
    assert found.same is not None
    assert found.same["across_groups"]["num_sets"] == 0  # all file names begin with 0
    assert found.same["across_splits"]["examples"][0][0]["group"] == "0"
    assert said[0].startswith("groups: 1; ")


def test_heads_of_the_folds_are_trained_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained, train = [], audit_folds.fit_heads
    monkeypatch.setattr(audit_folds, "fit_heads", lambda *given: trained.append(1) or train(*given))
    cache = named(tmp_path / "c.h5", lambda i: f"{'x' * (1 + i // 60)}{i:03}.png", signal=2.0)
    found = quiet(cache, only=("labels", "shortcuts"))
    assert found.labels is not None
    assert found.shortcuts is not None
    assert found.shortcuts["head"] > 0.6
    assert len(trained) == 1


def test_the_page_ends_in_a_verdict(tmp_path: Path) -> None:
    lines: list[str] = []
    cache = named(tmp_path / "c.h5", lambda i: f"{'x' * (1 + i // 60)}{i:03}.png", signal=2.0)
    found = featcache.audit(cache, say=lines.append)
    start = [i for i, line in enumerate(lines) if line.startswith("verdict: ")]
    assert len(start) == 1
    assert " ".join(line.strip() for line in lines[start[0] :]) == f"verdict: {found.verdict}"
    assert "A shortcut (name length: 1.000) may separate the classes" in found.verdict
    assert found.parts == ("same", "near", "labels", "shortcuts", "outliers")
    assert featcache.info(cache).audit["verdict"] == found.verdict  # type: ignore[union-attr,index]


def test_strict_raises_on_leaks_alone(tmp_path: Path) -> None:
    with pytest.raises(featcache.CacheError, match="no copies across splits or of two classes"):
        quiet(planted(tmp_path / "c.h5"), only="same", strict=True)
    make_cache(tmp_path / "d.h5")
    assert quiet(tmp_path / "d.h5", only="same", strict=True).num_leaks == 0


def test_the_page_is_short_and_begins_with_the_leaks(tmp_path: Path) -> None:
    lines: list[str] = []
    featcache.audit(planted(tmp_path / "c.h5"), say=lines.append)
    assert lines[1] == "leaks: 2 sets of copies across splits or of two classes"
    assert len(lines) <= 60
    assert max(map(len, lines)) <= 80


def test_a_path_in_two_splits_has_no_table(tmp_path: Path) -> None:
    parts = {name: edited(rows_of("same", [0, 1] * 12)) for name in ("train", "test")}
    make_cache(tmp_path / "c.h5", **parts)
    with pytest.raises(featcache.ConfigError, match="every path once"):
        quiet(tmp_path / "c.h5", only="same", csv=tmp_path / "x.csv")
    assert not (tmp_path / "x.csv").exists()
