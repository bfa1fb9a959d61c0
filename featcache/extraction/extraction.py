"""Extract: run a frozen backbone once over every image and keep the features.

Four steps, each in a module of its name: ``preparation`` finds the images, ``plan`` what is known
of them, ``work`` runs the rest, ``finish`` writes the cache.

Reads: images, and the cache that is there already. Writes: ``CACHE.partial/``, then ``CACHE``.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Unpack, overload

import torch

from featcache.backbones.backbone import Backbone
from featcache.cache.by_url import by_url
from featcache.cache.reading import open_cache
from featcache.data.sources import Data, check_data
from featcache.errors import ConfigError
from featcache.extraction.engine_choice import check_threads, choose_engine
from featcache.extraction.finish import finish
from featcache.extraction.options import (
    ExtractionOptions,
    ExtractKeywords,
    Target,
    name_caches,
)
from featcache.extraction.plan import Job, find_known
from featcache.extraction.preparation import (
    plan_job,
    refuse_in_store,
    refuse_several_in_store,
    scan_images,
)
from featcache.extraction.projection import Projection, project
from featcache.extraction.reports import (
    ExtractionSummary,
    summarise,
    warn_of_precision,
)
from featcache.extraction.work import work
from featcache.extraction.workers.local import resolve_devices, work_on
from featcache.extraction.workers.parts import finish_part, part_held, take_part
from featcache.extraction.workers.plans import Part
from featcache.extraction.workers.ray_actors import check_ray, work_with_ray
from featcache.files import follow_link, local_path
from featcache.pixels import acceleration
from featcache.runtime import Say, log_line, resolve_device
from featcache.untrusted import MAX_PIXELS

_Backbones = list[str | Backbone] | tuple[str | Backbone, ...]
_Sizes = list[int] | tuple[int, ...]


@overload
def extract(
    data: Data, cache: str | Path, *, backbone: str | Backbone, image_size: int | str = ...,
    **options: Unpack[ExtractKeywords],
) -> ExtractionSummary: ...  # fmt: skip


@overload
def extract(
    data: Data, cache: str | Path, *, backbone: _Backbones,
    image_size: int | str | _Sizes = ..., **options: Unpack[ExtractKeywords],
) -> dict[str, ExtractionSummary]: ...  # fmt: skip


@overload
def extract(
    data: Data, cache: str | Path, *, backbone: str | Backbone, image_size: _Sizes,
    **options: Unpack[ExtractKeywords],
) -> dict[str, ExtractionSummary]: ...  # fmt: skip


@by_url(makes="cache")
def extract(
    data: Data,
    cache: str | Path,
    *,
    backbone: str | Backbone | _Backbones,
    weights: str | Path | None = None,
    image_size: int | str | _Sizes = "auto",
    transform: str | None = None,
    crop_mode: str | None = None,
    interpolation: str | None = None,
    normalize: str = "auto",
    mean: tuple[float, float, float] | None = None,
    std: tuple[float, float, float] | None = None,
    bit_depth: int | str = "auto",
    truncated: str = "skip",
    max_pixels: int = MAX_PIXELS,
    window: str | None = None,
    frame: int | None = None,
    views: int = 1,
    augment: str | None = None,
    precision: str = "fp32",
    feature_dtype: str = "float32",
    engine: str = "auto",
    batch_size: int | str = "auto",
    workers: int | str = "auto",
    device: str = "auto",
    processes: int = 1,
    ray: str | None = None,
    part: str | None = None,
    group_by: str | None = None,
    group_by_path: str | None = None,
    group_salt: str | Path | None = None,
    patient_ids: str | None = None,
    path_names: str | None = None,
    max_errors: int | str = "5%",
    limit: int | None = None,
    include: str | Iterable[str] = (),
    exclude: str | Iterable[str] = (),
    companions: str | None = None,
    no_classes: bool = False,
    columns: Mapping[str, str] | None = None,
    ignore_columns: str | Iterable[str] = (),
    target_columns: str | Iterable[str] = (),
    target_separator: str | None = None,
    uncertain: str | None = None,
    blank: str | None = None,
    split_list: Mapping[str, str | Path] | None = None,
    rehash: bool = False,
    rebuild: bool = False,
    say: Say = log_line,
    progress: bool | str = False,
) -> ExtractionSummary | dict[str, ExtractionSummary]:
    """Run a frozen backbone over every image of ``data`` and write the features to ``cache``.

    Killed at any instant, the same call goes on where the last whole shard ended. A cache that is
    there already is brought up to date: only images it does not know go through the network.

    Args:
        data: Split folders of class folders, class folders, a folder of images, a CSV, a zip, a tar
            or Parquet file, a folder or a glob (``shards/*.tar``) of these two, or a list of them.
        cache: The HDF5 file to make; of several backbones, a folder for a file of each, such as
            ``efficientnet-b0.h5`` and ``timm-resnet18.h5``, and of several sizes likewise, such as
            ``efficientnet-b0-224.h5`` and ``efficientnet-b0-448.h5``.
        backbone: A name (see ``build_backbone``) or a ready ``Backbone``; or a list of them, for
            which every image is decoded only once. Each keeps its own image size and normalization.
        weights: See ``build_backbone``; so are ``image_size``, ``normalize``, ``mean``, ``std``.
        image_size: Side of the network's input in pixels, or ``auto``; or a list of sides, for
            which every image is decoded only once.
        transform: ``library`` resizes and crops as torchvision or timm documents it for the
            backbone's pretrained weights; ``crop_mode`` and ``interpolation`` are then left out.
        crop_mode: ``squash`` (the default), ``center`` or ``border``.
        interpolation: ``bilinear`` (the default) or ``bicubic``.
        normalize: ``auto``, ``imagenet`` or ``half``.
        mean: Per channel, for pixels in [0, 1].
        std: Per channel, for pixels in [0, 1].
        bit_depth: ``auto``, 12, 14, 16 or ``minmax``, for images of more than 8 bits.
        truncated: ``skip`` counts cut-off images as failed, ``keep`` fills them in.
        max_pixels: Images of more pixels count as failed. Not part of the cache's identity.
        window: Of DICOM files: ``voi`` (the default: VOI LUT, else first window, else the stored
            range), ``first`` window, ``none``, or ``CENTER,WIDTH``. CT and MR need one.
        frame: Of DICOM files of several frames, the one to take, from 1.
        views: Views of every image to train on (split ``train``, or ``all`` where there is none),
            the plain one among them; other splits get the plain view.
        augment: How the others are made: ``flip``, ``crop`` or ``xray`` (see module ``views``).
        precision: ``fp32``, ``tf32``, ``fp16`` or ``bf16``, of new rows: those of the cache that
            is there are kept, with a warning where theirs is another.
        feature_dtype: ``float32`` or ``float16``.
        engine: ``auto``, ``onnx``, ``folded`` or ``eager``.
        batch_size: Images a batch, or ``auto``.
        workers: Decoding threads of each process, or ``auto``.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:1``, ``mps``; or several, such as
            ``cuda:0,cuda:1``, or ``all`` GPUs, with processes of their own.
        processes: How many on each device, CPU cores being shared out among them. The features do
            not depend on it.
        ray: Work on a Ray cluster, by its head node's ``HOST:PORT`` or ``auto``, in place of this
            machine alone: with so many ``processes`` on each GPU, or on each node for the CPU.
            ``local`` starts a Ray here and stops it. All nodes have to see the data.
        part: ``2/4`` makes the second of four parts, without writing the cache, on any host that
            sees ``data`` and ``cache``; the call without it merges them and does what is missing.
        group_by: Regular expression on the file name; its first group is the group.
        group_by_path: Instead, one on the path below the class: see ``scan``.
        group_salt: File of the salt that IDs of patients in DICOM headers are hashed with, which
            make the groups where ``group_by`` makes none. It is made if it is not there. Default:
            ``CACHE.salt``.
        patient_ids: An ID on more than a fifth of the images (and 20) is a question: ``keep`` takes
            it as a patient, ``ignore`` as no ID.
        path_names: ``hash`` replaces names of files and folders below split and class in all that
            is written, by the same salt; ``keep``, the default, warns of DICOM's IDs in them.
        max_errors: Failed images allowed per split and class: a count, or a share such as ``5%``.
        limit: Take only that many images, for a try.
        include: See ``scan``; so are ``exclude``, ``companions``, ``no_classes``, ``columns``,
            ``ignore_columns`` and those of labels and split lists. The cache remembers them: an
            update need not repeat them.
        exclude: Globs on the path below ``data`` of files that are left out.
        companions: ``keep`` takes masks and the like as images.
        no_classes: Folders are no classes.
        columns: Column -> its header in a CSV or Parquet file, or what is beside images in a tar.
        ignore_columns: Headers of a CSV or Parquet file that are not used.
        target_columns: Headers of a CSV that are a label each, of 1, 0, -1 and empty cells.
        target_separator: Instead, what stands between the labels in the cells of ``target``.
        uncertain: What -1 means: ``unknown`` (so does None), ``yes`` or ``no``.
        blank: What an empty cell of a label means: ``unknown`` or ``no``; None asks.
        split_list: Split -> file with a path or file name of the CSV a line.
        rehash: Recognise unchanged images by their content, not by size and time.
        rebuild: Replace a cache, or discard an unfinished one, that was made with other settings.
        say: Where lines for people go.
        progress: Show how far it is on standard error: a bar on a terminal and in a notebook,
            elsewhere a line a minute. ``json`` writes a JSON object a minute, and one at the end.

    Returns:
        What was done; of a list of backbones, a dict of that by name, of a list of sizes by name
        and size (``efficientnet-b0-224``).

    Raises:
        FeatcacheError: One of its kinds, in one line; nothing is left half-written. Caches that
            were finished before stay.
    """
    options = ExtractionOptions(
        weights=weights, image_size=image_size, transform=transform, crop_mode=crop_mode,
        interpolation=interpolation, normalize=normalize, mean=mean, std=std, bit_depth=bit_depth,
        truncated=truncated, max_pixels=max_pixels, window=window, frame=frame, views=views,
        augment=augment,
        precision=precision, feature_dtype=feature_dtype, engine=engine, batch_size=batch_size,
        workers=workers, device=device, processes=processes, ray=ray, part=part,
        group_by=group_by, group_by_path=group_by_path, group_salt=group_salt,
        patient_ids=patient_ids, path_names=path_names, max_errors=max_errors, limit=limit,
        include=include, exclude=exclude,
        companions=companions, no_classes=no_classes, columns=columns,
        ignore_columns=ignore_columns, target_columns=target_columns,
        target_separator=target_separator, uncertain=uncertain, blank=blank, split_list=split_list,
        rehash=rehash, rebuild=rebuild, say=say, progress=progress,
    )  # fmt: skip
    place = local_path(cache, "CACHE")
    refuse_in_store(place, options)
    if isinstance(backbone, str | Backbone) and isinstance(image_size, int | str):
        return _extract(data, [Target(place, backbone, image_size)], options)[0]
    refuse_several_in_store(place)
    targets = name_caches(place, backbone, options)
    return dict(zip(targets, _extract(data, [*targets.values()], options), strict=True))


def _extract(
    data: Data, targets: Sequence[Target], options: ExtractionOptions
) -> list[ExtractionSummary]:
    """Make the cache of each target, all from one pass over the images."""
    start = time.perf_counter()
    targets = [target._replace(path=follow_link(target.path)) for target in targets]
    paths = [target.path for target in targets]
    dataset, options = scan_images(check_data(data), paths, options, writes=True)
    if not all(path.exists() for path in paths):  # beside the building of backbone and engine
        acceleration.start_for(sum(dataset.samples.image_bytes))
    done: dict[Path, ExtractionSummary] = {}
    jobs: list[Job] = []
    for target in targets:
        path, job = target.path, plan_job(dataset, target, options)
        if job.old is not None and job.is_up_to_date and not options.rehash:
            if options.part is None:
                job.remove_leftovers()
            done[path] = summarise(
                job.old, "up to date", start, dataset, num_kept=len(dataset.samples)
            )
        else:
            jobs.append(job)
    if jobs:
        _make_caches(jobs, options, start, done)
    for path, summary in done.items():
        if not summary.num_new and summary.content_sha256:  # else a part, of no cache yet
            warn_of_precision(open_cache(path, verify=False), options.precision)
    return [done[target.path] for target in targets]


def _make_caches(
    jobs: Sequence[Job], options: ExtractionOptions, start: float,
    done: dict[Path, ExtractionSummary],
) -> None:  # fmt: skip
    """Plan, work and finish, while nobody else can write the caches."""
    part = None if options.part is None else Part.parse(options.part)
    if options.ray is not None:
        check_ray(options.ray)
    with contextlib.ExitStack() as stack:
        for job in jobs:
            stack.enter_context(job.locked() if part is None else part_held(job, part))
        # Undone whatever happens, and before the locks are: an engine changes torch's threads.
        stack.callback(torch.set_num_threads, torch.get_num_threads())
        devices = resolve_devices(options.device, options.processes)
        device = resolve_device(devices[0]).torch()
        positions = find_known(jobs, device)
        if part is None:
            unfinished = [job for job in jobs if job.ledger.num_wanted]
            for job in unfinished:
                choose_engine(job, device)
        else:
            unfinished = take_part(jobs, part, positions, device)
            positions = [p for p in positions if any(job.ledger.wants(p) for job in unfinished)]
        check_threads(unfinished)
        if unfinished and options.ray is not None:
            work_with_ray(unfinished, positions)
        elif unfinished and len(devices) > 1:
            work_on(devices, unfinished, positions)
        elif unfinished:
            work(unfinished, positions)
        del positions  # 8 MB of a million
        for job in jobs:
            job.release_engine()  # 45 MB in ONNX Runtime, where the peak is to come
            made = finish(job, start) if part is None else finish_part(job, part, start)
            done[job.path] = made


@overload
def plan(
    data: Data, cache: str | Path, *, backbone: str | Backbone | _Backbones,
    image_size: _Sizes, price: float | None = ..., **options: Any,
) -> dict[str, Projection]: ...  # fmt: skip


@overload
def plan(
    data: Data,
    cache: str | Path,
    *,
    backbone: str | Backbone,
    price: float | None = ...,
    **options: Any,
) -> Projection: ...


@overload
def plan(
    data: Data,
    cache: str | Path,
    *,
    backbone: _Backbones,
    price: float | None = ...,
    **options: Any,
) -> dict[str, Projection]: ...


@by_url(makes="cache", sends=False)
def plan(
    data: Data,
    cache: str | Path,
    *,
    backbone: str | Backbone | _Backbones,
    price: float | None = None,
    **options: Any,
) -> Projection | dict[str, Projection]:
    """Say what ``extract`` would do and take, without writing anything.

    What the cache that is there and an unfinished run hold need not be done again: images whose
    content may be known are hashed, as ``extract`` would.

    Args:
        data: As for ``extract``, and so are all options.
        cache: The file, or the folder of several, that would be written.
        backbone: A name or a ready ``Backbone``, or a list of them.
        price: Of an hour of one machine like this one, in any currency: gives the costs.
        **options: As for ``extract``.

    Returns:
        What is expected; of a list of backbones or sizes, a dict of that by name.

    Raises:
        FeatcacheError: As ``extract`` would at its start.
    """
    chosen, place = ExtractionOptions(**options), local_path(cache, "CACHE")
    if isinstance(backbone, str | Backbone) and isinstance(chosen.image_size, int | str):
        return _plan(data, [Target(place, backbone, chosen.image_size)], chosen, price)[0]
    refuse_several_in_store(place)
    targets = name_caches(place, backbone, chosen)
    return dict(zip(targets, _plan(data, [*targets.values()], chosen, price), strict=True))


def _plan(
    data: Data, targets: Sequence[Target], options: ExtractionOptions, price: float | None
) -> list[Projection]:
    if price is not None and not 0 <= price < math.inf:
        raise ConfigError("--price", expected="a number that is not negative", found=price)
    targets = [target._replace(path=follow_link(target.path)) for target in targets]
    paths = [target.path for target in targets]
    dataset, options = scan_images(check_data(data), paths, options, writes=False)
    jobs = [plan_job(dataset, target, options) for target in targets]
    device = resolve_device(resolve_devices(options.device, options.processes)[0]).torch()
    find_known(jobs, device)
    for job in jobs:
        if job.old is not None:
            warn_of_precision(job.old, options.precision)
    return [project(job, device, price) for job in jobs]
