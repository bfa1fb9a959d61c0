"""The images of a cache, read again for an audit: small pictures, facts, hashes of pixels.

Reads: images. Writes: nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from featcache.cache.reading import Cache
from featcache.data.dataset import ImageDataset, Sample
from featcache.data.sources import Data
from featcache.errors import DataError
from featcache.evaluation.auditing.copies import AuditRows
from featcache.extraction.comparison import find_images
from featcache.extraction.view_stream import stream_views
from featcache.pixels.facts import to_grey
from featcache.pixels.images import PixelRules
from featcache.pixels.views import PLAIN, ViewRules
from featcache.untrusted import MAX_PIXELS

SIDE = 64
"""Of the small pictures, in pixels."""
_CHUNK = 32

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class SmallPictures:
    """What ``stream_views`` makes small pictures by."""

    rules: PixelRules
    view_rules: ViewRules = PLAIN


@dataclass(frozen=True)
class AuditImages:
    """What the images of a cache's rows are like.

    Attributes:
        small: (N, 64, 64) uint8 grey, squashed to a square; zeros where there is no image.
        is_read: (N,) bool, whether the image is there, unchanged and readable.
        pixels: Per row, sha256 of the decoded pixels at full size; None where it was not read.
        facts: Fact -> (N, k) float64, NaN where the image was not read.
        missing: Rows whose image is gone.
        changed: Rows whose image is another one now.
        unreadable: Rows whose image cannot be decoded (any more).
        dataset: Where they were read from.
        samples: The image of each row that was read.
    """

    small: npt.NDArray[np.uint8]
    is_read: npt.NDArray[np.bool_]
    pixels: list[bytes | None]
    facts: dict[str, Array]
    missing: list[int]
    changed: list[int]
    unreadable: list[int]
    dataset: ImageDataset
    samples: dict[int, Sample]

    def as_dict(self, rows: AuditRows) -> dict[str, Any]:
        """Return how many images were read, and up to five paths of each kind that was not."""
        kinds = {"missing": self.missing, "changed": self.changed, "unreadable": self.unreadable}
        return {
            "num_read": int(self.is_read.sum()),
            **{
                name: {"num_rows": len(found), "paths": [rows.paths[row] for row in found[:5]]}
                for name, found in kinds.items()
            },
        }


def read_images(rows: AuditRows, data: Data, max_pixels: int = MAX_PIXELS) -> AuditImages:
    """Decode the images of all rows once, as ``extract`` does, those that are there.

    Args:
        rows: Of the cache.
        data: The images it was made of.
        max_pixels: Larger images count as unreadable.

    Raises:
        CacheError: If ``data`` has none of the images.
        DataError: If ``data`` is no data set.
    """
    dataset, samples, _ = find_images(rows.cache, data)
    keys = list(zip(rows.splits, rows.paths, strict=True))
    number = {key: row for row, key in enumerate(keys)}
    wanted = dataset.in_reading_order(s for key, s in samples.items() if key in number)
    recorded = [
        sha256.tobytes() for split in rows.cache.splits.values() for sha256 in split.image_sha256
    ]
    small = np.zeros((len(keys), SIDE, SIDE), np.uint8)
    pixels: list[bytes | None] = [None] * len(keys)
    facts: dict[str, Array] = {}
    read: dict[int, Sample] = {}
    changed, unreadable = [], []
    recipe = SmallPictures(_rules_of(rows.cache, max_pixels))
    stream = stream_views(dataset, wanted, [recipe], _CHUNK, with_facts=True)
    for outcomes, views in stream:
        for outcome, view in zip(outcomes, views, strict=True):
            row = number[outcome.sample.split, outcome.sample.path]
            if rows.has_hash[row] and outcome.sha256 not in {recorded[row], bytes(32)}:
                changed.append(row)
            elif view is None or outcome.facts is None:
                unreadable.append(row)
            else:
                small[row] = to_grey(view[0][0])
                pixels[row], read[row] = outcome.facts.pixels_sha256, outcome.sample
                for name, values in outcome.facts.values.items():
                    column = facts.setdefault(name, np.full((len(keys), len(values)), np.nan))
                    column[row] = values
    return AuditImages(
        small, np.array([sha256 is not None for sha256 in pixels], np.bool_), pixels, facts,
        [row for row, key in enumerate(keys) if key not in samples], sorted(changed),
        sorted(unreadable), dataset, read,
    )  # fmt: skip


def _rules_of(cache: Cache, max_pixels: int) -> PixelRules:
    """Return the rules that the cache's images were decoded by, but for small squares."""
    try:
        rules = PixelRules.from_identity(dict(cache.identity))
    except DataError:  # features made elsewhere
        rules = PixelRules(SIDE)
    return PixelRules(
        SIDE,
        bit_depth=rules.bit_depth,
        truncated=rules.truncated,
        dicom=rules.dicom,
        max_pixels=max_pixels,
    )


def with_pixels(rows: AuditRows, images: AuditImages) -> AuditRows:
    """Return rows of which those with the same decoded pixels are of one image."""
    numbers = rows.images.tolist()
    first: dict[bytes, int] = {}
    joined: dict[int, int] = {}
    for row, sha256 in enumerate(images.pixels):
        if sha256 is not None:
            joined.setdefault(numbers[row], first.setdefault(sha256, numbers[row]))
    return replace(rows, images=np.array([joined.get(n, n) for n in numbers], np.int64))
