"""Extract: run a frozen backbone once over every image and keep the features.

Three steps, each in a module of its name: ``plan`` finds what is known, ``work`` runs the rest,
``finish`` writes the cache.

Reads: images, and the cache that is there already. Writes: ``CACHE.partial/``, then ``CACHE``.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Unpack, overload

import torch

from featcache.backbones.backbone import Backbone, build_backbone
from featcache.cache.by_url import by_url
from featcache.cache.container import is_container
from featcache.cache.provenance import listing_of
from featcache.cache.reading import open_cache
from featcache.cache.remote_copies import url_of_copy
from featcache.data.dataset import ImageDataset, scan
from featcache.data.sources import Data, check_data, folders_of, listing_for
from featcache.errors import CacheError, ConfigError, printable
from featcache.extraction.engine_choice import check_threads, choose_engine
from featcache.extraction.finish import finish
from featcache.extraction.identifiers import settle_identifiers
from featcache.extraction.options import (
    ExtractionOptions,
    ExtractKeywords,
    Target,
    name_caches,
)
from featcache.extraction.plan import Job, find_known
from featcache.extraction.projection import Projection, project
from featcache.extraction.recipe import Recipe, make_recipe
from featcache.extraction.reports import (
    ExtractionSummary,
    describe_dataset,
    describe_recipe,
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
from featcache.untrusted import MAX_PIXELS, is_within

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
    _refuse_in_store(place, options)
    if isinstance(backbone, str | Backbone) and isinstance(image_size, int | str):
        return _extract(data, [Target(place, backbone, image_size)], options)[0]
    _refuse_several_in_store(place)
    targets = name_caches(place, backbone, options)
    return dict(zip(targets, _extract(data, [*targets.values()], options), strict=True))


def _extract(
    data: Data, targets: Sequence[Target], options: ExtractionOptions
) -> list[ExtractionSummary]:
    """Make the cache of each target, all from one pass over the images."""
    start = time.perf_counter()
    targets = [target._replace(path=follow_link(target.path)) for target in targets]
    dataset, options = _scan(check_data(data), [t.path for t in targets], options, writes=True)
    if not all(
        target.path.exists() for target in targets
    ):  # beside the building of backbone and engine
        acceleration.start_for(sum(dataset.samples.image_bytes))
    done: dict[Path, ExtractionSummary] = {}
    jobs: list[Job] = []
    for target in targets:
        path, job = target.path, _plan_job(dataset, target, options)
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
    _refuse_several_in_store(place)
    targets = name_caches(place, backbone, chosen)
    return dict(zip(targets, _plan(data, [*targets.values()], chosen, price), strict=True))


def _plan(
    data: Data, targets: Sequence[Target], options: ExtractionOptions, price: float | None
) -> list[Projection]:
    if price is not None and not 0 <= price < math.inf:
        raise ConfigError("--price", expected="a number that is not negative", found=price)
    targets = [target._replace(path=follow_link(target.path)) for target in targets]
    dataset, options = _scan(check_data(data), [t.path for t in targets], options, writes=False)
    jobs = [_plan_job(dataset, target, options) for target in targets]
    device = resolve_device(resolve_devices(options.device, options.processes)[0]).torch()
    find_known(jobs, device)
    for job in jobs:
        if job.old is not None:
            warn_of_precision(job.old, options.precision)
    return [project(job, device, price) for job in jobs]


def _scan(
    data: Data, caches: Sequence[Path], options: ExtractionOptions, *, writes: bool
) -> tuple[ImageDataset, ExtractionOptions]:
    """Find the images; return the options with those that the caches that are there remember."""
    for path in caches:
        for folder in folders_of(data):
            _refuse_inside(path, folder)
    if not options.rebuild:
        for path in caches:
            options = _remember(path, data, options)
    dataset = scan(
        data, group_by=options.group_by, group_by_path=options.group_by_path, limit=options.limit,
        progress=options.progress, **options.listing.as_json(),
    )  # fmt: skip
    describe_dataset(dataset, options.say, by_path=options.group_by_path is not None)
    if options.companions == "keep" and dataset.num_grouped is None:
        options.say("groups: images and their companions; --group-by would name the patients")
    return settle_identifiers(dataset, caches, options, writes=writes), options


def _remember(path: Path, data: Data, options: ExtractionOptions) -> ExtractionOptions:
    """Return the options with those of the listing that a cache was made with."""
    if not path.is_file() or not is_container(path):
        return options
    try:
        stored = listing_for(data, listing_of(open_cache(path, verify=False)))
    except CacheError:
        return options  # said by whoever opens it to go on with it
    listing = options.listing.over(stored)
    if listing != options.listing:
        known = " ".join(f"{name}={value}" for name, value in stored.as_json().items())
        options.say(f"Listing as {path.name} remembers it: {printable(known)}")
    return replace(options, **listing.as_json())


def _plan_job(dataset: ImageDataset, target: Target, options: ExtractionOptions) -> Job:
    return Job(target.path, dataset, _choose_recipe(dataset, target, options), options)


def _choose_recipe(
    dataset: ImageDataset, target: Target, options: ExtractionOptions
) -> Recipe:  # fmt: skip
    """Settle what makes features of the images."""
    backbone = target.backbone
    if isinstance(backbone, str):
        backbone = build_backbone(
            backbone, weights=options.weights, image_size=target.image_size,
            normalize=options.normalize, mean=options.mean, std=options.std,
        )  # fmt: skip
    recipe = make_recipe(
        backbone, dataset, transform=options.transform, crop_mode=options.crop_mode,
        interpolation=options.interpolation,
        bit_depth=options.bit_depth, truncated=options.truncated,
        max_pixels=options.max_pixels, window=options.window, frame=options.frame,
        feature_dtype=options.feature_dtype, views=options.views, augment=options.augment,
    )  # fmt: skip
    describe_recipe(recipe, options.say)
    return recipe


def _refuse_in_store(path: Path, options: ExtractionOptions) -> None:
    """Refuse what needs a folder that other hosts see: a cache in a store is made here alone."""
    if options.part is not None and (url := url_of_copy(path)):
        raise ConfigError(
            "CACHE", expected="with --part a path that all hosts see", found=url,
            hint="Merge the parts in a file there, and copy it to the store",
        )  # fmt: skip


def _refuse_several_in_store(path: Path) -> None:
    if url := url_of_copy(path):
        raise ConfigError(
            "CACHE", expected="of several backbones or sizes a folder here", found=url,
            hint="Extract each by its own command, or copy the folder to the store",
        )  # fmt: skip


def _refuse_inside(path: Path, data: Path) -> None:
    """Refuse a cache among the images: its folder of shards would look like a class."""
    if is_within(path, data):
        raise ConfigError(
            "CACHE", expected="a file outside the folder of images", found=path, where=data,
            hint="Name one beside it",
        )  # fmt: skip
