from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from sample_caches import BAD_NAME, small, snapshot
from sample_containers import (
    SAMPLES,
    same,
)

from featcache.cache.reading import Cache, Failure, open_cache
from featcache.cache.writing import SplitRows, write_cache, write_rows
from featcache.errors import CacheError
from featcache.files import canonical_json

GOLDEN = Path(__file__).parents[1] / "data" / "format_v1.h5"
GOLDEN_CONTENT = "54e5073748f409b3fd7c1ee573835f896c896d137dc9d1cf1dca446a4652340d"


# --- the golden cache


def write_golden(path: Path) -> Cache:
    """Write ``tests/data/format_v1.h5``: every feature of format version 1 in 30 KB.

    To make the file anew (only before the format's first release):
    ``PYTHONPATH=tests:tests/cache python -c "import test_reading as t; t.write_golden(t.GOLDEN)"``.
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
        cache = write_cache(tmp_path / "c.h5", **(base | change), overwrite=True)
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
