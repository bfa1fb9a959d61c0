"""Finish an extraction: write the cache from all that the ledger knows, whole or not at all.

Reads: the old cache and shards. Writes: ``CACHE``, and ``CACHE.dicom.csv`` where there is DICOM;
removes ``CACHE.partial/``.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from featcache.cache.precisions import row_precisions, with_row_precisions
from featcache.cache.reading import Cache
from featcache.cache.writing import SplitRows, write_rows
from featcache.data.dataset import Sample
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
        samples, numbers = job.ledger.rows_of(name)
        is_truncated = map(job.ledger.is_truncated, numbers)
        truncated += [s.path for s, cut in zip(samples, is_truncated, strict=True) if cut]
        _refuse_empty(job, name, samples)
        now = job.options.precision
        precisions[name] = [now]  # of all rows
        if of_old:
            precisions[name] = [of_old[n] if n < len(of_old) else now for n in numbers]
        splits[name] = _split_rows(job, name, samples, numbers)
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


def _refuse_empty(job: Job, split: str, samples: Sequence[Sample]) -> None:
    left = {sample.target for sample in samples}
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
    job: Job, split: str, samples: Sequence[Sample], numbers: npt.NDArray[np.int32]
) -> SplitRows:
    num_views, ledger = job.num_views[split], job.ledger
    views = () if num_views == 1 else (num_views,)
    is_grouped = bool(samples) and samples[0].group is not None
    return SplitRows(
        shape=(len(samples), *views, job.recipe.backbone.num_features),
        dtype=job.dtype,
        feature_blocks=lambda: ledger.feature_blocks(numbers, num_views),
        targets=as_targets(samples),
        paths=[s.path for s in samples],
        groups=[str(s.group) for s in samples] if is_grouped else None,
        image_sha256=ledger.hash_column(numbers),
        image_bytes=np.fromiter((s.image_bytes for s in samples), np.int64),
        mtime_ns=np.fromiter((s.mtime_ns for s in samples), np.int64),
    )
