"""Extract: run a frozen backbone once over every image and keep the features.

Reads: images, and the cache that is there already. Writes: ``CACHE`` (module ``production``).
"""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from featcache.backbones.backbone import Backbone, build_backbone
from featcache.cache.reading import Cache
from featcache.cache.writing import partial_folder
from featcache.data.dataset import ImageDataset, scan
from featcache.errors import CacheError, ConfigError
from featcache.extraction.pipeline import hash_images, resolve_workers
from featcache.extraction.production import Production, produce
from featcache.extraction.recipe import Recipe, make_recipe
from featcache.extraction.reports import (
    ExtractionSummary,
    Projection,
    describe_dataset,
    describe_recipe,
    describe_result,
    project,
    summarise,
)
from featcache.extraction.shards import PartialCache
from featcache.extraction.update import (
    check_update,
    holds,
    is_unchanged,
    open_existing,
    refuse_other_images,
)
from featcache.files import follow_link, make_folder, remove_temporaries
from featcache.locking import writer_lock
from featcache.pixels import acceleration
from featcache.runtime import Say, resolve_device, silent


def extract(
    data: str | Path,
    cache: str | Path,
    *,
    backbone: str | Backbone,
    weights: str | Path | None = None,
    image_size: int | str = "auto",
    crop_mode: str = "squash",
    interpolation: str = "bilinear",
    normalize: str = "auto",
    mean: tuple[float, float, float] | None = None,
    std: tuple[float, float, float] | None = None,
    bit_depth: int | str = "auto",
    truncated: str = "skip",
    views: int = 1,
    augment: str | None = None,
    precision: str = "fp32",
    feature_dtype: str = "float32",
    engine: str = "auto",
    batch_size: int | str = "auto",
    workers: int | str = "auto",
    device: str = "auto",
    group_by: str | None = None,
    max_errors: int | str = "5%",
    limit: int | None = None,
    rehash: bool = False,
    rebuild: bool = False,
    say: Say = silent,
    progress: bool = False,
) -> ExtractionSummary:
    """Run a frozen backbone over every image of ``data`` and write the features to ``cache``.

    Killed at any instant, the same call goes on where the last whole shard ended. A cache that is
    there already is brought up to date: only images it does not know go through the network.

    Args:
        data: Split folders of class folders, class folders, a folder of images, a CSV or a zip.
        cache: The HDF5 file to make.
        backbone: A name (see ``build_backbone``) or a ready ``Backbone``.
        weights: See ``build_backbone``; so are ``image_size``, ``normalize``, ``mean``, ``std``.
        image_size: Side of the network's input in pixels, or ``auto``.
        crop_mode: ``squash``, ``center`` or ``border``.
        interpolation: ``bilinear`` or ``bicubic``.
        normalize: ``auto``, ``imagenet`` or ``half``.
        mean: Per channel, for pixels in [0, 1].
        std: Per channel, for pixels in [0, 1].
        bit_depth: ``auto``, 12, 14, 16 or ``minmax``, for images of more than 8 bits.
        truncated: ``skip`` counts cut-off images as failed, ``keep`` fills them in.
        views: Views of every image to train on (split ``train``, or ``all`` where there is none),
            the plain one among them; other splits get the plain view.
        augment: How the others are made: ``flip``, ``crop`` or ``xray`` (see module ``views``).
        precision: ``fp32``, ``tf32``, ``fp16`` or ``bf16``.
        feature_dtype: ``float32`` or ``float16``.
        engine: ``auto``, ``onnx``, ``folded`` or ``eager``.
        batch_size: Images a batch, or ``auto``.
        workers: Decoding threads, or ``auto``.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:1``, ``mps``.
        group_by: Regular expression on the file name; its first group is the group.
        max_errors: Failed images allowed per split and class: a count, or a share such as ``5%``.
        limit: Take only that many images, for a try.
        rehash: Recognise unchanged images by their content, not by size and time.
        rebuild: Replace a cache, or discard an unfinished one, that was made with other settings.
        say: Where lines for people go.
        progress: Show a progress bar on standard error when that is a terminal.

    Raises:
        FeatcacheError: One of its kinds, in one line; nothing is left half-written.
    """
    (summary,) = _extract(
        Path(data), [(Path(cache), backbone)], weights=weights, image_size=image_size,
        crop_mode=crop_mode, interpolation=interpolation, normalize=normalize, mean=mean, std=std,
        bit_depth=bit_depth, truncated=truncated, views=views, augment=augment,
        precision=precision, feature_dtype=feature_dtype, engine=engine, batch_size=batch_size,
        workers=workers, device=device, group_by=group_by, max_errors=max_errors,
        limit=limit, rehash=rehash, rebuild=rebuild, say=say, progress=progress,
    )  # fmt: skip
    return summary


def extract_caches(
    data: str | Path, cache: str | Path, *, backbones: Sequence[str | Backbone], **options: Any
) -> list[ExtractionSummary]:
    """Extract with several backbones at once, decoding every image once for all of them.

    Args:
        data: As for ``extract``.
        cache: A folder, which gets a cache per backbone: ``efficientnet-b0.h5``,
            ``timm-resnet18.h5``. Of a single backbone, the file, as for ``extract``.
        backbones: Names or ready ones. Each keeps its own image size and normalization.
        **options: As for ``extract``.

    Returns:
        One summary per backbone, in their order.

    Raises:
        FeatcacheError: As ``extract`` does; caches that were finished before stay.
    """
    if len(backbones) == 1:
        return [extract(data, cache, backbone=backbones[0], **options)]
    files = _name_caches(Path(cache), backbones, options.get("weights"))
    return _extract(Path(data), list(zip(files, backbones, strict=True)), **options)


def _name_caches(
    folder: Path, backbones: Sequence[str | Backbone], weights: str | Path | None
) -> list[Path]:
    """Return the cache of each of several backbones."""
    names = [b if isinstance(b, str) else b.name for b in backbones]
    files = [re.sub(r"[^A-Za-z0-9._-]+", "-", name) + ".h5" for name in names]
    if len(set(files)) != len(files) or not files:
        raise ConfigError("--backbone", expected="different backbones", found=", ".join(names))
    if weights not in {None, "random"}:
        raise ConfigError(
            "--weights", expected="random, or none with several backbones", found=weights,
            hint="Extract with one backbone at a time",
        )  # fmt: skip
    if folder.exists() and not folder.is_dir():
        raise ConfigError(
            "CACHE", expected="a folder, for the caches of several backbones", found="a file",
            where=folder,
        )  # fmt: skip
    return [folder / file for file in files]


def _extract(
    data: Path, jobs: Sequence[tuple[Path, str | Backbone]], *, precision: str = "fp32",
    engine: str = "auto", batch_size: int | str = "auto", workers: int | str = "auto",
    device: str = "auto", group_by: str | None = None, max_errors: int | str = "5%",
    limit: int | None = None, rehash: bool = False, rebuild: bool = False, say: Say = silent,
    progress: bool = False, **recipe_options: Any,
) -> list[ExtractionSummary]:  # fmt: skip
    """Make the caches of some backbones from one pass over the images."""
    start = time.perf_counter()
    allowed = parse_max_errors(max_errors)
    jobs = [(follow_link(path), backbone) for path, backbone in jobs]
    resolve_workers(workers)  # a bad number is told before a backbone is built
    for path, _ in jobs:
        _refuse_inside(path, data)
    dataset = _scan(data, group_by, limit, say)
    if not all(path.exists() for path, _ in jobs):  # beside the building of backbone and engine
        acceleration.start_for(sum(sample.image_bytes for sample in dataset.samples))
    done: dict[Path, ExtractionSummary] = {}
    works: dict[Path, tuple[Production, Cache | None]] = {}
    for path, backbone in jobs:
        recipe = _choose_recipe(dataset, backbone, say, **recipe_options)
        old = open_existing(path, recipe, rebuild=rebuild)
        if old is not None:
            check_update(old, dataset, limit)
        up_to_date = old is not None and not old.failures and holds(old, dataset, frozenset())
        if old is not None and up_to_date and not rehash:
            _remove_leftovers(path, old)
            done[path] = summarise(old, "up to date", start, num_kept=len(dataset.samples))
        else:
            works[path] = Production(path, dataset, recipe, allowed=allowed, say=say), old
    with contextlib.ExitStack() as stack:
        for path in works:
            make_folder(path.parent)
            stack.enter_context(writer_lock(partial_folder(path) / "lock", f"cache {path.name}"))
        works = {
            path: (work, _look_again(old, work, limit, rebuild=rebuild))
            for path, (work, old) in works.items()
        }
        # Undone whatever happens, and before the locks are: an engine changes torch's threads.
        stack.callback(torch.set_num_threads, torch.get_num_threads())
        for work, _ in works.values():
            stack.callback(work.abandon)
        # nothing to run: any device will do
        place = resolve_device(device if works else "cpu").torch()
        _find_known(works, place, workers, say, precision=precision, rebuild=rebuild, rehash=rehash)
        pending = [work for work, _ in works.values() if work.pending]
        for work in pending:
            work.choose_engine(place, precision=precision, batch_size=batch_size, name=engine)
        _check_threads(pending)
        if pending:
            produce(pending, workers, progress=progress)
        for path, (work, old) in works.items():
            done[path] = _finish(work, old, start, say)
    return [done[path] for path, _ in jobs]


def _find_known(
    works: Mapping[Path, tuple[Production, Cache | None]], place: torch.device,
    workers: int | str, say: Say, **how: Any,
) -> None:  # fmt: skip
    """Find what needs no forward pass; images whose content may be known are hashed once for all.

    Raises:
        CacheError: If an older cache knows none of the images, or an unfinished run is another's.
    """
    suspects = {work: work.find_known(old, place, **how) for work, old in works.values()}
    positions = sorted(set().union(*suspects.values()))
    if positions:
        say(f"Hashing {len(positions):,} images whose content may be known.")
        dataset = next(iter(suspects)).dataset
        hashes = hash_images(dataset, [dataset.samples[p] for p in positions], workers)
        for position, sha256 in zip(positions, hashes, strict=True):
            for work in suspects:
                if sha256 is not None and work.inventory.is_pending(position):
                    work.inventory.recognise(position, sha256)
    for work, old in works.values():
        if old is not None:
            refuse_other_images(old, work.inventory.compare())


def _check_threads(works: Sequence[Production]) -> None:
    """Refuse to resume caches together that were begun with other numbers of torch's threads."""
    for work in works:
        fixed = work.partial.engine
        if fixed and fixed.num_threads != torch.get_num_threads():
            raise CacheError(
                "unfinished extraction",
                expected=f"{fixed.num_threads} torch threads, with which it was begun",
                found=f"{torch.get_num_threads()}, with which another backbone's rows were made",
                where=work.path,
                hint=f"Finish it by itself: featcache extract DATA {work.path.as_posix()} "
                f"--backbone {work.recipe.backbone.name}",
            )  # fmt: skip


def _look_again(
    old: Cache | None, work: Production, limit: int | None, *, rebuild: bool
) -> Cache | None:
    """Return the cache that is there now that nobody else can write it; ``old`` was before."""
    if old.container.is_current() if old is not None else not work.path.exists():
        return old
    new = open_existing(work.path, work.recipe, rebuild=rebuild)
    if new is not None:
        check_update(new, work.dataset, limit)
    return new


def _remove_leftovers(path: Path, cache: Cache) -> None:
    """Remove what a run left that was killed between publishing its cache and its own end."""
    folder = partial_folder(path)
    if folder.exists():
        dtype = next(iter(cache.splits.values())).features.dtype
        partial = PartialCache(folder, cache.fingerprint, cache.num_features, dtype)
        # Of another recipe, or in use: somebody's work.
        with contextlib.suppress(CacheError), writer_lock(folder / "lock", f"cache {path.name}"):
            partial.open()
            remove_temporaries(path)
            partial.remove()


def _finish(work: Production, old: Cache | None, start: float, say: Say) -> ExtractionSummary:
    changes = work.inventory.compare()
    if old is not None and is_unchanged(old, work.dataset, work.failures, changes):
        remove_temporaries(work.path)
        work.partial.remove()
        return summarise(old, "up to date", start, num_kept=changes.num_kept)
    cache = work.finish()
    summary = summarise(
        cache, "extracted", start, num_new=work.intake.num_new, num_kept=changes.num_kept,
        num_moved=changes.num_moved, num_gone=changes.num_gone,
        images_per_second=work.images_per_second,
    )  # fmt: skip
    describe_result(cache, summary, say)
    return summary


def plan(data: str | Path, *, backbone: str | Backbone, **options: Any) -> Projection:
    """Say what ``extract`` would do and take, without writing anything.

    Args:
        data: As for ``extract``, and so are all options.
        backbone: A name or a ready ``Backbone``.
        **options: As for ``extract``, but those that are about writing.

    Raises:
        FeatcacheError: As ``extract`` would at its start.
    """
    return _plan(Path(data), [backbone], **options)[0]


def plan_caches(
    data: str | Path, cache: str | Path, *, backbones: Sequence[str | Backbone], **options: Any
) -> list[Projection]:
    """Say what ``extract_caches`` would do and take, without writing anything.

    Args:
        data: As for ``extract_caches``, and so are all options.
        cache: Where they would be written.
        backbones: Names or ready ones.
        **options: As for ``plan``.

    Returns:
        One projection per backbone, in their order.

    Raises:
        FeatcacheError: As ``extract_caches`` would at its start.
    """
    if len(backbones) != 1:
        _name_caches(Path(cache), backbones, options.get("weights"))
    return _plan(Path(data), backbones, **options)


def _plan(
    data: Path, backbones: Sequence[str | Backbone], *, precision: str = "fp32",
    engine: str = "auto", batch_size: int | str = "auto", workers: int | str = "auto",
    device: str = "auto", group_by: str | None = None, limit: int | None = None, say: Say = silent,
    **recipe_options: Any,
) -> list[Projection]:  # fmt: skip
    dataset = _scan(data, group_by, limit, say)
    return [
        project(
            dataset, _choose_recipe(dataset, backbone, say, **recipe_options),
            resolve_device(device).torch(), precision=precision, engine=engine,
            batch_size=batch_size,
            workers=workers,
        )
        for backbone in backbones
    ]  # fmt: skip


def _scan(data: Path, group_by: str | None, limit: int | None, say: Say) -> ImageDataset:
    dataset = scan(data, group_by=group_by, limit=limit)
    describe_dataset(dataset, say)
    return dataset


def _choose_recipe(
    dataset: ImageDataset, backbone: str | Backbone, say: Say, **options: Any
) -> Recipe:
    """Settle what makes features of the images."""
    about_backbone = ("weights", "image_size", "normalize", "mean", "std")
    if isinstance(backbone, str):
        backbone = build_backbone(
            backbone, **{key: options[key] for key in about_backbone if key in options}
        )
    recipe = make_recipe(
        backbone, dataset, **{k: v for k, v in options.items() if k not in about_backbone}
    )
    describe_recipe(recipe, say)
    return recipe


def parse_max_errors(value: int | str) -> int | float:
    """Return a count (int) or a share (float in [0, 1]) from ``12`` or ``5%``.

    Raises:
        ConfigError: If it is neither.
    """
    text = str(value).strip()
    try:
        number = float(text[:-1]) / 100 if text.endswith("%") else int(text)
    except ValueError:
        number = -1
    if number < 0 or (isinstance(number, float) and number > 1):
        raise ConfigError("--max-errors", expected="a count or a share such as 5%", found=value)
    return number


def _refuse_inside(path: Path, data: Path) -> None:
    """Refuse a cache among the images: its folder of shards would look like a class."""
    if data.is_dir() and path.resolve().is_relative_to(data.resolve()):
        raise ConfigError(
            "CACHE", expected="a file outside the folder of images", found=path, where=data,
            hint="Name one beside it",
        )  # fmt: skip
