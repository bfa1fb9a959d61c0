"""What an extraction is expected to take, measured on a few of its images: ``--dry-run``.

Reads: images. Writes: nothing.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from featcache.backbones.engine import Engine, Images, build_engine
from featcache.extraction.engine_choice import AS_BEFORE, facts_as_before
from featcache.extraction.plan import Job
from featcache.extraction.recipe import decode_probes, sample_depths
from featcache.extraction.view_stream import stream_views
from featcache.files import result_as_dict
from featcache.formatting import brief_repr

_NUM_DECODED = 64
_MAX_WORKERS, _LEAST_WORK_SECONDS = 256, 60.0
_ROW_OVERHEAD_BYTES = 160  # path, hash, size, time, target


@dataclass(frozen=True)
class WorkersProjection:
    """What an extraction is expected to take on so many machines like this one.

    Attributes:
        num_workers: Machines, or GPUs each with its share of a machine.
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
    engine = build_engine(
        job.recipe.backbone, device, probes, precision=options.precision,
        batch_size=as_before.batch_size if as_before else options.batch_size,
        name=as_before.engine if as_before else options.engine,
        num_images=len(job.dataset.samples),
    )  # fmt: skip
    return replace(engine, reason=AS_BEFORE) if as_before else engine


def _time_vector(engine: Engine, side: int) -> float:
    """Return the seconds of a forward pass, for each image of its batches."""
    images = np.zeros((engine.batch_size * engine.concurrency, side, side, 3), np.uint8)
    engine.run(images)  # the first pass allocates
    start = time.perf_counter()
    engine.run(images)
    return (time.perf_counter() - start) / len(images)
