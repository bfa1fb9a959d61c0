"""Finish an extraction: write the cache from all that the ledger knows, whole or not at all.

Reads: the old cache and shards. Writes: ``CACHE``, and ``CACHE.dicom.csv`` where there is DICOM;
removes ``CACHE.partial/``.
"""

from __future__ import annotations

from array import array
from typing import Any

import numpy as np
import numpy.typing as npt

from featcache.cache.precisions import row_precisions, with_row_precisions
from featcache.cache.reading import Cache
from featcache.cache.writing import SplitRows, write_rows
from featcache.data.columns import Texts
from featcache.errors import DataError
from featcache.extraction.identifiers import (
    identifier_facts,
    without_identifier_facts,
    write_columns,
)
from featcache.extraction.plan import Job
from featcache.extraction.reports import ExtractionSummary, describe_result, summarise
from featcache.extraction.update import as_targets, find_changes, is_unchanged
from featcache.renames import remove_temporaries


def finish(job: Job, start: float) -> ExtractionSummary:
    """Write the cache of a job, unless the one that is there is what would be written.

    Args:
        job: A job none of whose images is wanted any more.
        start: When the call began, of ``time.perf_counter``.

    Raises:
        DataError: If a class of a split has no readable image.
        CacheError: If the disk is full or the folder cannot be written.
    """
    changes = find_changes(job.old, job.dataset, job.ledger)
    failures = job.ledger.failures
    if (
        job.old is not None
        and job.is_listed_alike
        and is_unchanged(job.old, job.dataset, failures, changes)
    ):
        remove_temporaries(job.path)
        job.partial.remove()
        return summarise(job.old, "up to date", start, job.dataset, num_kept=changes.num_kept)
    cache = _write(job)
    summary = summarise(
        cache, "extracted", start, job.dataset, num_new=job.ledger.num_new,
        num_kept=changes.num_kept, num_moved=changes.num_moved, num_gone=changes.num_gone,
        images_per_second=job.images_per_second,
    )  # fmt: skip
    describe_result(cache, summary, job.options.say)
    return summary


def _write(job: Job) -> Cache:
    """Write the cache, then drop the shards."""
    splits: dict[str, SplitRows] = {}
    truncated: list[str] = []
    old = row_precisions(job.old).values() if job.old is not None else ()
    # The old cache's contents have the first numbers, in the order of its rows.
    of_old = [precision for rows in old for precision in rows]
    precisions: dict[str, list[str]] = {}
    for name in job.dataset.splits:
        positions, numbers = job.ledger.rows_of(name)
        is_truncated = map(job.ledger.is_truncated, numbers)
        paths = job.dataset.samples.paths
        truncated += [paths[p] for p, cut in zip(positions, is_truncated, strict=True) if cut]
        _refuse_empty(job, name, positions)
        now = job.options.precision
        precisions[name] = [now]  # of all rows
        if of_old:
            precisions[name] = [of_old[n] if n < len(of_old) else now for n in numbers]
        splits[name] = _split_rows(job, name, positions, numbers)
    remove_temporaries(job.path)  # of a run killed while writing: the lock is ours now
    listing = job.options.listing.as_json()
    made = without_identifier_facts(job.provenance) | identifier_facts(job.dataset)
    provenance = with_row_precisions(made, precisions) | {"truncated": truncated}
    if listing:
        provenance["listing"] = listing
    write_columns(job.dataset, job.path)
    cache = write_rows(
        job.path, splits, identity=job.recipe.identity, provenance=provenance,
        classes=job.dataset.classes, task=job.dataset.task, failures=job.ledger.failures,
        publish=job.output.publish,
    )  # fmt: skip
    job.partial.remove()
    return cache


def _refuse_empty(job: Job, split: str, positions: npt.NDArray[np.int64]) -> None:
    left = {job.dataset.samples.targets[position] for position in positions}
    for (name, target), planned in job.ledger.planned.items():
        if name == split and target not in left:
            label = job.dataset.classes[target] if target >= 0 else "images"
            failures = (f for f in job.ledger.failures if (f.split, f.target) == (name, target))
            first = next((f", the first being {f.path}: {f.reason}" for f in failures), "")
            raise DataError(
                f"{split}/{label}", expected="at least one readable image",
                found=f"none of {planned}{first}", hint="Mend them; the same command then goes on",
            )  # fmt: skip


def _split_rows(
    job: Job, split: str, positions: npt.NDArray[np.int64], numbers: npt.NDArray[np.int32]
) -> SplitRows:
    num_views, ledger, samples = job.num_views[split], job.ledger, job.dataset.samples
    views = () if num_views == 1 else (num_views,)
    is_grouped = len(positions) > 0 and samples[positions[0]].group is not None
    return SplitRows(
        shape=(len(positions), *views, job.recipe.backbone.num_features),
        dtype=job.dtype,
        feature_blocks=lambda: ledger.feature_blocks(numbers, num_views),
        targets=as_targets(samples, positions),
        paths=_Paths(samples.paths, positions),
        groups=[str(samples.group_of(p)) for p in positions] if is_grouped else None,
        image_sha256=ledger.hash_column(numbers),
        image_bytes=_Integers(samples.image_bytes, positions),
        mtime_ns=_Integers(samples.mtime_ns, positions),
    )


class _Paths:
    """The paths of some images, made when they are written: ``writing.Column``."""

    def __init__(self, paths: Texts, positions: npt.NDArray[np.int64]) -> None:
        self._paths, self._positions = paths, positions
        self.shape = (len(positions),)
        self.dtype = np.dtype(f"S{max(paths.longest(positions), 1)}")

    def __getitem__(self, rows: slice) -> npt.NDArray[Any]:
        part = self._positions[rows]
        return np.fromiter(map(self._paths.bytes_of, part), self.dtype, len(part))


class _Integers:
    """An integer of each of some images: ``writing.Column``."""

    def __init__(self, values: array[int], positions: npt.NDArray[np.int64]) -> None:
        self._values, self._positions = values, positions
        self.shape, self.dtype = (len(positions),), np.dtype(np.int64)

    def __getitem__(self, rows: slice) -> npt.NDArray[np.int64]:
        return np.frombuffer(self._values, np.int64)[self._positions[rows]]
