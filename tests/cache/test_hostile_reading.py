"""Damaged and hostile files are refused or read the same, and nothing else happens."""

from __future__ import annotations

import contextlib
import json
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from sample_caches import small, snapshot
from sample_containers import (
    container_of,
    edit_block,
    entry_of,
    hostile_changes,
    read_block,
    refused_or_read,
)

from featcache.cache.reading import open_cache
from featcache.errors import CacheError

# --- damage and hostile files


def test_damaged_files_are_refused_or_read_the_same(
    tmp_path: Path, rounds: Callable[[int, int], int]
) -> None:
    number = rounds(600, 2500)
    truth = snapshot(small(tmp_path / "c.h5"))
    raw, rng = (tmp_path / "c.h5").read_bytes(), random.Random(0)
    used = len(raw[:4096].rstrip(b"\0"))
    path, outcomes, silent = tmp_path / "d.h5", {"refused": 0, "same": 0}, []
    for i in range(number):
        damaged = bytearray(raw)
        if i % 10 == 0:
            del damaged[rng.randrange(len(raw)) :]
        for _ in range(rng.randint(1, 8)):
            # every third one hits the text of the user block, which is a tenth of the file
            place = rng.randrange(max(1, min(used if i % 3 == 1 else len(raw), len(damaged))))
            if place < len(damaged):
                damaged[place] = rng.choice([rng.randrange(256), rng.choice(b"0123456789abcdef")])
        path.write_bytes(damaged)
        try:
            found = snapshot(open_cache(path))
        except CacheError:
            outcomes["refused"] += 1
            continue
        outcomes["same"] += found == truth
        if found != truth:
            silent.append(bytes(damaged[:used]))
    assert not silent, f"{len(silent)} silently different, such as {silent[0]!r}"
    assert outcomes["refused"] > 0.6 * number


def use(path: Path) -> None:
    snapshot(open_cache(path, verify=False))


def test_a_hostile_header_is_refused_or_read(
    tmp_path: Path, rounds: Callable[[int, int], int]
) -> None:
    """Whatever the table says: CacheError or arrays, no other exception and no memory bomb."""
    small(tmp_path / "c.h5")
    blocks = hostile_changes(read_block(tmp_path / "c.h5"))
    # 149 fields a value and 59 values: every 11th meets each field and each value several times.
    step = rounds(11, 1)
    blocks = [b for i, b in enumerate(blocks) if i % step == 0 or i > len(blocks) - 200]
    assert len(blocks) > rounds(500, 4500)
    assert refused_or_read(tmp_path / "c.h5", use, blocks) > 0.9 * len(blocks)


@pytest.mark.parametrize("dtype", ["<f4", "<f2", "<i8", "|u1", "|S1", "|S3"])
def test_an_array_of_another_kind_or_shape_is_refused_or_read(tmp_path: Path, dtype: str) -> None:
    small(tmp_path / "c.h5")
    block = read_block(tmp_path / "c.h5")
    blocks = []
    for i in range(len(block["arrays"])):
        for shape in ([], [0], [1], [1, 1], [2**47, 0], [0, 2**47], [0, 0, 0], [1, 0]):
            changed = json.loads(json.dumps(block))
            changed["arrays"][i].update(shape=shape, dtype=dtype)
            blocks.append(changed)
    assert refused_or_read(tmp_path / "c.h5", use, blocks) > len(blocks) // 2


BROKEN: dict[str, dict[str, np.ndarray | None]] = {
    "identity no JSON": {"identity": np.array(b"{")},
    "identity a list": {"identity": np.array(b"[1]")},
    "identity a number": {"identity": np.array(7)},
    "identity two rows": {"identity": np.array([b"{}", b"{}"])},
    "identity deeply nested": {"identity": np.array(b'{"a":' + b"[" * 90000 + b"]" * 90000 + b"}")},
    "provenance a number": {"provenance": np.array(1.5, "<f4")},
    "provenance not UTF-8": {"provenance": np.array(b'{"a":"\xff"}')},
    "task unknown": {"task": np.array(b"regression")},
    "task a number": {"task": np.array(1)},
    "task two rows": {"task": np.array([b"multiclass"] * 2)},
    "task empty": {"task": np.empty(0, "S10")},
    "classes twice": {"classes": np.array([b"x", b"x"])},
    "classes numbers": {"classes": np.array([1, 2])},
    "classes scalar": {"classes": np.array(b"xy")},
    "classes a table": {"classes": np.array([[b"x", b"y"]])},
    "a target too high": {"splits/train/targets": np.array([0, 1, 2])},
    "a target too low": {"splits/train/targets": np.array([0, 1, -2])},
    "targets of another length": {"splits/train/targets": np.array([0, 1])},
    "targets floats": {"splits/train/targets": np.zeros(3, "<f4")},
    **{
        f"a label of {value}": {
            "task": np.array(b"multilabel"),
            "splits/train/targets": np.array([[0, 1], [np.nan, value], [0, 0]], "<f4"),
        }
        for value in (2, -1, 0.5, np.inf, 1e-45)
    },
    "targets for several labels": {"splits/train/targets": np.zeros((3, 2), "<f4")},
    "features whole numbers": {"splits/train/features": np.ones((3, 4), "<i8")},
    "features flat": {"splits/train/features": np.ones(3, "<f4")},
    "features scalar": {"splits/train/features": np.array(1, "<f4")},
    "features without columns": {"splits/train/features": np.ones((3, 0), "<f4")},
    "paths of another length": {"splits/train/paths": np.array([b"a", b"b"])},
    "paths numbers": {"splits/train/paths": np.zeros(3, "<i8")},
    "groups of another length": {"splits/train/groups": np.array([b"a", b"b"])},
    "groups a table": {"splits/train/groups": np.array([[b"a", b"b", b"c"]])},
    "hashes too short": {"splits/train/image_sha256": np.zeros((3, 31), "|u1")},
    "failures of two lengths": {"failures/paths": np.array([b"f", b"g"])},
    "failures numbers for names": {"failures/paths": np.zeros(1, "<i8")},
    "failures names for numbers": {"failures/targets": np.array([b"f"])},
    "failures scalar": {"failures/targets": np.array(1)},
    "failures a table": {"failures/image_bytes": np.zeros((1, 1), "<i8")},
    "failures of no split": {"failures/splits": np.array([b"dev"])},
    "failures of no class": {"failures/targets": np.array([2])},
    "failures below -1": {"failures/targets": np.array([-2])},
    "failures NaN": {"failures/mtime_ns": np.array([np.nan], "<f4")},
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_whole_file_whose_arrays_do_not_fit_is_refused(tmp_path: Path, name: str) -> None:
    assert len(open_cache(container_of(tmp_path / "fine")).split("train")) == 3
    path = container_of(tmp_path / "c.h5", **BROKEN[name])
    with pytest.raises(CacheError, match="cache") as caught:
        open_cache(path)
    assert len(str(caught.value)) < 1000


def test_a_missing_array_is_refused_by_name(tmp_path: Path) -> None:
    container = open_cache(container_of(tmp_path / "c.h5")).container
    for name in set(container.arrays) - {"splits/train/groups"}:
        with pytest.raises(CacheError, match=r"cache"):
            open_cache(container_of(tmp_path / "c.h5", **{name: None}))
    without = open_cache(container_of(tmp_path / "c.h5", **{"splits/train/groups": None}))
    assert without.split("train").groups is None


def test_numbers_json_does_not_know_are_no_crash(tmp_path: Path) -> None:
    path = container_of(tmp_path / "c.h5", identity=np.array(b'{"a":NaN}'))
    with contextlib.suppress(CacheError):
        open_cache(path)


def test_another_identity_than_the_fingerprints_is_refused(tmp_path: Path) -> None:
    small(tmp_path / "c.h5")
    edit_block(tmp_path / "c.h5", lambda b: b.update(fingerprint="f" * 64))
    with pytest.raises(CacheError, match="identity: expected the fingerprint's"):
        open_cache(tmp_path / "c.h5")


def test_splits_of_different_width_are_refused(tmp_path: Path) -> None:
    small(tmp_path / "c.h5")
    edit_block(
        tmp_path / "c.h5", lambda b: entry_of(b, "splits/test/features").update(shape=[3, 3])
    )
    with pytest.raises(CacheError, match="features of one width"):
        open_cache(tmp_path / "c.h5", verify=False)


def test_a_newer_format_says_to_upgrade(tmp_path: Path) -> None:
    small(tmp_path / "c.h5")
    edit_block(tmp_path / "c.h5", lambda b: b.update(format_version=7))
    with pytest.raises(
        CacheError, match=r"found version 7 .* upgrade with pip install -U featcache"
    ):
        open_cache(tmp_path / "c.h5")
