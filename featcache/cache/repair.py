"""Repair: write a cache again without its damaged rows.

Reads: a cache, damaged or not. Writes: the given file.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from featcache.cache.container import ArrayReader, Container
from featcache.cache.contents import check_table, decode_texts, read_json, read_texts
from featcache.cache.integrity import BLOCK_ROWS, BadRow, Damage, find_infinite
from featcache.cache.precisions import read_row_precisions, with_row_precisions
from featcache.cache.reading import Cache, Failure, read_failures
from featcache.cache.writing import SplitRows, write_rows
from featcache.data.folders import SPLITS
from featcache.errors import CacheError

_REASON = "row dropped by featcache verify --repair"


def find_bad_rows(container: Container, damage: Damage) -> list[BadRow]:
    """Return the damaged rows, and those with NaN or infinities.

    Raises:
        CacheError: If identity, classes or task are damaged, or damaged rows cannot be located.
    """
    if damage.is_meaning_lost:
        raise _cannot_repair(
            container, "repair", "an undamaged identity, task and list of classes",
            f"damage in {', '.join(damage.parts)}",
        )  # fmt: skip
    if any(part.startswith("splits/") for part in damage.parts):
        found = f"damage, and none in {', '.join(damage.unlocated)}"
        raise _cannot_repair(container, "repair", "checksums of the rows to find it by", found)
    check_table(container, container.read("task").item().decode("utf-8", "replace"))
    damaged = {(row.split, row.row) for row in damage.rows}
    others = [row for row in find_infinite(container) if (row.split, row.row) not in damaged]
    return [*damage.rows, *others]


def write_without(
    container: Container, bad_rows: Sequence[BadRow], damage: Damage, path: Path
) -> Cache:
    """Write a cache without its bad rows, which become failures.

    The facts of such a failure may be damaged too; the next extraction replaces them. Damaged
    failures are dropped, since every extraction tries failed images again. So is a damaged
    provenance.

    Args:
        container: The cache.
        bad_rows: The rows to leave out, each once.
        damage: What is damaged in it, as ``find_bad_rows`` accepted it.
        path: The file to write.

    Raises:
        CacheError: If no row would be left, or the disk is full.
    """
    splits = [s for s in SPLITS if f"splits/{s}/features" in container.arrays]
    num_rows = sum(container.arrays[f"splits/{s}/features"].shape[0] for s in splits)
    if num_rows and len(bad_rows) == num_rows:
        raise _cannot_repair(
            container, "repair", "a row whose checksum matches", f"none of {num_rows:,}"
        )
    bad: dict[str, list[int]] = {split: [] for split in splits}
    for row in bad_rows:
        bad[row.split].append(row.row)
    classes = read_texts(container, "classes")
    lost = any(part.startswith("failures/") for part in damage.parts)
    failures = [] if lost else list(read_failures(container, len(classes)))
    failures += [_make_failure(container, row, len(classes)) for row in bad_rows]
    provenance: dict[str, Any] = {"lost": "damaged, and dropped by featcache verify --repair"}
    if "provenance" not in damage.parts:
        provenance = read_json(container, "provenance")
        sizes = {split: container.arrays[f"splits/{split}/features"].shape[0] for split in splits}
        made = read_row_precisions(provenance, sizes)
        if made is not None:
            kept = {s: np.delete(np.array(made[s], object), bad[s]).tolist() for s in splits}
            provenance = with_row_precisions(provenance, kept)
    cache = write_rows(
        path, {split: _rows_without(container, split, bad[split]) for split in splits},
        identity=read_json(container, "identity"), provenance=provenance, classes=classes,
        task=container.read("task").item().decode(), failures=failures,
    )  # fmt: skip
    if cache.fingerprint != container.fingerprint:  # the identity was not canonical JSON
        raise _cannot_repair(container, "identity", "JSON as featcache writes it", "other JSON")
    return cache


def _cannot_repair(container: Container, what: str, expected: str, found: str) -> CacheError:
    return CacheError(
        what, expected=expected, found=found, where=container.path,
        hint="It cannot be repaired: featcache extract DATA CACHE --rebuild",
    )  # fmt: skip


def _rows_without(container: Container, split: str, bad: list[int]) -> SplitRows:
    prefix = f"splits/{split}/"
    features = ArrayReader(container, prefix + "features")
    kept = np.delete(np.arange(features.shape[0]), bad)

    def column(name: str) -> npt.NDArray[Any]:
        return container.read(prefix + name)[kept]

    has_groups = prefix + "groups" in container.arrays
    return SplitRows(
        shape=(len(kept), *features.shape[1:]),
        dtype=features.dtype,
        feature_blocks=partial(_blocks, features, kept),
        targets=column("targets"),
        paths=decode_texts(column("paths").tolist()),
        groups=decode_texts(column("groups").tolist()) if has_groups else None,
        image_sha256=column("image_sha256"),
        image_bytes=column("image_bytes"),
        mtime_ns=column("mtime_ns"),
    )


def _blocks(features: ArrayReader, rows: npt.NDArray[np.int64]) -> Iterator[npt.NDArray[Any]]:
    for i in range(0, len(rows), BLOCK_ROWS):
        yield features.take(rows[i : i + BLOCK_ROWS])


def _make_failure(container: Container, row: BadRow, num_classes: int) -> Failure:
    def value(name: str) -> Any:
        return container.read(f"splits/{row.split}/{name}")[row.row]

    target = value("targets")
    known = target.ndim == 0 and 0 <= target < num_classes
    reason = f"{_REASON}: expected {row.expected}, found {row.found}"
    return Failure(
        row.path, row.split, int(target) if known else -1, reason,
        int(value("image_bytes")), int(value("mtime_ns")),
    )  # fmt: skip
