"""What an extraction says: what it found and what it did. Its forecast is in ``projection``."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from featcache.cache.precisions import UNKNOWN, describe_precision
from featcache.cache.provenance import training_data_note
from featcache.cache.reading import Cache
from featcache.data.dataset import ImageDataset
from featcache.data.groups import say_matches
from featcache.errors import printable, warn_user
from featcache.extraction.plan import Job
from featcache.extraction.recipe import Recipe
from featcache.files import result_as_dict
from featcache.formatting import brief_repr, count, list_counts
from featcache.runtime import Say

_NUM_SHOWN_FAILURES = 5


@dataclass(frozen=True)
class ExtractionSummary:
    """What an extraction did.

    Attributes:
        cache: The cache file.
        status: ``extracted``, or ``up to date`` when there was nothing to do; or ``part 2/4``: then
            all numbers are of that part.
        num_images: Rows in the cache.
        num_new: Images that went through the network.
        num_known: Images whose features were known: from an older cache, an interrupted run, or
            another image of the same content.
        num_kept: Of those, images of the older cache of the same path and content.
        num_moved: Of those, contents of the older cache under another path.
        num_gone: Rows of the older cache whose images are no longer there.
        num_failed: Images that could not be read; they are listed in the cache.
        num_truncated: Cut-off images that were filled in (``--truncated keep``).
        num_ignored: Reason -> number of files and folders that are left out.
        ignored_endings: Ending -> number of files that are left out for it.
        ignored_columns: Headers of a CSV that are not used.
        splits: Per split, rows per class (or ``unlabelled``); of several labels per image, rows
            that have a yes for each class.
        engine: ``onnx``, ``folded`` or ``eager``.
        precision: That of all rows, or the precisions there are; None where none is known.
        parity: Largest relative L2 error of a probed image against the eager fp32 forward, of the
            features as they are stored.
        num_probed: How many images were measured for it.
        seconds: Wall time of the whole call.
        images_per_second: New images over the time of producing their features.
        fingerprint: Of the recipe.
        content_sha256: Of the cache's content; empty after a part of it.
    """

    __module__ = "featcache"
    __repr__ = brief_repr

    cache: Path
    status: str
    num_images: int
    num_new: int
    num_known: int
    num_kept: int
    num_moved: int
    num_gone: int
    num_failed: int
    num_truncated: int
    num_ignored: dict[str, int]
    ignored_endings: dict[str, int]
    ignored_columns: tuple[str, ...]
    splits: dict[str, dict[str, int]]
    engine: str
    precision: str | None
    parity: float | None
    num_probed: int
    seconds: float
    images_per_second: float | None
    fingerprint: str
    content_sha256: str

    def as_dict(self) -> dict[str, Any]:
        """Return the summary as JSON values."""
        return result_as_dict(self)


def describe_dataset(dataset: ImageDataset, say: Say, *, by_path: bool) -> None:
    """Say what was found: images by split and class, what is left alone, groups.

    Args:
        dataset: What was found.
        say: Called with the lines.
        by_path: Groups are those of ``group_by_path``, not of ``group_by``.
    """
    for split, counts in dataset.count().items():
        if dataset.task == "multilabel":
            images = count(len(dataset.split(split)), "image")
            say(f"{split:>6}: {images}; yes: {list_counts(counts)}")
        else:
            say(f"{split:>6}: {list_counts(counts)}")
    for line in (*dataset.notes, *dataset.describe_ignored()):
        say(line)
    if dataset.num_found_by_name:
        say(f"paths: {count(dataset.num_found_by_name, 'file')} found by name, in folders below")
    if dataset.grouped is not None:
        total = Counter(map(dataset.kind_of, dataset.samples))
        num_groups = len({sample.group or sample.path for sample in dataset.samples})
        option = "--group-by-path" if by_path else "--group-by"
        say_matches(dataset.grouped, total, num_groups, option, say)


def describe_recipe(recipe: Recipe, say: Say) -> None:
    """Say what makes features of the images."""
    backbone, rules = recipe.backbone, recipe.rules
    say(f"Backbone: {backbone.name}, weights {backbone.weights_source}, {backbone.num_features}-d.")
    mean, std = (" ".join(f"{v:g}" for v in values) for values in (backbone.mean, backbone.std))
    resized = "" if rules.resize_size is None else f" of {rules.resize_size}"
    say(
        f"Pixels: {rules.image_size} x {rules.image_size} {rules.crop_mode}{resized}, "
        f"{rules.interpolation}, mean {mean}, std {std}."
    )
    if note := training_data_note(backbone.name):
        say(f"Note: {note}.")
    if rules.dicom is not None:
        say(f"DICOM: {rules.dicom.describe()}.")
    views = recipe.view_rules
    if views.augmentation is not None:
        say(f"Views: {views.num_views} of every image to train on, {views.augmentation}.")


def describe_result(cache: Cache, summary: ExtractionSummary, say: Say) -> None:
    """Say what failed and what it took; a warning tells of images that are not in the cache."""
    for failure in cache.failures[:_NUM_SHOWN_FAILURES]:
        say(f"failed: {printable(failure.path)}: {printable(failure.reason)}")
    if len(cache.failures) > _NUM_SHOWN_FAILURES:
        more = len(cache.failures) - _NUM_SHOWN_FAILURES
        say(f"failed: {more:,} more, listed by featcache info {printable(cache.path)}")
    if cache.failures:
        failed = count(len(cache.failures), "image")
        are = "is" if len(cache.failures) == 1 else "are"
        warn_user(f"{failed} could not be read and {are} not in the cache")
    counts = {
        "new": summary.num_new, "kept": summary.num_kept, "moved": summary.num_moved,
        "known": summary.num_known - summary.num_kept - summary.num_moved,
        "gone": summary.num_gone,
    }  # fmt: skip
    listed = ", ".join(f"{n:,} {word}" for word, n in counts.items() if n or word == "new")
    rate = ""  # of the pipeline: the network was loaded, and an engine chosen, before
    if summary.images_per_second is not None:
        rate = f", {summary.images_per_second:,} images/s once it ran"
    say(
        f"{printable(cache.path)}: {count(summary.num_images, 'image')} ({listed}) in "
        f"{summary.seconds:.1f} s{rate}."
    )
    stages = cache.provenance.get("stage_seconds")
    if summary.num_new and isinstance(stages, dict):
        decode, forward, write = (stages.get(k, 0.0) for k in ("decode", "forward", "write"))
        say(
            f"Time: decode {decode:.1f} s and forward {forward:.1f} s (all threads together), "
            f"write {write:.1f} s; longest waited for: {cache.provenance.get('bottleneck')}."
        )


def summarise(
    cache: Cache, status: str, start: float, dataset: ImageDataset, *, num_new: int = 0,
    num_kept: int, num_moved: int = 0, num_gone: int = 0, images_per_second: float | None = None,
) -> ExtractionSummary:  # fmt: skip
    """Return the summary of a cache that is there; ``start`` is when the call began."""
    splits: dict[str, dict[str, int]] = {}
    for name, split in cache.splits.items():
        if cache.task == "multilabel":
            num_yes = (split.targets == 1).sum(axis=0).tolist()
            splits[name] = dict(zip(cache.classes, num_yes, strict=True))
        else:
            counts = Counter(split.targets.tolist())
            labels = {-1: "unlabelled", **dict(enumerate(cache.classes))}
            splits[name] = {labels[t]: n for t, n in sorted(counts.items())}
    num_images = sum(len(s) for s in cache.splits.values())
    truncated = cache.provenance.get("truncated")
    return ExtractionSummary(
        cache=cache.path, status=status,
        num_images=num_images, num_new=num_new, num_known=num_images - num_new,
        num_kept=num_kept, num_moved=num_moved, num_gone=num_gone, num_failed=len(cache.failures),
        num_truncated=len(truncated) if isinstance(truncated, list) else 0,
        num_ignored=dataset.num_ignored, ignored_endings=dataset.ignored_endings,
        ignored_columns=dataset.ignored_columns, splits=splits,
        engine=str(cache.provenance.get("engine", "none")),
        precision=describe_precision(cache),
        parity=max(cache.parity, default=None), num_probed=cache.num_probed,
        seconds=round(time.perf_counter() - start, 3), images_per_second=images_per_second,
        fingerprint=cache.fingerprint, content_sha256=cache.content_sha256,
    )  # fmt: skip


def summarise_part(job: Job, part: str, start: float) -> ExtractionSummary:
    """Return the summary of a part of an extraction, of which there is no cache yet."""
    ledger, dataset, provenance = job.ledger, job.dataset, job.provenance
    num_failed = len(ledger.failures)
    parity = () if job.engine is None else job.engine.parity
    return ExtractionSummary(
        cache=job.path, status=f"part {part}", num_images=job.num_planned,
        num_new=ledger.num_new, num_known=job.num_planned - num_failed - ledger.num_new,
        num_kept=0, num_moved=0, num_gone=0, num_failed=num_failed, num_truncated=0,
        num_ignored=dataset.num_ignored, ignored_endings=dataset.ignored_endings,
        ignored_columns=dataset.ignored_columns, splits={},
        engine=str(provenance.get("engine", "none")), precision=job.options.precision,
        parity=max(parity, default=None), num_probed=len(parity),
        seconds=round(time.perf_counter() - start, 3), images_per_second=job.images_per_second,
        fingerprint=job.recipe.fingerprint, content_sha256="",
    )  # fmt: skip


def warn_of_precision(cache: Cache, asked: str) -> None:
    """Warn where rows that are kept were made at another precision than is asked for."""
    precision = describe_precision(cache)
    if precision == asked or not any(map(len, cache.splits.values())):
        return
    measured = "of errors that were not measured"
    if cache.parity:
        measured = f"within {max(cache.parity):.1e}, measured on {count(cache.num_probed, 'image')}"
    warn_user(
        f"{cache.path.name}: the precision of its rows is {precision or UNKNOWN} ({measured}), "
        f"and --precision {asked} is for new rows only. --rebuild makes all of them again"
    )
