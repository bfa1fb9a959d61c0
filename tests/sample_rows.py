"""Rows of separable classes, and caches of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from featcache.cache.reading import Cache
from featcache.cache.writing import SplitRows, write_rows

CLASSES = ("covid", "normal")


def rows_of(
    name: str, targets: Any, *, seed: int = 0, width: int = 10, dtype: str = "<f4"
) -> SplitRows:
    """Rows as an extraction leaves them: with hashes, in the order of their paths."""
    targets = np.asarray(targets, np.int64)
    num_rows, rng = len(targets), np.random.default_rng([seed, *name.encode()])
    features = rng.normal(size=(num_rows, width)).astype(dtype)
    features[np.arange(num_rows), np.maximum(targets, 0)] += 2
    return SplitRows(
        features.shape, features.dtype, lambda: [features], targets,
        [f"{name}/{i:04d}.png" for i in range(num_rows)], None,
        rng.integers(1, 256, (num_rows, 32)).astype(np.uint8), np.ones(num_rows, np.int64),
        np.ones(num_rows, np.int64),
    )  # fmt: skip


def edited(rows: SplitRows, **change: Any) -> SplitRows:
    if "features" in change:
        features = change.pop("features")
        change |= {"shape": features.shape, "feature_blocks": lambda: [features]}
    return SplitRows(**({k: getattr(rows, k) for k in SplitRows.__dataclass_fields__} | change))


def array_of(rows: SplitRows) -> Any:
    return next(iter(rows.feature_blocks())).copy()


def make_cache(
    path: Path, classes: Any = CLASSES, failures: Any = (), identity: Any = None, **splits: Any
) -> Cache:
    splits = splits or {"train": [0, 1] * 20, "valid": [0, 1] * 8, "test": [0, 1] * 9}
    rows = {k: v if isinstance(v, SplitRows) else rows_of(k, v) for k, v in splits.items()}
    return write_rows(
        path, rows, identity=identity or {"backbone": "fake", "image_size": 32}, provenance={},
        classes=classes, task="multiclass", failures=failures,
    )  # fmt: skip
