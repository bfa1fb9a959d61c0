"""Rows -> pairs of rows to train on and rows to judge by, again and again.

What belongs together (a group, copies of one image) never stands on both sides of a pair, and
every class stands on both.

Reads: a cache. Writes: nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from featcache.cache import Cache
from featcache.errors import CacheError, DataError
from featcache.partition import Part, Rows
from featcache.stratification import assign_units, build_units

Pair: TypeAlias = tuple[Rows, Rows]
"""Numbers of rows to train on and to judge by."""

Arrays: TypeAlias = tuple[npt.NDArray[Any], Rows, npt.NDArray[Any], Rows]
"""Features and targets to train on, features and targets to judge by."""


@dataclass(frozen=True)
class Pool:
    """The rows to train on and to choose by, in one.

    Attributes:
        features: (N, D), or (N, V, D) of rows with views. Rows to choose by have but one, V times.
        plain: (N, D), the images as they are.
        targets: (N,) int64.
        pair: The cache's own rows to train on and to choose by.
        units: Rows of each unit that stays together.
        names: Of the rows, which decide with the seed what goes where.
        classes: Names.
        cache: Only for messages.
    """

    features: npt.NDArray[Any]
    plain: npt.NDArray[Any]
    targets: Rows
    pair: Pair
    units: list[list[int]]
    names: list[str]
    classes: tuple[str, ...]
    cache: Cache

    @classmethod
    def of(cls, cache: Cache, parts: tuple[Part, Part]) -> Pool:
        """Read the rows of a cache.

        Raises:
            CacheError: If a feature is not finite.
        """
        (train, train_targets), (valid, valid_targets) = (part.arrays(cache) for part in parts)
        features, plain = valid, train
        if train.ndim == 3:
            features = np.broadcast_to(valid[:, None], (len(valid), *train.shape[1:]))
            plain = train[:, 0]
        groups, images, names = [], [], []
        for part in parts:
            split, rows = part.split, part.rows.tolist()
            groups += [split.groups[row] if split.groups else None for row in rows]
            hashes = split.image_sha256[part.rows]
            images += [image.tobytes() if image.any() else None for image in hashes]
            names += [f"{split.name}/{split.paths[row]}" for row in rows]
        num_train, num_rows = len(train), len(train) + len(valid)
        return cls(
            np.concatenate([train, features]), np.concatenate([plain, valid]),
            np.concatenate([train_targets, valid_targets]),
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

    def _assign(self, shares: dict[str, float], seed: int, option: str) -> npt.NDArray[Any]:
        labels = [self.classes[target] for target in self.targets]
        try:
            return np.array(assign_units(self.units, labels, self.names, shares, seed=seed))
        except DataError as error:
            raise CacheError(
                option, expected=f"{error.what} in each of {len(shares)} parts",
                found="its images in too few groups to part them", where=self.cache.path,
                hint="Lower --folds" if option == "--folds" else "Add images of other groups",
            ) from error  # fmt: skip
