"""Small JPEGs of the images of rows, for a page that shows them.

Reads: images. Writes: nothing.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from featcache.cache.reading import Cache
from featcache.cache.side_by_side import caches_of
from featcache.data.dataset import ImageDataset, Sample
from featcache.errors import DataError
from featcache.evaluation.auditing.images import SmallPictures
from featcache.extraction.comparison import find_images
from featcache.extraction.view_stream import stream_views
from featcache.pixels.images import PixelRules

SIDE = 192
"""Of the pictures, in pixels: the long side, the short one has bars."""
_QUALITY = 75
_CHUNK = 32

Key = tuple[str, str]
"""Split and path of a row."""


@dataclass(frozen=True)
class FoundImages:
    """The images of a cache's rows.

    Attributes:
        cache: The cache; of several side by side the first.
        dataset: The data set.
        samples: Of it, by split and path.
        rows: Number of the row in its split, by split and path.
    """

    cache: Cache
    dataset: ImageDataset
    samples: dict[Key, Sample]
    rows: dict[Key, int]

    @classmethod
    def of(cls, cache: Cache, data: str | Path) -> FoundImages:
        """Find the images of a cache.

        Args:
            cache: The cache.
            data: The images it was made of.

        Raises:
            CacheError: If ``data`` has none of the cache's images.
            DataError: If ``data`` is no data set.
        """
        first = caches_of(cache)[0]
        return cls(first, *find_images(first, data))

    def is_same(self, key: Key, sha256: bytes) -> bool:
        """Return whether an image is the one that the cache was made of, where that is known."""
        recorded = self.cache.splits[key[0]].image_sha256[self.rows[key]].tobytes()
        return sha256 == recorded or not any(recorded)


def read_pictures(images: FoundImages, wanted: Sequence[Key]) -> dict[Key, str]:
    """Return a ``data:`` URL of the image of each row; none where it is gone, changed or damaged.

    Args:
        images: Where they are.
        wanted: Of which rows.
    """
    first, dataset, samples = images.cache, images.dataset, images.samples
    chosen = [samples[key] for key in dict.fromkeys(wanted) if key in samples]
    made: dict[Key, str] = {}
    recipe = SmallPictures(_rules_of(first))
    for outcomes, views in stream_views(dataset, chosen, [recipe], _CHUNK):
        for outcome, view in zip(outcomes, views, strict=True):
            key = outcome.sample.split, outcome.sample.path
            if view is not None and images.is_same(key, outcome.sha256):
                made[key] = as_url(np.asarray(view[0][0]))
    return made


def _rules_of(cache: Cache) -> PixelRules:
    try:
        rules = PixelRules.from_identity(dict(cache.identity))
    except DataError:  # features made elsewhere
        rules = PixelRules(SIDE)
    return PixelRules(
        SIDE,
        crop_mode="border",
        bit_depth=rules.bit_depth,
        truncated=rules.truncated,
        dicom=rules.dicom,
    )


def as_url(pixels: npt.NDArray[Any]) -> str:
    """Return an image (H, W, 3) as a small JPEG, grey where it has no colour."""
    from PIL import Image

    if pixels.shape[0] == 3 and pixels.shape[-1] != 3:
        pixels = np.moveaxis(pixels, 0, -1)
    is_grey = bool((pixels == pixels[..., :1]).all())
    image = Image.fromarray(np.ascontiguousarray(pixels[..., 0] if is_grey else pixels))
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=_QUALITY, optimize=True)
    return f"data:image/jpeg;base64,{base64.b64encode(stream.getvalue()).decode()}"
