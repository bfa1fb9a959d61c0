"""The features of a cache on their first two principal components.

Reads: a cache. Writes: nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from featcache.cache.reading import Cache

_MAP_ROWS = 600  # points of the map that are drawn, each split's share


@dataclass(frozen=True)
class FeatureMap:
    """Features of a cache on their first two principal components.

    Attributes:
        points: (n, 2).
        targets: n class names, empty for an unlabelled row or several labels.
        splits: n names.
        shares: Of the variance, for both axes.
        num_rows: Of the cache; the points are a part of them.
    """

    points: npt.NDArray[np.float64]
    targets: list[str]
    splits: list[str]
    shares: tuple[float, float]
    num_rows: int


def map_features(cache: Cache) -> FeatureMap:
    """Return the features on two axes: principal components, which are the same each time."""
    numbers = {
        name: np.unique(np.linspace(0, len(split) - 1, min(len(split), _MAP_ROWS)).astype(np.int64))
        for name, split in cache.splits.items() if len(split)
    }  # fmt: skip
    blocks, targets, splits = [], [], []
    for name, rows in numbers.items():
        split = cache.split(name)
        blocks.append(split.read_rows(rows).reshape(len(rows), -1).astype(np.float64))
        splits += [name] * len(rows)
        for target in split.targets[rows]:
            is_one = split.targets.ndim == 1 and target >= 0
            targets.append(cache.classes[int(target)] if is_one else "")
    features = np.concatenate(blocks)
    is_train = np.array([name in {"train", "all"} for name in splits])
    fitted = features[is_train] if is_train.any() else features
    centred = fitted - fitted.mean(axis=0)
    # Of the rows, as there are fewer of them than features or about as many.
    values, vectors = np.linalg.eigh(centred @ centred.T)
    axes = centred.T @ vectors[:, ::-1][:, :2]
    axes = np.pad(axes, ((0, 0), (0, 2 - axes.shape[1])))
    axes /= np.maximum(np.linalg.norm(axes, axis=0), np.finfo(np.float64).tiny)
    largest = np.abs(axes).argmax(axis=0)
    axes *= np.where(axes[largest, np.arange(2)] < 0, -1.0, 1.0)  # else the sign is by chance
    total = max(float(values.clip(0).sum()), np.finfo(np.float64).tiny)
    shares = [max(float(value), 0.0) / total for value in values[::-1][:2]] + [0.0]
    return FeatureMap(
        (features - fitted.mean(axis=0)) @ axes, targets, splits, (shares[0], shares[1]),
        sum(map(len, cache.splits.values())),
    )  # fmt: skip
