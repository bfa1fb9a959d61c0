"""Updating a cache: is the one that is there the one to go on with, and has anything changed?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from featcache.cache.container import hint_of_folder, is_container
from featcache.cache.earlier import refuse_misbuilt
from featcache.cache.identity import name_differences
from featcache.cache.reading import Cache, Failure, open_cache
from featcache.data.dataset import ImageDataset, Samples
from featcache.data.samples import UNKNOWN, labels_text
from featcache.errors import CacheError, ConfigError
from featcache.extraction.ledger import Ledger
from featcache.extraction.recipe import Recipe


def open_existing(path: Path, recipe: Recipe, *, rebuild: bool) -> Cache | None:
    """Open the cache that is there already, or return None where there is none to keep.

    Raises:
        CacheError: If the file is no cache; or if ``rebuild`` is not set and it is one of another
            identity.
    """
    if not path.exists():
        return None
    if not path.is_file():  # to open a pipe would block
        found = "a folder" if path.is_dir() else "not a regular file"
        raise ConfigError(
            "CACHE",
            expected="a file",
            found=found,
            where=path,
            hint=hint_of_folder(path) or "Choose another name",
        )
    try:
        old = open_cache(path)
    except CacheError:
        if rebuild and is_container(path):
            return None  # damaged, or of a newer version; other people's files stay
        raise
    if rebuild:
        return None
    if recipe.backbone.built_as is not None:
        refuse_misbuilt(old.identity, path)
    if old.fingerprint != recipe.fingerprint:
        wanted, found = name_differences(recipe.identity, old.identity)
        raise CacheError(
            "cache identity", expected=wanted, found=found, where=path,
            hint="Choose another file name, or replace it with --rebuild",
        )  # fmt: skip
    return old


def check_update(old: Cache, dataset: ImageDataset, limit: int | None) -> None:
    """Refuse an update that would throw away what the cache holds by mistake.

    Raises:
        CacheError: If it has several labels per image and ``dataset`` has not, if a ``limit``
            leaves images of it out, if it has groups and ``dataset`` has none, or if it was
            rearranged by ``select`` and ``dataset`` is not.
    """
    if old.task == "multilabel" and dataset.task != old.task:
        raise CacheError(
            "cache", expected="one class per image, as the images have",
            found="several labels per image", where=old.path,
            hint="Name the labels of a CSV (--target-columns), choose another file name, or "
            "replace it and its labels with --rebuild",
        )  # fmt: skip
    known = {path for split in old.splits.values() for path in split.paths}
    if limit is not None and known - {*dataset.samples.paths}:
        found = f"{len(known):,} images, not all among the first {limit:,}"
        raise _wrong_update(
            old, "--limit", "a new cache", found, "Use another cache file for a trial run"
        )
    # groups that are the paths come from a --group-by that matched nothing, in an older version
    has_groups = any(
        split.groups is not None and split.groups != split.paths for split in old.splits.values()
    )
    if has_groups and all(group is None for group in dataset.samples.groups):
        raise _wrong_update(
            old,
            "update of the cache",
            "groups, as it has",
            "none",
            "Repeat --group-by or --group-by-path",
        )
    if "selected_from" in old.provenance:
        _refuse_undoing(old, dataset)


def _refuse_undoing(old: Cache, dataset: ImageDataset) -> None:
    """Refuse to bring back the splits and classes that ``select`` has replaced."""
    there = {s.path: (s.split, dataset.label_of(s)) for s in dataset.samples}
    for name, split in old.splits.items():
        for path, target in zip(split.paths, split.targets, strict=True):
            chosen = name, label_of_row(old, target)
            found = there.get(path, chosen)
            if found != chosen:
                raise _wrong_update(
                    old, "update of what featcache select made",
                    f"{path} in {'/'.join(filter(None, chosen))}, as selected",
                    "/".join(filter(None, found)), "Update its source and select again",
                )  # fmt: skip


def label_of_row(cache: Cache, target: Any) -> str:
    """Return a row's class or labels as text, as ``ImageDataset.label_of`` does."""
    if cache.task == "multilabel":
        return labels_text(cache.classes, target.tolist())
    return cache.classes[target] if target >= 0 else ""


def as_targets(samples: Samples, positions: npt.NDArray[np.int64]) -> npt.NDArray[Any]:
    """Return targets of some samples (N,) as a cache holds them.

    Returns:
        (N,) int64, or (N, C) float32 with NaN = unknown.
    """
    if not len(positions) or samples[positions[0]].targets is None:
        return np.fromiter((samples.targets[p] for p in positions), np.int64, len(positions))
    several = np.array([samples[p].targets for p in positions], np.float32)
    several[several == UNKNOWN] = np.nan
    return several


@dataclass(frozen=True)
class Changes:
    """What became of the rows of an older cache.

    Attributes:
        num_kept: Images of the same path and content.
        num_moved: Contents whose old path is no longer there, under another path.
        num_gone: Rows whose path is no longer there, and which did not move.
    """

    num_kept: int = 0
    num_moved: int = 0
    num_gone: int = 0


def find_changes(old: Cache | None, dataset: ImageDataset, ledger: Ledger) -> Changes:
    """Return what became of the rows of the older cache, if there is one."""
    if old is None:
        return Changes()
    before = {
        path: row.tobytes()
        for split in old.splits.values()
        for path, row in zip(split.paths, split.image_sha256, strict=True)
    }
    paths = dataset.samples.paths
    missing = Counter(before[p] for p in before.keys() - {*paths})
    num_kept = num_moved = 0
    for split in dataset.splits:
        positions, contents = ledger.rows_of(split)
        for position, row in zip(positions, ledger.sha256_of(contents), strict=True):
            sha256 = row.tobytes()
            if before.get(paths[position]) == sha256:
                num_kept += 1
            elif missing[sha256] > 0:
                num_moved += 1
                missing[sha256] -= 1
    return Changes(num_kept, num_moved, missing.total())


def refuse_other_images(old: Cache, changes: Changes) -> None:
    """Refuse images of which the cache knows none, neither by name nor by content.

    Raises:
        CacheError: If that is so.
    """
    num_known = sum(len(split) for split in old.splits.values())
    if num_known and changes.num_gone == num_known:
        found = f"none of its {num_known:,}"
        raise _wrong_update(old, "update of the cache", "images it knows", found, "Check DATA")


def _wrong_update(old: Cache, what: str, expected: str, found: str, hint: str) -> CacheError:
    hint = f"{hint}, or replace it with --rebuild"
    return CacheError(what, expected=expected, found=found, where=old.path, hint=hint)


def is_unchanged(
    old: Cache, dataset: ImageDataset, failures: Sequence[Failure], changes: Changes
) -> bool:
    """Return whether a run gained nothing: say, images that had failed have failed again."""
    failed = frozenset(failure.path for failure in failures)
    same = set(old.failures) == set(failures)
    kept = changes.num_kept == sum(len(split) for split in old.splits.values())
    return same and kept and holds(old, dataset, failed)


def holds(old: Cache, dataset: ImageDataset, failed: frozenset[str]) -> bool:
    """Return whether the cache holds these images but the failed, with targets and groups."""
    if (tuple(old.splits), old.classes, old.task) != (
        dataset.splits, dataset.classes, dataset.task,
    ):  # fmt: skip
        return False
    paths = dataset.samples.paths
    for name, split in old.splits.items():
        positions = dataset.samples.numbers_of(name)
        if failed:
            positions = positions[[paths[position] not in failed for position in positions]]
        samples = dataset.samples.taken(positions)
        is_same = (
            samples.image_bytes.tolist() == split.image_bytes.tolist()
            and samples.mtime_ns.tolist() == split.mtime_ns.tolist()
            and [*samples.paths] == split.paths
        )
        if not is_same:
            return False
        targets, has_nan = as_targets(dataset.samples, positions), old.task == "multilabel"
        if not np.array_equal(targets, split.targets, equal_nan=has_nan):
            return False
        groups = split.groups if split.groups is not None else [None] * len(samples)
        if any(own != group for own, group in zip(samples.groups, groups, strict=True)):
            return False
    return True
