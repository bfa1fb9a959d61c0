"""Refuse caches and runs of earlier versions whose images were read wrongly.

Reads: caches, images. Writes: nothing.
"""

from __future__ import annotations

import hashlib
import random
from pathlib import Path

from featcache.cache.reading import Cache
from featcache.data.dataset import ImageDataset, Sample
from featcache.errors import CacheError, DataError
from featcache.extraction.recipe import Recipe, depths_by_kind, is_dark
from featcache.pixels.inspection import misread_reason

_NUM_LOOKED_AT = 64


def refuse_misread(cache: Cache, dataset: ImageDataset) -> None:
    """Refuse a cache with a row of an image that earlier versions read wrongly.

    This version refuses such images, so that a row of one can only be a wrong one. A seeded sample
    of 64 TIFF and 64 JPEG files is looked at, as one program usually wrote all of a data set;
    ``verify --data --samples all`` looks at all.

    Args:
        cache: The cache.
        dataset: The images at hand.

    Raises:
        CacheError: If there is one.
    """
    rows = {
        sha256.tobytes(): path
        for split in cache.splits.values()
        for path, sha256 in zip(split.paths, split.image_sha256, strict=True)
    }
    sizes = {size for split in cache.splits.values() for size in split.image_bytes.tolist()}
    for endings in ((".tif", ".tiff"), (".jpg", ".jpeg", ".jpe", ".jfif", ".pjpeg")):
        for sample in _choose(dataset, endings, sizes):
            try:
                data = dataset.read(sample)
            except DataError:
                continue
            reason = misread_reason(data)
            if reason is not None and hashlib.sha256(data).digest() in rows:
                raise CacheError(
                    f"row of {sample.path}", expected="pixels that were read right",
                    found=reason, where=cache.path,
                    hint="An earlier version read it wrongly. Save such images as others, extract "
                    "them again with --rebuild, and train again",
                )  # fmt: skip


def _choose(dataset: ImageDataset, endings: tuple[str, ...], sizes: set[int]) -> list[Sample]:
    suspects = [
        sample for sample in dataset.samples
        if sample.image_bytes in sizes and sample.path.lower().endswith(endings)
    ]  # fmt: skip
    return random.Random(0).sample(suspects, min(_NUM_LOOKED_AT, len(suspects)))


def refuse_dark_colour(recipe: Recipe, dataset: ImageDataset, where: Path) -> None:
    """Refuse 16-bit colour without high values where nobody was asked how many bits it has.

    Earlier versions of ``extract`` asked of greyscale only, and colour of 12 bits came out black.

    Args:
        recipe: Of a cache or run that is there already.
        dataset: Images to be read by it; a seeded sample of 32 is looked at.
        where: The cache or run.

    Raises:
        DataError: If colour of that sample, and there is some, fits into 14 bits.
    """
    if recipe.rules.bit_depth != 16 or recipe.has_dark_colour:
        return
    maxima = depths_by_kind(dataset, {"colour"}, recipe.rules.max_pixels)["colour"]
    if is_dark(maxima):
        raise DataError(
            "16-bit colour", expected="values up to 65535, as --bit-depth 16 takes them",
            found=f"none above {max(maxima)}: nearly black", where=where,
            hint="Extract again with --rebuild and --bit-depth 12, 14, minmax, or 16 if they are "
            "meant so, and train again",
        )  # fmt: skip
