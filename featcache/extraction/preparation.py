"""Prepare an extraction: find the images, settle what makes features of them, refuse what is odd.

Reads: images' names and some of their headers, caches that are there. Writes: nothing, or the salt
of IDs of patients.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from featcache.backbones.backbone import build_backbone
from featcache.cache.container import is_container
from featcache.cache.provenance import listing_of
from featcache.cache.reading import open_cache
from featcache.cache.remote_copies import url_of_copy
from featcache.data.dataset import ImageDataset, scan
from featcache.data.sources import Data, folders_of, listing_for
from featcache.errors import CacheError, ConfigError, printable
from featcache.extraction.identifiers import settle_identifiers
from featcache.extraction.options import ExtractionOptions, Target
from featcache.extraction.plan import Job
from featcache.extraction.recipe import Recipe, make_recipe
from featcache.extraction.reports import describe_dataset, describe_recipe
from featcache.untrusted import is_within


def scan_images(
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


def plan_job(dataset: ImageDataset, target: Target, options: ExtractionOptions) -> Job:
    """Return what one cache needs, with what is known of it.

    Raises:
        FeatcacheError: If no recipe can be settled, or the cache that is there is another one.
    """
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


def refuse_in_store(path: Path, options: ExtractionOptions) -> None:
    """Refuse what needs a folder that other hosts see: a cache in a store is made here alone."""
    if options.part is not None and (url := url_of_copy(path)):
        raise ConfigError(
            "CACHE", expected="with --part a path that all hosts see", found=url,
            hint="Merge the parts in a file there, and copy it to the store",
        )  # fmt: skip


def refuse_several_in_store(path: Path) -> None:
    """Refuse a folder of caches in a store: one cache is sent at a time."""
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
