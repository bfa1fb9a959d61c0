"""What an extraction says: what it found, what it will take, what it did."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from featcache.backbones.engine import Engine, Images, build_engine
from featcache.cache.provenance import UNKNOWN, describe_precision, training_data_note
from featcache.cache.reading import Cache
from featcache.data.dataset import ImageDataset
from featcache.data.groups import say_matches
from featcache.errors import printable, warn_user
from featcache.extraction.engine_choice import facts_as_before
from featcache.extraction.pipeline import stream_views
from featcache.extraction.plan import Job
from featcache.extraction.recipe import Recipe, decode_probes, sample_depths
from featcache.files import result_as_dict
from featcache.formatting import brief_repr, count, list_counts
from featcache.runtime import Say

_NUM_DECODED = 64
_MAX_WORKERS, _LEAST_WORK_SECONDS = 256, 60.0
_ROW_OVERHEAD_BYTES = 160  # path, hash, size, time, target


@dataclass(frozen=True)
class WorkersProjection:
    """What an extraction is expected to take on so many machines like this one.

    Attributes:
        num_workers: Machines, or GPUs with their share of one.
        seconds: Expected time: each builds its engine, then takes its share of the images.
        worker_hours: Expected time of all of them together.
        cost: At the price of an hour of one; None where none was given.
    """

    __module__ = "featcache"
    __repr__ = brief_repr

    num_workers: int
    seconds: float
    worker_hours: float
    cost: float | None


@dataclass(frozen=True)
class Projection:
    """What an extraction is expected to take on this machine.

    Attributes:
        splits: Per split, images per class.
        classes: Class names.
        num_images: All of them.
        num_known: Those that need not be run: the cache that is there, or an unfinished run, has
            features of their content.
        num_groups: Different groups, None without groups.
        num_ignored: Reason -> number of files that are not taken.
        ignored_endings: Ending -> number of files that are not taken for it.
        ignored_columns: Headers of a CSV that are not used.
        identity: What the cache's identity will be.
        engine: The engine chosen, and why; "none" where no image has to be run.
        decode_seconds: Expected time of decoding alone, an image, all workers together.
        forward_seconds: Expected time of the network alone, an image.
        deepest: Largest value in a sample of images of more than 8 bits, None if there are none.
        num_decoded: Images decoded for this projection, of those to be run.
        failures: (path, reason) among them.
        images_per_second: Expected rate; None where no image has to be run.
        seconds: Expected time for the images to be run.
        cache_bytes: Size of the cache.
        working_bytes: Disk needed while working: shards and cache together.
        read_bytes: Bytes of the images to be run, each of which is read once.
        start_seconds: Expected time to build and check an engine, which every worker does.
        workers: What it would take on 1, 2, 4 ... machines like this one, as long as each has a
            minute of work.
    """

    __module__ = "featcache"
    __repr__ = brief_repr

    splits: dict[str, dict[str, int]]
    classes: tuple[str, ...]
    num_images: int
    num_known: int
    num_groups: int | None
    num_ignored: dict[str, int]
    ignored_endings: dict[str, int]
    ignored_columns: tuple[str, ...]
    identity: dict[str, Any]
    engine: str
    decode_seconds: float
    forward_seconds: float
    deepest: int | None
    num_decoded: int
    failures: tuple[tuple[str, str], ...]
    images_per_second: float | None
    seconds: float
    cache_bytes: int
    working_bytes: int
    read_bytes: int
    start_seconds: float
    workers: tuple[WorkersProjection, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return the projection as JSON values."""
        return result_as_dict(self)


def project(job: Job, device: torch.device, price: float | None = None) -> Projection:
    """Decode a seeded sample of the images to be run, run one batch, and scale up.

    Args:
        job: A job whose known images were found.
        device: Where it would run.
        price: Of an hour of one machine.

    Raises:
        FeatcacheError: As an extraction with these options would at its start.
    """
    dataset, recipe = job.dataset, job.recipe
    positions = [p for p in range(len(dataset.samples)) if job.ledger.wants(p)]
    num_wanted = len(positions)
    num_wanted_views = sum(job.num_views[dataset.samples.split_of(p)] for p in positions)
    projection = _project_sizes(job, num_wanted, num_wanted_views)
    if not positions:
        return projection
    some = random.Random(0).sample(positions, min(_NUM_DECODED, num_wanted))
    chosen = [dataset.samples[position] for position in some]
    start = time.perf_counter()
    engine = _build_engine(job, device, decode_probes(dataset, chosen, recipe.rules))
    start_seconds = time.perf_counter() - start
    start = time.perf_counter()
    decoded = stream_views(dataset, chosen, [recipe], 1, workers=job.options.workers)
    outcomes = [outcome for part, _ in decoded for outcome in part]
    decode_seconds = (time.perf_counter() - start) / len(outcomes)
    forward_seconds = _time_vector(engine, recipe.rules.image_size) * num_wanted_views / num_wanted
    # On a CPU both share the cores; a GPU computes while the CPU decodes.
    both = decode_seconds, forward_seconds
    per_image = sum(both) if device.type == "cpu" else max(both)
    return replace(
        projection,
        engine=f"{engine.name} ({engine.reason})",
        decode_seconds=round(decode_seconds, 5),
        forward_seconds=round(forward_seconds, 5),
        deepest=max(sample_depths(dataset), default=None),
        num_decoded=len(outcomes),
        failures=tuple((o.sample.path, o.reason) for o in outcomes if o.reason is not None),
        images_per_second=round(1 / per_image, 2),
        seconds=round(num_wanted * per_image, 1),
        read_bytes=sum(dataset.samples.image_bytes[position] for position in positions),
        start_seconds=round(start_seconds, 3),
        workers=tuple(project_workers(num_wanted * per_image, start_seconds, price)),
    )


def project_workers(
    seconds: float, start_seconds: float, price: float | None
) -> Iterator[WorkersProjection]:
    """Yield what work of one machine takes on 1, 2, 4 ... of them.

    Args:
        seconds: Of one machine, without its start.
        start_seconds: Of each machine before it can work.
        price: Of an hour of one; None is not known.
    """
    number = 1
    while number == 1 or (number <= _MAX_WORKERS and seconds / number >= _LEAST_WORK_SECONDS):
        each = start_seconds + seconds / number
        hours = number * each / 3600
        cost = None if price is None else round(hours * price, 2)
        yield WorkersProjection(number, round(each, 1), round(hours, 4), cost)
        number *= 2


def _project_sizes(job: Job, num_wanted: int, num_wanted_views: int) -> Projection:
    """Return what is known before an image is decoded: counts and sizes, and no time."""
    dataset, recipe = job.dataset, job.recipe
    num_images = len(dataset.samples)
    num_views = sum(map(job.num_views.__getitem__, dataset.samples.splits))
    vector_bytes = recipe.backbone.num_features * job.dtype.itemsize
    cache_bytes = num_views * vector_bytes + num_images * _ROW_OVERHEAD_BYTES + 4096
    groups = {*dataset.samples.groups}
    return Projection(
        splits=dataset.count(),
        classes=dataset.classes,
        num_images=num_images,
        num_known=num_images - num_wanted,
        num_groups=None if None in groups else len(groups),
        num_ignored=dict(dataset.num_ignored),
        ignored_endings=dict(dataset.ignored_endings),
        ignored_columns=dataset.ignored_columns,
        identity=recipe.identity,
        engine="none",
        decode_seconds=0.0,
        forward_seconds=0.0,
        deepest=None,
        num_decoded=0,
        failures=(),
        images_per_second=None,
        seconds=0.0,
        cache_bytes=cache_bytes,
        working_bytes=cache_bytes + num_wanted_views * vector_bytes,
        read_bytes=0,
        start_seconds=0.0,
        workers=(),
    )


def _build_engine(job: Job, device: torch.device, probes: Images) -> Engine:
    """Return the engine that the extraction would choose."""
    options, as_before = job.options, facts_as_before(job, device)
    return build_engine(
        job.recipe.backbone, device, probes, precision=options.precision,
        batch_size=as_before.batch_size if as_before else options.batch_size,
        name=as_before.engine if as_before else options.engine,
        num_images=len(job.dataset.samples),
    )  # fmt: skip


def _time_vector(engine: Engine, side: int) -> float:
    """Return the seconds of a forward pass, for each image of its batches."""
    images = np.zeros((engine.batch_size * engine.concurrency, side, side, 3), np.uint8)
    engine.run(images)  # the first pass allocates
    start = time.perf_counter()
    engine.run(images)
    return (time.perf_counter() - start) / len(images)


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
        num_probed: Images that this is the largest error of.
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
