"""Caches of the same images by two backbones, and a third that has both's features as one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from featcache.cache.reading import Cache, Failure
from featcache.cache.writing import SplitRows, write_rows

CLASSES = ("covid", "normal")
SIZES = {"train": 60, "valid": 24, "test": 30}


def image(split: str, number: int) -> dict[str, Any]:
    """Path, target, group and hash of one image."""
    name = f"{split}/{number:03d}.png"
    return {
        "path": name, "target": number % 2, "group": f"{split}{number // 2}",
        "sha256": sha256(name.encode()).digest(),
    }  # fmt: skip


def features_of(row: Mapping[str, Any], width: int, views: int, seed: int) -> npt.NDArray[Any]:
    """Features (views, width) of an image: the same in whatever order they are asked for."""
    digest = np.frombuffer(row["sha256"], np.uint8).tolist()
    rng = np.random.default_rng([seed, width, *digest])
    return (rng.normal(size=(views, width)) + np.nan_to_num(row["target"]).mean()).astype("<f4")


def write_side(
    path: Path, width: int | list[int], *, seed: int = 0, views: int = 1, dtype: Any = "<f4",
    rows: Mapping[str, list[dict[str, Any]]] | None = None,
    identity: Mapping[str, Any] | None = None,
    classes: Iterable[str] = CLASSES, task: str = "multiclass", failures: Iterable[Failure] = (),
    groups: bool = True,
) -> Cache:  # fmt: skip
    """Write a cache of images' features, ``width`` of them by the backbone ``seed``.

    With ``width`` a list, those of several backbones as one, as they stand side by side.
    """
    widths = width if isinstance(width, list) else [width]
    splits = {}
    for name, listed in (rows or images()).items():
        ordered = sorted(listed, key=lambda row: row["path"].encode())
        num_views = views if name == "train" else 1
        parts = [
            np.stack([features_of(row, w, num_views, seed + i) for row in ordered])
            for i, w in enumerate(widths)
        ]
        features = np.concatenate(parts, axis=2).astype(dtype)
        features = features[:, 0] if num_views == 1 else features
        is_multi = task == "multilabel"
        splits[name] = SplitRows(
            features.shape, features.dtype, lambda features=features: [features],
            np.array([row["target"] for row in ordered], "<f4" if is_multi else "<i8"),
            [row["path"] for row in ordered],
            [row["group"] for row in ordered] if groups else None,
            np.array([[*row["sha256"]] for row in ordered], np.uint8),
            np.arange(len(ordered)), np.arange(len(ordered)),
        )  # fmt: skip
    facts = {"backbone": f"b{seed}", "image_size": 32 + 16 * seed, "views": views}
    facts |= {"augmentation": "crop" if views > 1 else None} | dict(identity or {})
    return write_rows(
        path, splits, identity=facts, provenance={}, classes=list(classes), task=task,
        failures=list(failures),
    )  # fmt: skip


def images(sizes: Mapping[str, int] = SIZES) -> dict[str, list[dict[str, Any]]]:
    """Return the images of each split."""
    return {name: [image(name, i) for i in range(number)] for name, number in sizes.items()}
