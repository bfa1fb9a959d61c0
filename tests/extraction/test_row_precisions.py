"""A cache says at which precision each of its rows was made, and never claims one for all."""

from __future__ import annotations

import hashlib
import json
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sample_caches import TINY, rewrite
from sample_images import write_image
from sample_selections import write_table

from featcache.backbones.backbone import Backbone
from featcache.backbones.engine import eager_features
from featcache.cache.precisions import error_bounds, row_precisions
from featcache.cache.reading import Cache, open_cache
from featcache.cache.selection import select
from featcache.cli.wording import facts_lines
from featcache.data.dataset import scan
from featcache.errors import CacheError, FeatcacheWarning
from featcache.evaluation.info import info
from featcache.extraction.extraction import extract, plan
from featcache.extraction.recipe import make_recipe
from featcache.extraction.verification import verify
from featcache.pixels.images import load, resize_to_square

pytestmark = pytest.mark.usefixtures("children_here")


@pytest.fixture
def mixed(tree: Path, tmp_path: Path, tiny_backbone: Backbone) -> Cache:
    """A cache c.h5 of 46 rows at bf16, to which 3 at fp32 were added between them."""
    extract(tree, tmp_path / "c.h5", backbone=tiny_backbone, precision="bf16")
    for i, place in enumerate(("train/covid/a.png", "train/covid/zz.png", "test/normal/m.png")):
        write_image(tree / place, 700 + i)
    with pytest.warns(FeatcacheWarning, match="new ones will be at fp32"):
        made = extract(tree, tmp_path / "c.h5", backbone=tiny_backbone)
    assert (made.num_new, made.precision) == (3, "bf16, fp32")
    return open_cache(tmp_path / "c.h5")


def found_by_values(cache: Cache, tree: Path, backbone: Backbone) -> dict[str, list[str]]:
    """The precision of each row as its values show it: bf16 is off by more than 1e-4."""
    found: dict[str, list[str]] = {}
    recipe = make_recipe(backbone, scan(tree))
    by_hash: dict[bytes, Any] = {}
    for data in {path.read_bytes() for path in tree.rglob("*.*")}:
        pixels = resize_to_square(load(data, recipe.rules).pixels, recipe.rules)
        by_hash[hashlib.sha256(data).digest()] = eager_features(backbone, [pixels])[0]
    for name, split in cache.splits.items():
        found[name] = []
        for row, digest in zip(split.features, split.image_sha256, strict=True):
            true = by_hash[digest.tobytes()]
            error = np.linalg.norm(row - true) / np.linalg.norm(true)
            found[name].append("bf16" if error > 1e-4 else "fp32")
    return found


def test_another_precision_of_an_unchanged_cache_is_said(
    tree: Path, tmp_path: Path, tiny_backbone: Backbone
) -> None:
    first = extract(tree, tmp_path / "c.h5", backbone=tiny_backbone, precision="bf16")
    before = (tmp_path / "c.h5").read_bytes()
    said = r"c\.h5: the precision of its rows is bf16 \(within .*, measured on 4 images\).*"
    said += r"--precision fp32 is for new rows only\. --rebuild"
    for rehash in (False, True):
        with pytest.warns(FeatcacheWarning, match=said):
            again = extract(tree, tmp_path / "c.h5", backbone=tiny_backbone, rehash=rehash)
        assert (again.status, again.precision) == ("up to date", "bf16")
        assert (again.parity, again.num_probed) == (first.parity, 4)
    with pytest.warns(FeatcacheWarning, match=said):
        plan(tree, tmp_path / "c.h5", backbone=tiny_backbone)
    (tree / "train" / "covid" / "new.jpg").write_bytes(
        next((tree / "train" / "covid").glob("*.jpg")).read_bytes()
    )
    assert (tmp_path / "c.h5").read_bytes() == before
    with pytest.warns(FeatcacheWarning, match=said):  # a copy: a new row of known content
        copied = extract(tree, tmp_path / "c.h5", backbone=tiny_backbone)
    assert (copied.num_images, copied.num_new, copied.precision) == (47, 0, "bf16")
    assert "row_precisions" not in open_cache(tmp_path / "c.h5").provenance


def test_each_row_s_precision_is_kept_through_updates(
    mixed: Cache, tree: Path, tmp_path: Path, tiny_backbone: Backbone
) -> None:
    made = row_precisions(mixed)
    assert made == found_by_values(mixed, tree, tiny_backbone)
    assert {name: rows.count("fp32") for name, rows in made.items()} == {
        "train": 2, "valid": 0, "test": 1,
    }  # fmt: skip
    runs = {s: [[n, len([*run])] for n, run in groupby(rows)] for s, rows in made.items()}
    assert mixed.provenance["row_precisions"] == runs
    assert runs["valid"] == [["bf16", 10]]
    # moved to another split, renamed, removed, added at the other precision
    (tree / "train" / "covid" / "zz.png").rename(tree / "valid" / "covid" / "moved.png")
    bf16 = sorted((tree / "train" / "normal").iterdir())
    bf16[0].rename(bf16[0].with_name("zzz" + bf16[0].suffix))
    bf16[1].unlink()
    write_image(tree / "valid" / "normal" / "b.png", 800)
    with pytest.warns(FeatcacheWarning, match="made at bf16, fp32 .* new ones will be at bf16"):
        extract(tree, tmp_path / "c.h5", backbone=tiny_backbone, precision="bf16")
    updated = open_cache(tmp_path / "c.h5")
    assert row_precisions(updated) == found_by_values(updated, tree, tiny_backbone)
    assert row_precisions(updated)["valid"].count("fp32") == 1
    for path in ("train/covid/a.png", "valid/covid/moved.png", "test/normal/m.png"):
        (tree / path).unlink()
    alike = extract(tree, tmp_path / "c.h5", backbone=tiny_backbone, precision="bf16")
    assert alike.precision == "bf16"
    assert "row_precisions" not in open_cache(tmp_path / "c.h5").provenance


def test_a_selection_says_it_of_its_rows(mixed: Cache, tree: Path, tmp_path: Path,
                                         tiny_backbone: Backbone) -> None:  # fmt: skip
    fp32 = ["train/covid/a.png", "train/covid/zz.png", "test/normal/m.png"]
    others = [p for s in mixed.splits.values() for p in s.paths if p not in fp32]
    for name, paths, wanted in (("f", fp32, "fp32"), ("b", others, "bf16"),
                                ("all", [*fp32, *others], "bf16, fp32")):  # fmt: skip
        table = write_table(tmp_path / f"{name}.csv", [(p, "all") for p in paths], "path,split")
        select(mixed.path, tmp_path / f"{name}.h5", table=table)
        chosen = open_cache(tmp_path / f"{name}.h5")
        assert chosen.provenance["precision"] == wanted
        assert row_precisions(chosen) == found_by_values(chosen, tree, tiny_backbone)
    with pytest.warns(FeatcacheWarning, match="different precision"):
        select([tmp_path / "f.h5", tmp_path / "b.h5"], tmp_path / "joined.h5")
    joined = open_cache(tmp_path / "joined.h5")
    assert row_precisions(joined) == row_precisions(open_cache(tmp_path / "all.h5"))


def test_info_counts_the_rows_of_each_precision(mixed: Cache) -> None:
    facts = info(mixed.path).as_dict()
    assert facts["splits"]["train"]["num_per_precision"] == {"fp32": 2, "bf16": 24}
    assert facts["splits"]["valid"]["num_per_precision"] == {"bf16": 10}
    assert facts["provenance"]["num_probed"] == 8
    text = "\n".join(facts_lines(facts))
    assert "made at fp32 2, bf16 24" in text
    assert "precision: bf16, fp32" in text
    assert "row_precisions" not in text
    json.dumps(facts)


def test_each_row_is_judged_by_its_own_precision(
    mixed: Cache, tree: Path, tiny_backbone: Backbone
) -> None:
    bounds = error_bounds(mixed)
    assert {*bounds["train"].tolist()} == {1e-4, 2e-1}
    verify(mixed.path, data=tree, samples="all", backbone=TINY)
    for path, is_good in (("train/covid/a.png", False), ("train/normal/trn000_0.jpg", True)):
        features = np.array(mixed.splits["train"].features)
        features[mixed.splits["train"].paths.index(path)] *= 1.01  # off by 1 %
        rewrite(mixed, {"train": features})
        if is_good:
            verify(mixed.path, data=tree, samples="all", backbone=TINY)
            continue
        with pytest.raises(CacheError, match=r"covid/a\.png: expected features within 1e-04"):
            verify(mixed.path, data=tree, samples="all", backbone=TINY)
        verify(mixed.path, data=tree, samples="all", backbone=TINY, repair=True)
        repaired = row_precisions(open_cache(mixed.path))
        assert (repaired["train"].count("fp32"), len(repaired["train"])) == (1, 25)
        mixed = open_cache(mixed.path)


@pytest.mark.parametrize(
    "odd", [3, {}, {"train": [["fp32", 25]]}, {"train": [["fp64", 26]]}, {"train": [["fp32", -1]]},
            {"train": [["fp32", 10**400]]}, {"train": [["fp32", True]]}, {"train": "fp32"}],
)  # fmt: skip
def test_a_list_that_is_not_of_these_rows_tells_nothing(mixed: Cache, odd: object) -> None:
    told = mixed.provenance | {"row_precisions": odd}
    mixed.provenance.clear()
    mixed.provenance.update(told)
    assert row_precisions(mixed)["train"] == ["unknown"] * 26
    assert {*error_bounds(mixed)["train"].tolist()} == {1e-4}


def test_recorded_errors_include_the_rounding_of_what_is_stored(
    tree: Path, tmp_path: Path, tiny_backbone: Backbone
) -> None:
    said: list[str] = []
    made = extract(tree, tmp_path / "h.h5", backbone=tiny_backbone, feature_dtype="float16",
                   say=said.append)  # fmt: skip
    exact = extract(tree, tmp_path / "f.h5", backbone=tiny_backbone)
    assert exact.parity is not None
    assert made.parity is not None
    assert exact.parity < 1e-5 < 1e-4 < made.parity < 5e-4
    assert any("of the eager fp32 network on 4 images in float16." in line for line in said)
    half, whole = (open_cache(tmp_path / f"{name}.h5").splits["train"].features for name in "hf")
    errors = np.linalg.norm(half - whole, axis=1) / np.linalg.norm(whole, axis=1)
    assert errors.min() / 2 < made.parity < errors.max() * 2
    verify(tmp_path / "h.h5", data=tree, samples="all", backbone=TINY)
    select(tmp_path / "h.h5", tmp_path / "again.h5")
    assert open_cache(tmp_path / "again.h5").num_probed == 4
