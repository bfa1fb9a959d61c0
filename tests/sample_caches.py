"""Caches of the tiny backbone, and how to change their arrays."""

from __future__ import annotations

import numpy as np

from featcache.cache.reading import Cache
from featcache.cache.writing import SplitRows, write_rows

TINY = "python:tiny_network:build"


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
