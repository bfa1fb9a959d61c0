"""Small caches, and how to change and compare what they hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from featcache.cache.reading import Cache
from featcache.cache.writing import SplitRows, write_cache, write_rows

TINY = "python:tiny_network:build"
BAD_NAME = "caf\udce9/\udcff.png"  # the bytes b"caf\xe9/\xff.png", which are not UTF-8


def rewrite(cache: Cache, change: dict[str, np.ndarray]) -> None:
    """Write the cache again with other features for some splits: whole, but not true."""
    rows = {}
    for name, split in cache.splits.items():
        features = change.get(name, np.array(split.features))
        rows[name] = SplitRows(
            features.shape, features.dtype, lambda features=features: [features],
            np.array(split.targets), split.paths, split.groups, np.array(split.image_sha256),
            np.array(split.image_bytes), np.array(split.mtime_ns),
        )  # fmt: skip
    write_rows(
        cache.path, rows, identity=cache.identity, provenance=cache.provenance,
        classes=cache.classes, task=cache.task,
    )  # fmt: skip


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
    return write_cache(path, **({"overwrite": True} | options | change))


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
