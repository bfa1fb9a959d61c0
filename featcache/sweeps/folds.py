"""Rows -> pairs of rows to train on and rows to judge by, again and again.

What belongs together (a group, copies of one image) never stands on both sides of a pair, and
every class stands on both. For multilabel caches the classes are those it is stratified by.

Reads: a cache. Writes: nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from featcache.cache.reading import Cache
from featcache.data.stratification import build_units
from featcache.errors import CacheError, DataError
from featcache.heads.rows import Part, RowNumbers, Targets, read_rows, share_out
from featcache.heads.streaming import StoredFeatures
from featcache.runtime import CPU, Device, Say, available_cores, log_line

Pair: TypeAlias = tuple[RowNumbers, RowNumbers]
"""Numbers of rows to train on and to judge by."""

Features: TypeAlias = npt.NDArray[Any] | StoredFeatures

Arrays: TypeAlias = tuple[Features, Targets, Features, Targets]
"""Features and targets to train on, features and targets to judge by."""


@dataclass(frozen=True)
class Pool:
    """The rows to train on and to choose by, in one.

    Attributes:
        features: (N, D), or (N, V, D) of rows with views. Rows of parts other than the first
            repeat their one view V times.
        plain: (N, D), the images as they are.
        targets: (N,) int64, or (N, C) for multilabel caches.
        pair: The rows of the first part, to train on, and of the others, to choose by.
        units: Rows of each unit that stays together.
        names: Of the rows, which decide with the seed what goes where.
        classes: Names.
        cache: Only for messages.
    """

    features: Features
    plain: Features
    targets: Targets
    pair: Pair
    units: list[list[int]]
    names: list[str]
    classes: tuple[str, ...]
    cache: Cache

    @classmethod
    def of(
        cls, cache: Cache, parts: Sequence[Part], device: Device = CPU, say: Say = log_line
    ) -> Pool:
        """Read the rows of a cache, or leave them in their file where memory has no room for them.

        Args:
            cache: The cache.
            parts: Rows to train on, and one or more parts to choose by.
            device: Where they will be worked on.
            say: Where lines for people go.

        Raises:
            CacheError: If a feature is not finite.
        """
        num_readers = available_cores() if device.type == "cpu" else 1
        features, plain = _join(read_rows(parts, device, say, copies=2, readers=num_readers))
        groups, images, names = [], [], []
        for part in parts:
            split, rows = part.split, part.rows.tolist()
            groups += [split.groups[row] if split.groups else None for row in rows]
            hashes = split.image_sha256[part.rows]
            images += [image.tobytes() if image.any() else None for image in hashes]
            names += [f"{split.name}/{split.paths[row]}" for row in rows]
        num_train, num_rows = len(parts[0].rows), len(features)
        return cls(
            features, plain, np.concatenate([part.targets for part in parts]),
            (np.arange(num_train), np.arange(num_train, num_rows)),
            build_units(groups, images), names, cache.classes, cache,
        )  # fmt: skip

    def take(self, pair: Pair) -> Arrays:
        """Return the arrays of a pair."""
        train, valid = pair
        if pair is self.pair:  # no copies
            n = len(train)
            return self.features[:n], self.targets[:n], self.plain[n:], self.targets[n:]
        return self.features[train], self.targets[train], self.plain[valid], self.targets[valid]

    def make_folds(self, number: int, seed: int) -> list[Pair]:
        """Return pairs that judge by each row once.

        Args:
            number: Of folds, two or more.
            seed: Another seed, other folds.

        Raises:
            CacheError: If a class has too few units.
        """
        parts = self._assign({f"fold {i + 1}": 1 / number for i in range(number)}, seed, "--folds")
        return [
            (np.flatnonzero(parts != name), np.flatnonzero(parts == name))
            for name in dict.fromkeys(sorted(parts.tolist()))
        ]

    def hold_out(self, seed: int) -> Pair:
        """Return a pair of about the sizes of the cache's own.

        Args:
            seed: Another seed, another pair.

        Raises:
            CacheError: If a class has too few units.
        """
        share = len(self.pair[1]) / len(self.targets)
        parts = self._assign({"train": 1 - share, "valid": share}, seed, "--repeats")
        return np.flatnonzero(parts == "train"), np.flatnonzero(parts == "valid")

    def split_off(self, rows: RowNumbers, share: float, seed: int) -> Pair:
        """Return some rows as a pair, about ``share`` of each class to judge by.

        It is the pair that ``train --valid-fraction`` would choose of a cache of these rows.

        Args:
            rows: Ascending; all rows of a unit, or none.
            share: Between 0 and 1.
            seed: Another seed, another pair.

        Raises:
            CacheError: If a class has too few units.
        """
        place = {row: i for i, row in enumerate(rows.tolist())}
        units = [[place[row] for row in unit] for unit in self.units if unit[0] in place]
        names, shares = [self.names[row] for row in rows], {"train": 1 - share, "valid": share}
        try:
            parts = share_out(self.targets[rows], self.classes, units, names, shares, seed)
        except DataError as error:
            raise CacheError(
                "--folds", expected=f"{error.what} in the fold, in the rows to train on and in "
                "those to choose the epoch by", found="its images in too few groups to part them",
                where=self.cache.path, hint="Add images of other groups, or leave that class out",
            ) from error  # fmt: skip
        return rows[parts == "train"], rows[parts == "valid"]

    def _assign(self, shares: dict[str, float], seed: int, option: str) -> npt.NDArray[Any]:
        try:
            return share_out(self.targets, self.classes, self.units, self.names, shares, seed)
        except DataError as error:
            raise CacheError(
                option, expected=f"{error.what} in each of {len(shares)} parts",
                found="its images in too few groups to part them", where=self.cache.path,
                hint="Lower --folds" if option == "--folds" else "Add images of other groups",
            ) from error  # fmt: skip


def _join(parts: Sequence[Features]) -> tuple[Features, Features]:
    """Return the features of all parts, and of all the images as they are."""
    stored = [part for part in parts if isinstance(part, StoredFeatures)]
    if stored:
        joined = StoredFeatures.join(stored)
        return joined, joined.plain()
    train, *others = [part for part in parts if not isinstance(part, StoredFeatures)]
    if train.ndim == 2:
        features = np.concatenate([train, *others])
        return features, features
    views = [np.broadcast_to(part[:, None], (len(part), *train.shape[1:])) for part in others]
    return np.concatenate([train, *views]), np.concatenate([train[:, 0], *others])
