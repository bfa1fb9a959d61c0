from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pickle
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from sample_containers import (
    SAMPLES,
    container_of,
    edit_block,
    entry_of,
    hostile_changes,
    read_block,
    refused_or_read,
    same,
)

from featcache.cache.reading import Cache, CacheSplit, Failure, open_cache
from featcache.cache.writing import SplitRows, write_cache, write_rows
from featcache.errors import CacheError
from featcache.files import canonical_json

GOLDEN = Path(__file__).parents[1] / "data" / "format_v1.h5"
GOLDEN_CONTENT = "54e5073748f409b3fd7c1ee573835f896c896d137dc9d1cf1dca446a4652340d"
BAD_NAME = "caf\udce9/\udcff.png"  # the bytes b"caf\xe9/\xff.png", which are not UTF-8


def small(path: Path, **change: Any) -> Cache:
    """Write a cache of two splits, with groups; ``change`` replaces arguments."""
    rng = np.random.default_rng(3)
    options: dict[str, Any] = {
        "features": {
            "train": rng.normal(size=(6, 4)).astype(np.float32),
            "test": rng.normal(size=(3, 4)).astype(np.float32),
        },
        "targets": {"train": [0, 1, 0, 1, -1, 1], "test": [1, 0, 1]},
        "paths": {"train": ["b/2", "a/1", "c", BAD_NAME, "e", "ä"], "test": ["x", "y", "z"]},
        "groups": {"train": ["p1", "p1", "p2", "p3", "p3", ""], "test": ["q", "q", "r"]},
        "classes": ["covid", "normal"],
        "identity": {"backbone": "b0", "weights_sha256": "a" * 64},
        "provenance": {"date": "2020"},
    }
    return write_cache(path, **(options | change))


def snapshot(cache: Cache) -> list[Any]:
    """Return everything a reader can get from a cache."""
    found: list[Any] = [
        cache.identity, cache.provenance, cache.classes, cache.task, cache.failures,
        cache.fingerprint, cache.payload_sha256, cache.content_sha256, list(cache.splits),
    ]  # fmt: skip
    for split in cache.splits.values():
        arrays = (
            split.features, split.read_features(), split.targets, split.image_sha256,
            split.image_bytes, split.mtime_ns,
        )  # fmt: skip
        found += [(a.shape, a.dtype.str, a.tobytes()) for a in arrays]
        found += [split.paths, split.groups, len(split)]
    return found


# --- the golden cache


def write_golden(path: Path) -> Cache:
    """Write ``tests/data/format_v1.h5``: every feature of format version 1 in 30 KB.

    To make the file anew (only before the format's first release):
    ``cd tests && python -c "import test_reading as t; t.write_golden(t.GOLDEN)"``.
    """
    rows = {}
    for split, (num_rows, targets, paths, groups) in golden_rows().items():
        values = (np.arange(num_rows * 2 * 5) - 7) / 8
        features = values.reshape(num_rows, 2, 5).astype("<f2")
        rows[split] = SplitRows(
            features.shape, features.dtype, lambda f=features: [f[:1], f[1:]],
            np.array(targets, "<i8"), paths, groups,
            np.arange(num_rows * 32).astype(np.uint8).reshape(num_rows, 32),
            np.arange(num_rows) * 1000 + 1, np.arange(num_rows) * 10**15 - 5,
        )  # fmt: skip
    return write_rows(
        path, rows, identity=GOLDEN_IDENTITY, provenance={"date": "2025-01-01", "note": "ä"},
        classes=["covid", "normal", "Lungenentzündung"], task="multiclass",
        failures=GOLDEN_FAILURES,
    )  # fmt: skip


GOLDEN_IDENTITY = {
    "backbone": "efficientnet-lite0", "weights_sha256": "5" * 64, "image_size": 224, "views": 2,
    "mean": [0.5, 0.5, 0.5], "num_features": 5, "feature_dtype": "float16",
}  # fmt: skip
GOLDEN_FAILURES = (
    Failure("covid/broken.png", "train", 0, "not an image", 17, 1_500_000_000_000_000_000),
    Failure(BAD_NAME, "test", -1, "cut short: ä", 0, -1),
)


def golden_rows() -> dict[str, tuple[int, list[int], list[str], list[str] | None]]:
    return {
        "train": (
            4, [0, 1, 2, -1], ["a", BAD_NAME, "normal/1.jpg", "ä/肺.png"], ["p", "p", "", "q"],
        ),
        "valid": (1, [1], ["v"], ["v"]),
        "test": (0, [], [], []),
        "all": (2, [-1, 0], ["x", "y"], None),
    }  # fmt: skip


def check_golden(cache: Cache) -> None:
    assert cache.identity == GOLDEN_IDENTITY
    assert cache.provenance == {"date": "2025-01-01", "note": "ä"}
    assert cache.classes == ("covid", "normal", "Lungenentzündung")
    assert cache.task == "multiclass"
    assert cache.num_features == 5
    assert cache.failures == GOLDEN_FAILURES
    assert list(cache.splits) == ["train", "valid", "test", "all"]
    assert cache.content_sha256 == GOLDEN_CONTENT
    for name, (num_rows, targets, paths, groups) in golden_rows().items():
        split = cache.split(name)
        assert (len(split), split.paths, split.groups) == (num_rows, paths, groups)
        assert split.targets.tolist() == targets
        wanted = ((np.arange(num_rows * 10) - 7) / 8).reshape(num_rows, 2, 5)
        assert split.features.dtype == np.float16
        assert np.array_equal(split.features, wanted)
        assert np.array_equal(split.image_sha256.reshape(-1), np.arange(num_rows * 32) % 256)
        assert split.image_bytes.tolist() == [i * 1000 + 1 for i in range(num_rows)]
        assert split.mtime_ns.tolist() == [i * 10**15 - 5 for i in range(num_rows)]


def test_the_golden_cache_of_version_1_opens_for_ever() -> None:
    assert GOLDEN.stat().st_size < 30_000
    check_golden(open_cache(GOLDEN))
    with h5py.File(GOLDEN) as file:
        assert file["splits/train/paths"][1] == b"caf\xe9/\xff.png"
        assert file["failures/reasons"][1].decode() == "cut short: ä"
        assert file["splits/train/features"].shape == (4, 2, 5)


def test_todays_writer_still_writes_the_golden_content(tmp_path: Path) -> None:
    check_golden(write_golden(tmp_path / "c.h5"))
    check_golden(open_cache(tmp_path / "c.h5"))


# --- opening


def test_a_cache_opens_by_str_and_path_and_shows_what_was_written(tmp_path: Path) -> None:
    written = small(tmp_path / "c.h5")
    for path in (tmp_path / "c.h5", str(tmp_path / "c.h5")):
        for verify in (False, True):
            cache = open_cache(path, verify=verify)
            assert cache.path == tmp_path / "c.h5"
            assert snapshot(cache) == snapshot(written)
    assert cache.failures == ()
    with pytest.raises(CacheError, match=r"expected one of train, test, found valid"):
        cache.split("valid")


def test_reading_imports_no_h5py(tmp_path: Path) -> None:
    """libhdf5 cannot be hung, crashed or misled in a process that never loads it."""
    small(tmp_path / "c.h5")
    code = (
        "import sys, featcache\n"
        "for path in sys.argv[1:]:\n"
        "    try:\n"
        "        cache = featcache.open_cache(path)\n"
        "        for s in cache.splits.values():\n"
        "            s.features.sum(), s.targets, s.paths, s.groups, s.read_features(), s[0]\n"
        "            s.__getitems__([0, 1])\n"
        "        print('read')\n"
        "    except featcache.CacheError:\n"
        "        print('refused')\n"
        "assert 'h5py' not in sys.modules\n"
    )
    samples = sorted(map(str, SAMPLES.glob("*.h5")))
    command = [sys.executable, "-c", code, str(tmp_path / "c.h5"), *samples]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["read"] + ["refused"] * len(samples)


@pytest.mark.parametrize("sample", sorted(SAMPLES.glob("*.h5")) or [None], ids=str)
def test_the_files_that_hang_or_crash_libhdf5_are_refused(sample: Path | None) -> None:
    if sample is None:
        pytest.skip("the hostile samples of ../shared/research are not here")
    for verify in (False, True):
        with pytest.raises(CacheError, match="expected a featcache file"):
            open_cache(sample, verify=verify)


# --- h5py and the hashes


def test_plain_h5py_reads_the_same(tmp_path: Path) -> None:
    cache = small(tmp_path / "c.h5")
    with h5py.File(tmp_path / "c.h5") as file:
        assert file.attrs["fingerprint"].decode() == cache.fingerprint
        assert json.loads(file["identity"][()]) == cache.identity
        assert json.loads(file["provenance"][()]) == cache.provenance
        assert [name.decode() for name in file["classes"]] == list(cache.classes)
        assert file["task"][()] == b"multiclass"
        assert sorted(file["splits"]) == ["test", "train"]
        for name, split in cache.splits.items():
            group = file["splits"][name]
            for key in ("features", "targets", "image_sha256", "image_bytes", "mtime_ns"):
                assert same(group[key][()], np.asarray(getattr(split, key)))
            for key in ("paths", "groups"):
                texts = [value.decode("utf-8", "surrogateescape") for value in group[key]]
                assert texts == getattr(split, key)


def recomputed_content(path: Path) -> str:
    """The definition in DESIGN.md and ``cache``'s docstring, by hashlib and h5py alone."""
    lines = []
    with h5py.File(path) as file:
        names = ["identity", "classes"]
        names += [
            f"splits/{s}/{k}" for s in file["splits"] for k in ("features", "targets", "paths")
        ]
        for name in names:
            array = np.array(file[name][()])
            digest = hashlib.sha256(array.tobytes()).hexdigest()
            lines.append([name, array.dtype.str, list(array.shape), digest])
    text = json.dumps(sorted(lines), separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def test_the_three_hashes_can_be_recomputed_without_featcache(tmp_path: Path) -> None:
    for options in ({}, {"groups": None}):
        cache = small(tmp_path / "c.h5", **options)
        with h5py.File(tmp_path / "c.h5") as file:
            assert hashlib.sha256(file["identity"][()]).hexdigest() == cache.fingerprint
        raw = (tmp_path / "c.h5").read_bytes()
        assert hashlib.sha256(raw[4096:]).hexdigest() == cache.payload_sha256
        assert recomputed_content(tmp_path / "c.h5") == cache.content_sha256
    assert recomputed_content(GOLDEN) == GOLDEN_CONTENT


def test_the_content_hash_changes_with_content_and_with_nothing_else(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    features, targets = rng.normal(size=(4, 3)).astype(np.float32), np.array([0, 1, 0, 1])
    base: dict[str, Any] = {
        "features": features, "targets": targets, "paths": ["a", "b", "c", "d"],
        "classes": ["x", "y"], "identity": {"backbone": "b0"}, "provenance": {"date": "1"},
    }  # fmt: skip
    nudged = features.copy()
    nudged[2, 1] = np.nextafter(nudged[2, 1], np.float32(9))
    turned = [3, 1, 0, 2]

    def content(**change: Any) -> str:
        cache = write_cache(tmp_path / "c.h5", **(base | change))
        assert open_cache(tmp_path / "c.h5").content_sha256 == cache.content_sha256
        return cache.content_sha256

    equal = [
        content(),
        content(provenance={"date": "2", "host": "other"}),
        content(groups=["g", "g", "h", "h"]),
        content(features=features[turned], targets=targets[turned], paths=list("dbac")),
    ]
    assert len(set(equal)) == 1
    different = [
        content(features=nudged),
        content(features=features.astype(np.float16)),
        content(targets=[0, 1, 0, 0]),
        content(targets=[0, 1, 0, -1]),
        content(paths=["a", "b", "c", "e"]),
        content(classes=["x", "z"]),
        content(classes=["y", "x"]),
        content(identity={"backbone": "b1"}),
        content(features={"test": features}),
    ]
    assert len({*equal, *different}) == 1 + len(different)


def test_the_fingerprint_is_the_identitys_alone(tmp_path: Path) -> None:
    one = small(tmp_path / "a", identity={"b": 1, "a": [2.5]}, provenance={"x": 1})
    two = small(tmp_path / "b", identity={"a": [2.5], "b": 1}, classes=["p", "q"])
    other = small(tmp_path / "c", identity={"a": [2.5], "b": 2})
    assert one.fingerprint == two.fingerprint != other.fingerprint
    wanted = hashlib.sha256(canonical_json(one.identity).encode()).hexdigest()
    assert one.fingerprint == wanted


# --- damage and hostile files


def test_2500_damaged_files_are_refused_or_read_the_same(tmp_path: Path) -> None:
    truth = snapshot(small(tmp_path / "c.h5"))
    raw, rng = (tmp_path / "c.h5").read_bytes(), random.Random(0)
    used = len(raw[:4096].rstrip(b"\0"))
    path, outcomes, silent = tmp_path / "d.h5", {"refused": 0, "same": 0}, []
    for i in range(2500):
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
    assert outcomes["refused"] > 1500


def use(path: Path) -> None:
    snapshot(open_cache(path, verify=False))


def test_a_hostile_header_is_refused_or_read(tmp_path: Path) -> None:
    """Whatever the table says: CacheError or arrays, no other exception and no memory bomb."""
    small(tmp_path / "c.h5")
    blocks = hostile_changes(read_block(tmp_path / "c.h5"))
    blocks = [b for i, b in enumerate(blocks) if i % 3 == 0 or i > len(blocks) - 200]
    assert len(blocks) > 1500
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


# --- a split as a torch data set


def test_rows_are_the_arrays_rows_in_float32(tmp_path: Path) -> None:
    for dtype in (np.float32, np.float16):
        values = np.random.default_rng(1).normal(size=(5, 2, 3)).astype(dtype)
        for features in (values, values[:, 0]):
            cache = write_cache(
                tmp_path / "c.h5", features, [0, 1, -1, 1, 0], list("abcde"), classes=["x", "y"]
            )
            split = cache.split("all")
            assert split.features.dtype == split.read_features().dtype == dtype
            assert same(split.features, features)
            rows = [split[i] for i in range(5)]
            for (row, target), wanted, number in zip(rows, features, [0, 1, -1, 1, 0], strict=True):
                assert row.dtype == torch.float32
                assert np.array_equal(row.numpy(), wanted.astype(np.float32))
                assert target == number
                assert type(target) is int
            order = [3, 0, 3]
            for (row, target), i in zip(split.__getitems__(order), order, strict=True):
                assert torch.equal(row, rows[i][0])
                assert (target, type(target)) == (rows[i][1], int)
            rows[0][0].zero_()  # a caller's row is his own
            assert np.array_equal(split[0][0].numpy(), features[0].astype(np.float32))


def test_a_split_ends_where_it_ends(tmp_path: Path) -> None:
    split = small(tmp_path / "c.h5").split("test")
    assert len(list(split)) == len(split) == 3  # type: ignore[call-overload]
    assert torch.equal(split[-1][0], split[2][0])
    with pytest.raises(IndexError):
        split[3]


def test_several_labels_a_row(tmp_path: Path) -> None:
    targets = np.array([[0, 1, np.nan], [1, 1, 0]], np.float32)
    features = np.ones((2, 4), np.float32)
    cache = write_cache(tmp_path / "c.h5", features, targets, ["b", "a"], classes=["x", "y", "z"])
    assert open_cache(tmp_path / "c.h5").task == cache.task == "multilabel"
    split = cache.split("all")
    assert same(np.ascontiguousarray(split.targets), targets[::-1].copy())
    for rows in ([split[1]], split.__getitems__([1])):
        torch.testing.assert_close(rows[0][1], torch.from_numpy(targets[0]), equal_nan=True)
    split[1][1].zero_()
    assert split.targets[1, 1] == 1


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork.*:DeprecationWarning")
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_give_the_same_rows(tmp_path: Path, method: str) -> None:
    if method not in torch.multiprocessing.get_all_start_methods():
        pytest.skip(f"no {method} here")
    features = np.random.default_rng(2).normal(size=(37, 6)).astype(np.float16)
    targets = np.arange(37) % 3 - 1
    paths = [f"{i:02d}" for i in range(37)]
    split = write_cache(tmp_path / "c.h5", features, targets, paths, classes=["x", "y"]).split(
        "all"
    )
    assert split.features.shape == (37, 6)  # mapped here before the workers start
    loader = torch.utils.data.DataLoader(
        split, batch_size=5, num_workers=2, multiprocessing_context=method
    )
    batches = list(loader)
    assert np.array_equal(torch.cat([x for x, _ in batches]).numpy(), features.astype(np.float32))
    assert torch.cat([y for _, y in batches]).tolist() == targets.tolist()


def test_a_pickled_split_and_cache_reopen_the_same_file(tmp_path: Path) -> None:
    cache = small(tmp_path / "c.h5")
    split = cache.split("train")
    assert split.features.sum() != 0
    data = pickle.dumps(split)
    assert len(data) < 10_000, "the arrays must not travel"
    again = pickle.loads(data)
    assert isinstance(again, CacheSplit)
    assert same(again.features, split.features)
    assert again.paths == split.paths
    assert snapshot(pickle.loads(pickle.dumps(cache))) == snapshot(cache)


def test_a_copy_refuses_a_file_that_was_replaced(tmp_path: Path) -> None:
    cache = small(tmp_path / "c.h5")
    data = pickle.dumps(cache.split("train"))
    small(tmp_path / "c.h5", classes=["covid", "normaL"])
    with pytest.raises(CacheError, match="replaced while in use: open it again"):
        pickle.loads(data)
    (tmp_path / "c.h5").unlink()
    with pytest.raises(CacheError, match="no such file"):
        pickle.loads(data)


@pytest.mark.parametrize("keep_time", [False, True])
def test_an_open_cache_never_mixes_in_rows_of_a_file_that_replaced_it(
    tmp_path: Path, keep_time: bool
) -> None:
    """Same shapes, same length, as after an update: the targets were mapped, the rest was not."""
    path = tmp_path / "c.h5"
    cache = write_cache(path, np.ones((4, 8), np.float32), [0] * 4, list("abcd"), classes="xy")
    before = path.stat()
    write_cache(path, np.full((4, 8), 2, np.float32), [1] * 4, list("efgh"), classes="xy")
    assert path.stat().st_size == before.st_size
    if keep_time:  # cp -p, rsync -t
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    split = cache.split("all")
    with contextlib.suppress(CacheError):
        assert split.targets.tolist() == [0] * 4
        assert split.features.max() == 1
        assert split.paths == list("abcd")
        assert split.read_features().max() == 1


def test_an_open_cache_survives_its_replacement_where_it_was_read(tmp_path: Path) -> None:
    """Writers rename a new file into place: who has the old one mapped keeps it, whole."""
    cache = small(tmp_path / "c.h5")
    features = cache.split("train").features
    truth = features.copy()
    for i in range(5):
        write_cache(
            tmp_path / "c.h5", np.ones((9, 9), np.float32), [i] * 9, "abcdefghi", classes="abcde"
        )
    assert same(features.copy(), truth)


def test_a_moved_cache_is_the_same_cache(tmp_path: Path) -> None:
    cache = small(tmp_path / "c.h5")
    shutil.copy(tmp_path / "c.h5", tmp_path / "copy of it.h5")
    assert snapshot(open_cache(tmp_path / "copy of it.h5")) == snapshot(cache)


def test_a_split_with_views_stands_beside_splits_without(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    views = rng.normal(size=(4, 3, 5)).astype(np.float32)
    plain = rng.normal(size=(2, 5)).astype(np.float32)
    write_cache(
        tmp_path / "c.h5", {"train": views, "valid": plain}, {"train": [0] * 4, "valid": [0] * 2},
        {"train": list("abcd"), "valid": list("ef")}, classes=["x"],
    )  # fmt: skip
    cache = open_cache(tmp_path / "c.h5")
    train, valid = cache.split("train"), cache.split("valid")
    assert cache.num_features == 5
    assert (train.num_views, valid.num_views) == (3, 1)
    assert np.array_equal(train.features, views)
    assert np.array_equal(train.read_features(), views)
    assert np.array_equal(train.plain_features, views[:, 0])
    assert np.array_equal(valid.plain_features, plain)
    assert [item[0].shape for item in (train[1], valid[1])] == [(3, 5), (5,)]
    assert np.array_equal(train.__getitems__([2, 0])[1][0], views[0])
    with h5py.File(tmp_path / "c.h5") as file:
        assert file["splits/train/features"].shape == (4, 3, 5)
        assert file["splits/valid/features"].shape == (2, 5)
