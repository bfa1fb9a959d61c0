"""Rows that a head was trained on, or chosen by, are recognised in any cache."""

from __future__ import annotations

import csv
import hashlib
import struct
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sample_images import write_image
from sample_selections import write_table

from featcache.backbones.backbone import Backbone
from featcache.cache.reading import Cache, open_cache
from featcache.cache.selection import select
from featcache.cache.writing import write_cache
from featcache.errors import CacheError, FeatcacheWarning, RunError
from featcache.evaluation.evaluation import Evaluation, evaluate
from featcache.extraction.extraction import extract
from featcache.heads.training import train
from featcache.sweeps.sweeping import sweep

QUICK: dict[str, Any] = {"hidden": (4,), "epochs": 1, "device": "cpu"}


def counts(result: Evaluation) -> tuple[int | None, ...]:
    return result.num_trained_on, result.num_chosen_by, result.num_unclear


def found(run: Path, cache: Path, split: str, **options: Any) -> Evaluation:
    """Evaluate without a look at the warnings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FeatcacheWarning)
        return evaluate(run, cache=cache, split=split, **options)


@pytest.fixture
def run(cache_of_tree: Path, tmp_path: Path) -> Path:
    """A run on c.h5 of 24 images to train on, 10 of valid and 12 of test."""
    train(cache_of_tree, tmp_path / "run", **QUICK)
    return tmp_path / "run"


def rearrange(folder: Path, cache: Cache, seed: int = 5) -> Path:
    """Select a new split of a cache's rows, as ``split`` and ``select --table`` do."""
    paths = [path for split in cache.splits.values() for path in split.paths]
    shuffled = np.random.default_rng(seed).permutation(paths).tolist()
    rows = [(p, ("train", "valid", "test", "test")[i % 4]) for i, p in enumerate(shuffled)]
    table = write_table(folder / "split2.csv", rows, "path,split")
    select(cache.path, folder / "c2.h5", table=table)
    return folder / "c2.h5"


def images_of(cache: Path, split: str) -> set[bytes]:
    return {row.tobytes() for row in open_cache(cache).splits[split].image_sha256}


@pytest.mark.parametrize("is_old", [False, True], ids=["rows.bin", "an older run"])
def test_rows_of_a_new_split_are_recognised_and_left_out(
    run: Path, tmp_path: Path, is_old: bool
) -> None:
    own, again = tmp_path / "c.h5", rearrange(tmp_path, open_cache(tmp_path / "c.h5"))
    if is_old:
        (run / "rows.bin").unlink()
    test = images_of(again, "test")
    trained, chosen = (len(test & images_of(own, name)) for name in ("train", "valid"))
    assert min(trained, chosen) > 2  # or this test shows nothing
    said = f"was trained on {trained} and was chosen by {chosen} of the 22 rows of test: .*--unseen"
    with pytest.warns(FeatcacheWarning, match=said):
        result = evaluate(run, cache=again)
    assert counts(result) == (trained, chosen, 0)
    lines: list[str] = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        left = evaluate(run, cache=again, unseen=True, csv=tmp_path / "t.csv", say=lines.append)
    with (tmp_path / "t.csv").open(newline="") as file:
        kept = {row["path"] for row in csv.DictReader(file)}
    split = open_cache(again).splits["test"]
    seen = images_of(own, "train") | images_of(own, "valid")
    wanted = {p for p, h in zip(split.paths, split.image_sha256, strict=True)
              if h.tobytes() not in seen}  # fmt: skip
    assert kept == wanted
    assert (left.num_samples, left.unseen, counts(left)) == (len(wanted), True, counts(result))
    assert any(line.startswith(f"rows left out: {trained} that") for line in lines)
    assert counts(evaluate(run)) == (0, 0, 0)


def test_the_own_cache_is_told_apart_by_split_and_hold_out(
    run: Path, tree: Path, tmp_path: Path, tiny_backbone: Backbone
) -> None:
    for cache in (None, tmp_path / "c.h5"):
        with pytest.warns(FeatcacheWarning, match=r"trained on 24 of the 24 rows of train: "):
            assert counts(evaluate(run, cache=cache, split="train")) == (24, 0, 0)
        with pytest.warns(FeatcacheWarning, match="was chosen by 10 of the 10 rows of valid"):
            assert counts(evaluate(run, cache=cache, split="valid")) == (0, 10, 0)
        with pytest.raises(CacheError, match=r"not seen, found 24 that .* leave --unseen out"):
            evaluate(run, cache=cache, split="train", unseen=True)
    extract(tree / "train", tmp_path / "all.h5", backbone=tiny_backbone)
    for kind, options in (("train", QUICK), ("sweep", {"trials": 2, "repeats": 2})):
        folder = tmp_path / f"{kind}_all"
        fraction: Any = {"valid_fraction": 0.25, "seed": 3, "device": "cpu"}
        if kind == "train":
            train(tmp_path / "all.h5", folder, **(options | fraction))
        else:
            sweep(tmp_path / "all.h5", folder, **(options | fraction))
        own = found(folder, tmp_path / "all.h5", "all")
        assert (own.num_trained_on, own.num_chosen_by, own.num_unclear) == (18, 6, 0), kind
        recorded = (folder / "rows.bin").read_bytes()
        (folder / "rows.bin").unlink()  # an older run: the same hold-out is drawn again
        assert counts(found(folder, tmp_path / "all.h5", "all")) == (18, 6, 0)
        (folder / "rows.bin").write_bytes(recorded)


def test_an_image_saved_again_is_known_by_its_features(
    run: Path, tree: Path, tmp_path: Path, tiny_backbone: Backbone
) -> None:
    for i, file in enumerate(sorted((tree / "train" / "covid").glob("*.png"))):
        (tmp_path / "new" / "covid").mkdir(parents=True, exist_ok=True)
        with Image.open(file) as image:
            image.save(tmp_path / "new" / "covid" / f"{i}.bmp")
    write_image(tmp_path / "new" / "covid" / "other.png", 999)
    extract(tmp_path / "new", tmp_path / "new.h5", backbone=tiny_backbone, engine="eager")
    train(tmp_path / "c.h5", tmp_path / "again", **QUICK)
    extract(tree, tmp_path / "eager.h5", backbone=tiny_backbone, engine="eager")
    train(tmp_path / "eager.h5", tmp_path / "eager", **QUICK)
    assert counts(found(tmp_path / "eager", tmp_path / "new.h5", "all")) == (6, 0, 0)


IDENTITY = {"backbone": "made elsewhere"}


def write_rows_of(
    path: Path, dtype: str = "f4", paths: str = "{}.png", first: int = 0, number: int = 30,
    split: str | None = None,
) -> Path:  # fmt: skip
    """Write a cache without hashes of images: rows of a series that is always the same."""
    features = np.random.default_rng(1).normal(size=(90, 6)).astype("f4")
    chosen = np.arange(first, first + number)
    splits = {"train": chosen, "valid": chosen + number} if split is None else {split: chosen}
    columns: tuple[dict[str, Any], ...] = (
        {name: features[rows].astype(dtype) for name, rows in splits.items()},
        {name: rows % 2 for name, rows in splits.items()},
        {name: [paths.format(row) for row in rows] for name, rows in splits.items()},
    )
    write_cache(path, *columns, classes=["covid", "normal"], identity=IDENTITY)
    return path


def test_rows_without_hashes_of_images_are_told_by_features_and_path(tmp_path: Path) -> None:
    train(write_rows_of(tmp_path / "c.h5"), tmp_path / "run", **QUICK)  # 0 to 29, and to 59
    changes: list[tuple[dict[str, Any], tuple[int, int, int]]] = [
        ({"first": 20, "number": 50}, (10, 30, 0)),
        ({"first": 60}, (0, 0, 0)),
        ({"first": 20, "number": 50, "paths": "elsewhere/{}.png"}, (10, 30, 0)),  # renamed
        ({"first": 20, "number": 50, "dtype": "f2"}, (0, 0, 40)),  # rounded: nobody can say
    ]
    for change, wanted in changes:
        other = write_rows_of(tmp_path / "o.h5", split="test", **change)
        assert counts(found(tmp_path / "run", other, "test")) == wanted, change
        number = change.get("number", 30) - sum(wanted)
        assert found(tmp_path / "run", other, "test", unseen=True).num_samples == number
        other.unlink()
    other = write_rows_of(tmp_path / "o.h5", split="test", first=20, number=50, dtype="f2")
    with pytest.warns(FeatcacheWarning) as warned:
        evaluate(tmp_path / "run", cache=other)
    said = [str(warning.message) for warning in warned]
    assert any("of 40 of the 50 rows of test the path is that of a row" in line for line in said)


def test_hashes_on_one_side_only_still_tell_rows_by_their_features(
    run: Path, tmp_path: Path
) -> None:
    cache = open_cache(tmp_path / "c.h5")
    split = cache.splits["train"]
    copied = {"features": split.features, "targets": split.targets, "paths": split.paths}
    options: dict[str, Any] = {"classes": cache.classes, "identity": cache.identity}
    write_cache(tmp_path / "o.h5", *copied.values(), **options)
    assert counts(found(run, tmp_path / "o.h5", "all")) == (24, 0, 0)
    shifted = {"features": split.features + np.float32(1e-3)}
    write_cache(tmp_path / "s.h5", *(copied | shifted).values(), **options)
    assert counts(found(run, tmp_path / "s.h5", "all")) == (0, 0, 24)


def test_what_cannot_be_told_is_said(run: Path, tmp_path: Path) -> None:
    again = rearrange(tmp_path, open_cache(tmp_path / "c.h5"))
    (run / "rows.bin").unlink()
    (tmp_path / "c.h5").rename(tmp_path / "gone.h5")
    for _ in ("no cache", "another one in its place"):
        with pytest.warns(FeatcacheWarning, match=r"rows of test cannot be told: .*no rows\.bin"):
            assert counts(evaluate(run, cache=again)) == (None, None, None)
        with pytest.raises(RunError, match=r"--unseen: expected rows\.bin .* found neither"):
            evaluate(run, cache=again, unseen=True)
        (tmp_path / "c.h5").write_bytes(again.read_bytes())


def test_the_file_is_what_the_guide_says(run: Path, tmp_path: Path) -> None:
    data = (run / "rows.bin").read_bytes()
    magic, version, num_train, num_valid, weights = struct.unpack("<8sQQQ32s", data[:64])
    assert (magic, version, num_train, num_valid) == (b"featrows", 1, 24, 10)
    assert weights == hashlib.sha256((run / "head.safetensors").read_bytes()).digest()
    assert data[-32:] == hashlib.sha256(data[:-32]).digest()
    assert len(data) == 64 + 34 * 48 + 32
    start = 64
    for name, number in (("train", 24), ("valid", 10)):
        split = open_cache(tmp_path / "c.h5").splits[name]
        rows = sorted(
            image.tobytes()[:16] + hashlib.sha256(row.astype("<f4").tobytes()).digest()[:16]
            + hashlib.sha256(path.encode()).digest()[:16]
            for image, row, path in zip(split.image_sha256, split.features, split.paths,
                                        strict=True)
        )  # fmt: skip
        assert data[start : start + 48 * number] == b"".join(rows)
        start += 48 * number


def sign(data: bytes) -> bytes:
    return data + hashlib.sha256(data).digest()


def test_a_file_that_is_not_the_runs_own_is_refused(run: Path, tmp_path: Path) -> None:
    file = run / "rows.bin"
    data = file.read_bytes()
    train(tmp_path / "c.h5", tmp_path / "other", **(QUICK | {"seed": 1}))
    newer = data[:8] + struct.pack("<Q", 2) + data[16:-32]
    endless = data[:16] + struct.pack("<QQ", 2**64 - 1, 2**63) + data[32:-32]
    swapped = data[:16] + struct.pack("<QQ", 34, 0) + data[32:-32]
    for change, message in (
        (b"", "found another file"),
        (data[:70], "found another file"),
        (data[:120], "34 rows, found 120 bytes"),
        (b"x" * len(data), "found another file"),
        (data[:100] + bytes([data[100] ^ 1]) + data[101:], "its own sha256, found another"),
        (data + b"\0", "rows, found"),
        (sign(endless), "rows, found"),
        (sign(newer), "expected version 1, found version 2.*upgrade"),
        (swapped + data[-32:], "its own sha256"),
        ((tmp_path / "other" / "rows.bin").read_bytes(), "expected the rows of"),
    ):
        file.write_bytes(change)
        with pytest.raises(RunError, match=rf"rows\.bin: .*{message}"):
            evaluate(run)
    file.unlink()
    file.mkdir()
    with pytest.raises(RunError, match=r"rows\.bin: expected a readable file"):
        evaluate(run)
