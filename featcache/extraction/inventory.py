"""The inventory of a data set: which of its images have features, and which must be run.

An image is unchanged if its path, size and time are those of a row; what is not is recognised by
its content, wherever it was moved and whatever it is called now.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from featcache.cache.reading import Cache
from featcache.data.dataset import ImageDataset, Sample
from featcache.extraction.contents import Contents, Vectors

ImageKey = tuple[str, int, int]
"""Path, size in bytes and modification time in ns: an image believed unchanged."""

_NONE = -1


def image_key(sample: Sample) -> ImageKey:
    """Return what an unchanged image is recognised by."""
    return (sample.path, sample.image_bytes, sample.mtime_ns)


@dataclass(frozen=True)
class Changes:
    """What became of the rows of an older cache.

    Attributes:
        num_kept: Images of the same path and content.
        num_moved: Content whose old path is no longer there, under another path.
        num_gone: Rows whose path is no longer there, and which did not move.
    """

    num_kept: int = 0
    num_moved: int = 0
    num_gone: int = 0


class Inventory:
    """The samples of a data set by position, and the contents that are known.

    Args:
        dataset: The images.
        num_views: Split -> how many vectors its images have.
    """

    def __init__(self, dataset: ImageDataset, num_views: Callable[[str], int]) -> None:
        self.samples = dataset.samples
        self.contents = Contents()
        self._num_views = num_views
        self._content_of = array("i", [_NONE]) * len(dataset.samples)
        self._old: Cache | None = None
        # Until ``match``: what unchanged images are recognised by, and the sizes of known contents.
        self._keys: dict[ImageKey, int] = {}
        self._sizes: set[int] = set()

    def adopt(self, old: Cache) -> None:
        """Add the rows of an older cache; before any others."""
        self._old = old
        listed = old.provenance.get("truncated")
        truncated = {p for p in listed if isinstance(p, str)} if isinstance(listed, list) else set()
        for split in old.splits.values():
            numbers = self.contents.add(
                split.map_vectors,
                [split.num_views] * len(split),
                [row.tobytes() for row in split.image_sha256],
                [path in truncated for path in split.paths],
            )
            keys = zip(
                split.paths, split.image_bytes.tolist(), split.mtime_ns.tolist(), strict=True
            )
            self._note(keys, numbers)

    def resume(self, vectors: Vectors, rows: Sequence[Mapping[str, Any]]) -> int:
        """Add the rows of a shard (module ``shards``); return how many.

        A row without vectors of its own is of a content that stands elsewhere.
        """
        own = [row for row in rows if row["views"]]
        numbers = self.contents.add(
            vectors,
            [row["views"] for row in own],
            [bytes.fromhex(row["image_sha256"]) for row in own],
            [row["truncated"] for row in own],
        )
        self._note(((r["path"], r["image_bytes"], r["mtime_ns"]) for r in own), numbers)
        num_elsewhere = 0
        for row in rows:
            if not row["views"]:
                number = self.contents.find(bytes.fromhex(row["image_sha256"]))
                if number is not None:  # else the shard that held it is damaged
                    self._note([(row["path"], row["image_bytes"], row["mtime_ns"])], [number])
                    num_elsewhere += 1
        return len(own) + num_elsewhere

    def _note(self, keys: Iterable[ImageKey], numbers: Iterable[int]) -> None:
        for key, number in zip(keys, numbers, strict=True):
            self._keys[key] = number
            self._sizes.add(key[1])

    def match(self, *, rehash: bool = False) -> list[int]:
        """Recognise the unchanged images; return the positions whose content may be known.

        Those are of a size that occurs: hash them and ``recognise`` them. With ``rehash``, size and
        time prove nothing.
        """
        suspects = []
        for position, sample in enumerate(self.samples):
            number = None if rehash else self._keys.get(image_key(sample))
            if number is not None and self._suffices(number, sample):
                self._content_of[position] = number
            elif sample.image_bytes in self._sizes:
                suspects.append(position)
        self._keys, self._sizes = {}, set()
        return suspects

    def _suffices(self, number: int, sample: Sample) -> bool:
        return self.contents.num_views(number) >= self._num_views(sample.split)

    def recognise(self, position: int, sha256: bytes) -> None:
        """Give an image its features if its content is known."""
        number = self.contents.find(sha256, self._num_views(self.samples[position].split))
        if number is not None:
            self._content_of[position] = number

    def set_content(self, position: int, number: int) -> None:
        """Note which content an image has, once it has features."""
        self._content_of[position] = number

    def is_pending(self, position: int) -> bool:
        """Return whether an image has no features yet."""
        return self._content_of[position] == _NONE

    def claim(self, sample: Sample, sha256: bytes) -> bool:
        """Return whether features must be made of an image: nobody has, and no other is at it."""
        return self.contents.claim(sha256, self._num_views(sample.split), sample.path)

    def find(self, sample: Sample, sha256: bytes) -> int | None:
        """Return the number of an image's content."""
        return self.contents.find(sha256, self._num_views(sample.split))

    def rows_of(self, split: str) -> tuple[list[Sample], npt.NDArray[np.int64]]:
        """Return the samples of a split that have features, and the numbers of their contents."""
        positions = [
            p for p, sample in enumerate(self.samples)
            if sample.split == split and self._content_of[p] != _NONE
        ]  # fmt: skip
        numbers = np.array([self._content_of[p] for p in positions], np.int64)
        return [self.samples[p] for p in positions], numbers

    def compare(self) -> Changes:
        """Return what became of the rows of the older cache."""
        if self._old is None:
            return Changes()
        before = {
            path: row.tobytes()
            for split in self._old.splits.values()
            for path, row in zip(split.paths, split.image_sha256, strict=True)
        }
        missing = Counter(before[p] for p in before.keys() - {s.path for s in self.samples})
        num_kept = num_moved = 0
        for position, number in enumerate(self._content_of):
            if number == _NONE:
                continue
            sha256 = self.contents.sha256_of(number)
            if before.get(self.samples[position].path) == sha256:
                num_kept += 1
            elif missing[sha256] > 0:
                num_moved += 1
                missing[sha256] -= 1
        return Changes(num_kept, num_moved, missing.total())
