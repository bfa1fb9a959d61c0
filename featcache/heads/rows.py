"""Select the training and validation rows of a cache.

Reads: a cache. Writes: nothing.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from featcache.cache.cache_split import CacheSplit
from featcache.cache.reading import Cache
from featcache.data.dataset import UNLABELLED
from featcache.data.folders import training_split
from featcache.data.stratification import assign_labelled_units, assign_units, build_units
from featcache.errors import (
    CacheError,
    DataError,
    printable,
    warn_user,
)
from featcache.formatting import count, join_few
from featcache.heads.streaming import BLOCK_BYTES, StoredFeatures
from featcache.memory import available_memory
from featcache.runtime import CPU, Device, Say

if TYPE_CHECKING:
    import torch

_MEMORY_SHARE = 0.75  # of what is left: heads, activations and others want some too
_LEAST_BLOCK_BYTES = 1 << 20

RowNumbers = npt.NDArray[np.int64]
Targets = npt.NDArray[Any]
"""(N,) int64; or (N, C) float32 of 0, 1 and NaN = unknown: several labels a row."""


@dataclass(frozen=True)
class Part:
    """Labelled rows of a split that are used for one purpose.

    Args:
        name: ``train`` or ``valid``.
        split: Where they are.
        rows: Their numbers (n,) in the split, ascending.
        num_unlabelled: Rows of the split without a target (multilabel: without a known one).
    """

    name: str
    split: CacheSplit
    rows: RowNumbers
    num_unlabelled: int = 0

    @property
    def targets(self) -> Targets:
        """Targets of the rows."""
        targets: Targets = self.split.targets[self.rows]
        return targets

    @property
    def features(self) -> StoredFeatures:
        """Features (n, D), or (n, V, D) of rows with views to train on: see ``read_rows``.

        The epoch is chosen by images as they are.
        """
        return StoredFeatures(self.split, self.rows, plain=self.name != "train")


def read_rows(
    parts: Sequence[Part], device: Device | torch.device, say: Say, *, copies: int = 1,
    readers: int = 1,
) -> list[npt.NDArray[Any] | StoredFeatures]:  # fmt: skip
    """Return the features of parts: arrays where memory has room for all, else as they are stored.

    Args:
        parts: The rows.
        device: Where they will be worked on.
        say: Told when there is no room.
        copies: How many of each array will be made.
        readers: How many will read blocks at once.

    Raises:
        CacheError: If a feature is not finite.
    """
    stored = [part.features for part in parts]
    as_float32 = sum(4 * math.prod(features.shape) for features in stored)
    # A float16 array is there beside its float32 copy.
    beside = sum(f.num_bytes for f in stored if f.dtype != np.float32)
    room = _MEMORY_SHARE * available_memory(CPU)
    fits = copies * (as_float32 + beside) <= room
    if device.type == "cuda":
        on_device = _MEMORY_SHARE * available_memory(device)
        fits, room = fits and as_float32 <= on_device, min(room, on_device)
    if fits:
        return [features.load() for features in stored]
    # A power of two: the order of the rows depends on the block size, and free memory varies.
    block_bytes = 1 << int(math.log2(max(room / (4 * readers), _LEAST_BLOCK_BYTES)))
    blocks = [features.in_blocks(min(block_bytes, BLOCK_BYTES)) for features in stored]
    say(
        f"features: {as_float32 / 1e9:,.3g} GB, memory for them: {room / 1e9:,.3g} GB; streaming "
        f"in blocks of {blocks[0].block_rows:,} rows from the file"
    )
    return [*blocks]


def check_cache(cache: Cache) -> None:
    """Refuse caches that no head can be trained on.

    Raises:
        CacheError: If it has fewer than two classes.
    """
    if len(cache.classes) < 2:
        hint = "Extract images that lie in one folder per class"
        if cache.task == "multilabel":
            hint = (
                "Name two labels or more; or write yes and no as two classes: featcache.write_cache"
            )
        raise CacheError(
            "classes", expected="two or more", found=", ".join(cache.classes) or "none",
            where=cache.path, hint=hint,
        )  # fmt: skip


def training_source(cache: Cache) -> str:
    """Return the split that heads are trained on, ``train`` or ``all``.

    Raises:
        CacheError: If there is neither.
    """
    source = training_split(cache.splits)
    if source is None or (source == "all" and "valid" in cache.splits):
        raise CacheError(
            "split train", expected="rows to train on", found="only " + ", ".join(cache.splits),
            where=cache.path, hint="Extract a data set that has train and valid",
        )  # fmt: skip
    return source


def choose_rows(
    cache: Cache, valid_fraction: float | None, seed: int, say: Say
) -> tuple[Part, Part]:
    """Return the rows to train on and the rows to choose the epoch by.

    Args:
        cache: One with ``train`` (or ``all``) and, without ``valid_fraction``, ``valid``.
        valid_fraction: Share of ``train`` (or of ``all``) to hold out: stratified (of several
            labels a row, by its rarest positive one), groups and identical images together; None
            takes ``valid``. A split ``valid`` is not touched then.
        seed: Another seed, another hold-out.
        say: Where lines for people go.

    Raises:
        CacheError: If a split is missing or a class lacks rows; for multilabel caches, if a class
            is unknown in all rows to train on. One that is never positive, or never negative,
            there is warned of.
    """
    source = training_source(cache)
    if valid_fraction is None and "valid" not in cache.splits:
        raise CacheError(
            "split valid", expected="rows to choose the epoch by",
            found="only " + ", ".join(cache.splits), where=cache.path,
            hint="Hold out a part of the others with, say, --valid-fraction 0.2",
        )  # fmt: skip
    train_part = labelled_part(cache, source, "train")
    if valid_fraction is None:
        parts = train_part, labelled_part(cache, "valid", "valid")
    else:
        if cache.task == "multiclass":
            _check_classes(cache, train_part, at_least=2)
        parts = _hold_out(cache, train_part, valid_fraction, seed)
        if train_part.split.groups is None:
            say("this cache has no groups: images of one patient may be in both train and valid")
        if "valid" in cache.splits:
            say(
                f"split valid is not touched: {count(len(cache.splits['valid']), 'row')}; the "
                "hold-out below is of train"
            )
    if cache.task == "multilabel":
        check_labels(cache, parts[0].targets, f"split {parts[0].split.name}")
    else:
        _check_classes(cache, parts[0], at_least=1)
    if not len(parts[1].rows):
        raise CacheError(
            "split valid", expected="labelled rows", found="none", where=cache.path,
            hint="Put images of every class into valid and extract again",
        )  # fmt: skip
    return parts


def labelled_part(cache: Cache, split_name: str, name: str) -> Part:
    """Return the labelled rows of a split, for the purpose ``name``: ``train`` or ``valid``."""
    split = cache.split(split_name)
    rows = find_labelled(split.targets)
    return Part(name, split, rows, len(split) - len(rows))


def find_labelled(targets: Targets) -> RowNumbers:
    """Return the numbers of the rows that have a target (multilabel: a known one)."""
    has_target = ~np.isnan(targets).all(axis=1) if targets.ndim == 2 else targets != UNLABELLED
    rows: RowNumbers = np.flatnonzero(has_target)
    return rows


def check_labels(cache: Cache, targets: Targets, what: str) -> None:
    """Refuse a class that is unknown in all rows to train on; warn of one with but one answer.

    Args:
        cache: For messages.
        targets: (N, C) of the rows.
        what: What they are rows of, for messages.

    Raises:
        CacheError: If a class is unknown in all of them.
    """
    has_yes, has_no = (targets == 1).any(axis=0), (targets == 0).any(axis=0)
    is_known = (has_yes | has_no).tolist()
    unknown = [name for name, known in zip(cache.classes, is_known, strict=True) if not known]
    if unknown:
        raise CacheError(
            what, expected="known targets of each class to train on",
            found="none of " + join_few(unknown), where=cache.path,
            hint="Leave that class out: featcache select --classes takes the others",
        )  # fmt: skip
    one_sided = [
        f"{name} (never {'negative' if yes else 'positive'})"
        for name, yes, no in zip(cache.classes, has_yes, has_no, strict=True) if not (yes and no)
    ]  # fmt: skip
    if one_sided:
        message = f"cannot be learned from these rows to train on: {join_few(one_sided)}"
        warn_user(printable(message))


def _check_classes(cache: Cache, part: Part, *, at_least: int) -> None:
    counts = np.bincount(part.targets, minlength=len(cache.classes))
    scarce = {n: int(k) for n, k in zip(cache.classes, counts, strict=True) if k < at_least}
    if scarce:
        raise CacheError(
            f"split {part.split.name}", expected=f"at least {at_least} labelled rows of each class",
            found=join_few(f"{number:,} of {name}" for name, number in scarce.items()),
            where=cache.path, hint="Add images of that class, or leave its folder out",
        )  # fmt: skip


def share_out(  # noqa: PLR0917
    targets: Targets, classes: Sequence[str], units: Sequence[Sequence[int]], names: Sequence[str],
    shares: Mapping[str, float], seed: int,
) -> npt.NDArray[Any]:  # fmt: skip
    """Return the part of each row: see ``stratification``.

    Raises:
        DataError: If a class, or for multilabel targets any row, does not reach every part.
    """
    if targets.ndim == 2:
        return np.array(assign_labelled_units(units, targets == 1, names, shares, seed=seed))
    labels = [classes[target] for target in targets]
    return np.array(assign_units(units, labels, names, shares, seed=seed))


def _hold_out(cache: Cache, part: Part, fraction: float, seed: int) -> tuple[Part, Part]:
    """Split off about ``fraction`` of each class, groups and copies of one image together."""
    split, rows = part.split, part.rows.tolist()
    groups = [split.groups[row] if split.groups else None for row in rows]
    images = [image.tobytes() if image.any() else None for image in split.image_sha256[part.rows]]
    units, paths = build_units(groups, images), [split.paths[row] for row in rows]
    shares = {"train": 1 - fraction, "valid": fraction}
    try:
        names = share_out(part.targets, cache.classes, units, paths, shares, seed)
    except DataError as error:
        raise CacheError(
            "--valid-fraction", expected=f"{error.what} on both sides",
            found="its images in too few groups to part them", where=cache.path,
            hint="Split the images yourself: featcache split",
        ) from error  # fmt: skip
    is_held = names == "valid"
    return (
        dataclasses.replace(part, rows=part.rows[~is_held]),
        Part("valid", split, part.rows[is_held]),
    )
