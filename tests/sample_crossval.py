"""A small cache to cross-validate, and what comes of it."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
from sample_rows import edited, make_cache, rows_of

from featcache.cache.reading import Cache
from featcache.sweeps.crossval import CrossvalSummary, crossval

SMALL: dict[str, Any] = {"hidden": (8,), "epochs": 3, "device": "cpu", "learning_rate": 0.02}
LBFGS: dict[str, Any] = {"hidden": (), "optimizer": "lbfgs", "device": "cpu"}


def grouped_cache(path: Path) -> Cache:
    """Groups that run through the splits, two images with copies, unlabelled rows."""
    rows = {}
    for name, number in (("train", 60), ("valid", 24), ("test", 12)):
        targets = np.arange(number) % 2
        targets[7::20] = -1
        part = rows_of(name, targets, width=16)
        hashes = part.image_sha256.copy()
        hashes[4], hashes[9] = 7, 8
        groups = [f"g{i % 17}" for i in range(number)]
        rows[name] = edited(part, groups=groups, image_sha256=hashes)
    return make_cache(path, **rows)


def crossval_small(folder: Path, name: str = "f", **options: Any) -> CrossvalSummary:
    """Cross-validate ``c.h5`` in four folds."""
    return crossval(folder / "c.h5", folder / name, **(SMALL | {"folds": 4} | options))


def read_rows(folder: Path) -> list[dict[str, str]]:
    """Return the rows of ``predictions.csv``."""
    with (folder / "predictions.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def read_probs(rows: list[dict[str, str]]) -> Any:
    """Return their probabilities (N, C)."""
    return np.array([[float(v) for k, v in r.items() if k.startswith("prob_")] for r in rows])
