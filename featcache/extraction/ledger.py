"""The ledger of an extraction: what is known of every image, and of every content of images.

An image is its position in the data set's samples. Features depend only on the recipe and on the
bytes of the file, so they belong to a content, found by its sha256: an image of known content needs
no forward pass, whatever its name. A content is

- known: its features lie in the old cache or in a shard;
- claimed: one image of that content is being decoded and run, for all of them;
- in hand: its features were made and are in no shard yet;
- failed: no decoder reads it. Nothing of that is kept: every ``extract`` tries again.
"""

from __future__ import annotations

import threading
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from featcache.cache.reading import Cache, Failure
from featcache.data.dataset import ImageDataset, Sample
from featcache.errors import DataError
from featcache.extraction.contents import CLAIMED, FAILED, FORGOTTEN, IN_HAND, Contents, HashColumn
from featcache.extraction.shards import Vectors
from featcache.extraction.view_stream import Outcome

ImageKey = tuple[str, int, int]
"""Path, size in bytes and modification time in ns: an image believed unchanged."""

WorkedRow = tuple[int, bytes, bool, int]
"""Of a row of a worker's shard: position, sha256, whether it was cut off, how many vectors."""

# Of an image, where no number of a content stands:
_WANTED, _NO_FEATURES = -1, -2


def image_key(sample: Sample) -> ImageKey:
    """Return what an unchanged image is recognised by."""
    return (sample.path, sample.image_bytes, sample.mtime_ns)


class Ledger:
    """What is known of the images of a data set. Decoding threads may share one.

    It takes 70 bytes an image of a content of its own.

    Args:
        dataset: The images.
        num_views: Split -> V, how many vectors each of its images has.
        max_failures: Failed images allowed per split and class: a count (int) or a share (float).

    Attributes:
        num_new: Contents whose features were made in this run.
        planned: (split, target) -> number of images.
    """

    def __init__(
        self, dataset: ImageDataset, num_views: Mapping[str, int], max_failures: int | float = 1.0
    ) -> None:
        self.num_new = 0
        self._dataset, self._samples = dataset, dataset.samples
        self._views_of_split, self._max_failures = num_views, max_failures
        samples = dataset.samples
        self.planned = Counter(zip(samples.splits, samples.targets, strict=True))
        self._num_failed = Counter[tuple[str, int]]()
        # Images, by position.
        self._content_of = array("i", [_WANTED]) * len(dataset.samples)
        self._failures: dict[int, str] = {}
        self._claims: dict[int, int] = {}
        self._repeated: list[tuple[int, bytes]] = []  # their content is claimed by another image
        self._contents = Contents()
        self._reasons: dict[int, str] = {}  # of contents that failed, by number
        # Until ``match``: numbers of contents by which unchanged images are recognised, and sizes.
        self._noted = array("i", [_WANTED]) * len(dataset.samples)
        self._positions: dict[str, int] = {}
        self._sizes: set[int] = set()
        self._lock = threading.Lock()

    # ------------------------------------------------------------------------ known before the run

    def add_cache(self, old: Cache) -> None:
        """Enter the rows of an older cache; before any shards."""
        listed = old.provenance.get("truncated")
        truncated = {p for p in listed if isinstance(p, str)} if isinstance(listed, list) else set()
        for split in old.splits.values():
            numbers = self._add_known(
                partial(split.open_features, as_vectors=True),
                [split.num_views] * len(split),
                [row.tobytes() for row in split.image_sha256],
                [path in truncated for path in split.paths],
            )
            sizes, times = split.image_bytes.tolist(), split.mtime_ns.tolist()
            self._note(zip(split.paths, sizes, times, strict=True), numbers)

    def add_shard(self, vectors: Vectors, rows: Sequence[Mapping[str, Any]]) -> int:
        """Enter the rows of a shard, as ``describe_row`` made them; return how many are known.

        A row without vectors is of a content that stands elsewhere: if the shard that held it is
        damaged, it is not known.
        """
        own = [row for row in rows if row["views"]]
        hashes = [bytes.fromhex(row["image_sha256"]) for row in own]
        # Two workers may have made the same content: as in ``take_shard``, the first one counts.
        there = [self._contents.find(h, row["views"]) for h, row in zip(hashes, own, strict=True)]
        made = self._add_known(
            vectors, [row["views"] for row in own], hashes, [row["truncated"] for row in own]
        )
        numbers: list[int | None] = [
            mine if known is None else known for known, mine in zip(there, made, strict=True)
        ]
        others = [row for row in rows if not row["views"]]
        numbers += [self._contents.find(bytes.fromhex(row["image_sha256"])) for row in others]
        known = [
            ((row["path"], row["image_bytes"], row["mtime_ns"]), number)
            for row, number in zip([*own, *others], numbers, strict=True)
            if number is not None
        ]
        self._note((key for key, _ in known), (number for _, number in known))
        return len(known)

    def _note(self, keys: Iterable[ImageKey], numbers: Iterable[int]) -> None:
        if not self._positions:
            self._positions = {path: i for i, path in enumerate(self._samples.paths)}
        for key, number in zip(keys, numbers, strict=True):
            position = self._positions.get(key[0])
            if position is not None and image_key(self._samples[position]) == key:
                self._noted[position] = number
            self._sizes.add(key[1])

    def match(self, *, rehash: bool = False) -> list[int]:
        """Recognise the unchanged images; return the positions whose content may be known.

        Those are of a size that occurs: hash them and ``recognise`` them. With ``rehash``, size and
        time prove nothing.
        """
        suspects = []
        for position, num_bytes in enumerate(self._samples.image_bytes):
            number = _WANTED if rehash else self._noted[position]
            if number != _WANTED and (
                self._contents.num_views[number] >= self._wanted_views(position)
            ):
                self._content_of[position] = number
            elif num_bytes in self._sizes:
                suspects.append(position)
        self._noted, self._positions, self._sizes = array("i"), {}, set()
        return suspects

    def recognise(self, position: int, sha256: bytes) -> None:
        """Give an image its features if its content is known."""
        number = self._contents.find(sha256, self._wanted_views(position))
        if number is not None and self.wants(position):
            self._content_of[position] = number

    # ------------------------------------------------------------------------- while images are run

    def wants(self, position: int) -> bool:
        """Return whether an image has no features yet, and has not failed."""
        return self._content_of[position] == _WANTED

    @property
    def num_wanted(self) -> int:
        """How many images are wanted."""
        return self._content_of.count(_WANTED)

    def claim(self, position: int, sha256: bytes) -> bool:
        """Return whether an image is to be decoded and run, for all images of its content.

        It is if that content is neither known nor claimed. Asked again, the image that has claimed
        it hears the same.
        """
        with self._lock:
            if not self.wants(position):
                return False
            views = self._wanted_views(position)
            if position not in self._claims and self._contents.find(sha256, views) is None:
                self._claims[position] = self._contents.append(sha256, views, CLAIMED)
            return position in self._claims

    def settle(self, outcome: Outcome) -> bool:
        """Note what became of a wanted image; return whether its own features are in hand now.

        Raises:
            DataError: If more images have failed than are allowed.
        """
        contents = self._contents
        with self._lock:
            position, reason, is_transient = outcome.position, outcome.reason, outcome.is_transient
            number = self._claims.pop(position, None)
            if number is None:
                if reason is None:
                    self._repeated.append((position, outcome.sha256))
                else:  # it could not even be read
                    self._fail(position, reason)
                return False
            if contents.sha256(number) != outcome.sha256:
                reason, is_transient = reason or "it changed while it was read", True
            if reason is None:
                contents.source[number], contents.truncated[number] = IN_HAND, outcome.truncated
                self._content_of[position] = number
                return True
            if not is_transient:
                contents.source[number], self._reasons[number] = FAILED, reason
            else:
                contents.source[number] = FORGOTTEN  # the next image of it makes its features
            self._fail(position, reason)
            return False

    def settle_repeated(self) -> list[int]:
        """Return the images that got the features of another image of their content just now.

        Raises:
            DataError: If more images have failed than are allowed.
        """
        settled, repeated = [], self._repeated
        self._repeated = []
        with self._lock:
            for position, sha256 in repeated:
                number = self._contents.find(sha256, self._wanted_views(position))
                if number is None or self._contents.source[number] == CLAIMED:
                    self._repeated.append((position, sha256))
                elif self._contents.source[number] == FAILED:
                    self._fail(position, self._reasons[number])
                else:
                    self._content_of[position] = number
                    settled.append(position)
        return settled

    def take_unsettled(self) -> list[int]:
        """Return, once all images have come, those to be run themselves after all.

        The image that had claimed their content failed by an accident of its own.
        """
        unsettled, self._repeated = [position for position, _ in self._repeated], []
        return unsettled

    def describe_row(self, position: int, num_vectors: int) -> dict[str, Any]:
        """Return an image's row in the table of a shard, where it has so many vectors."""
        sample, number = self._samples[position], self._content_of[position]
        return {
            "path": sample.path, "image_bytes": sample.image_bytes, "mtime_ns": sample.mtime_ns,
            "image_sha256": self._contents.sha256(number).hex(),
            "truncated": bool(self._contents.truncated[number]), "views": num_vectors,
        }  # fmt: skip

    def store(self, vectors: Vectors, positions: Iterable[int]) -> None:
        """Note that features in hand are in a shard now: one image's after the other's, (M, D)."""
        contents = self._contents
        with self._lock:
            contents.vectors.append(vectors)
            start = 0
            for position in positions:
                number = self._content_of[position]
                contents.source[number], contents.start[number] = len(contents.vectors) - 1, start
                start += contents.num_views[number]
                self.num_new += 1

    # ----------------------------------------------------------------------- what workers hand back

    def leave_out(self, position: int) -> None:
        """Note that the features of an image are not asked for."""
        self._content_of[position] = _NO_FEATURES

    def take_shard(self, vectors: Vectors, rows: Iterable[WorkedRow]) -> None:
        """Enter a shard that a worker has made.

        Features of a content that has come from elsewhere meanwhile are not used: whichever shard
        was entered first decides the bytes of all its images.
        """
        contents = self._contents
        with self._lock:
            contents.vectors.append(vectors)
            source, start = len(contents.vectors) - 1, 0
            for position, sha256, truncated, num_views in rows:
                if self.wants(position):
                    number = contents.find(sha256, self._wanted_views(position))
                    if number is None and num_views:
                        number = contents.append(
                            sha256, num_views, source, start, truncated=truncated
                        )
                        self.num_new += 1
                    if number is not None:
                        self._content_of[position] = number
                start += num_views

    def fail(self, position: int, reason: str) -> None:
        """Note that a wanted image has failed in a worker.

        Raises:
            DataError: If more images have failed than are allowed.
        """
        with self._lock:
            if self.wants(position):
                self._fail(position, reason)

    @property
    def reasons(self) -> Mapping[int, str]:
        """Why images failed, by position."""
        return self._failures

    # ---------------------------------------------------------------------------------- afterwards

    @property
    def failures(self) -> list[Failure]:
        """The images that failed in this run."""
        samples = ((self._samples[position], reason) for position, reason in self._failures.items())
        return [
            Failure(s.path, s.split, s.target, reason, s.image_bytes, s.mtime_ns)
            for s, reason in samples
        ]

    @property
    def num_kept(self) -> int:
        """How many images have their features in the old cache or in a shard."""
        source = self._contents.source
        return sum(number >= 0 and source[number] >= 0 for number in self._content_of)

    def rows_of(self, split: str) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int32]]:
        """Return the images of a split that have features: positions, and numbers of contents."""
        positions = self._samples.numbers_of(split)
        numbers = np.frombuffer(self._content_of, np.int32)[positions]
        is_there = numbers >= 0
        return positions[is_there], numbers[is_there]

    def is_truncated(self, number: int) -> bool:
        """Return whether an image of this content was cut off and has been filled in."""
        return bool(self._contents.truncated[number])

    def sha256_of(self, numbers: npt.NDArray[np.int32]) -> npt.NDArray[np.uint8]:
        """Return the sha256, (n, 32) uint8, of some contents; zeros where it is not known."""
        return self._contents.sha256_of(numbers)

    def hash_column(self, numbers: npt.NDArray[np.int32]) -> HashColumn:
        """Return the same, made when it is written."""
        return HashColumn(self._contents, numbers)

    def feature_blocks(
        self, numbers: npt.NDArray[np.int32], num_views: int = 1, block_vectors: int = 4096
    ) -> Iterator[npt.NDArray[Any]]:
        """Gather features: see ``Contents.feature_blocks``."""
        return self._contents.feature_blocks(numbers, num_views, block_vectors)

    # ------------------------------------------------------------------------------------ contents

    def _wanted_views(self, position: int) -> int:
        return self._views_of_split[self._samples.split_of(position)]

    def _add_known(
        self, vectors: Vectors, num_views: Sequence[int], sha256: Sequence[bytes],
        truncated: Sequence[bool],
    ) -> range:  # fmt: skip
        contents = self._contents
        contents.vectors.append(vectors)
        first, start = len(contents), 0
        for views, digest, cut in zip(num_views, sha256, truncated, strict=True):
            contents.append(digest, views, len(contents.vectors) - 1, start, truncated=cut)
            start += views
        return range(first, len(contents))

    def _fail(self, position: int, reason: str) -> None:
        self._content_of[position], self._failures[position] = _NO_FEATURES, reason
        sample = self._samples[position]
        cell = (sample.split, sample.target)
        self._num_failed[cell] += 1
        num_failed, planned = self._num_failed[cell], self.planned[cell]
        allowed: float = self._max_failures
        if isinstance(allowed, float) and allowed:
            allowed = max(1, int(allowed * planned))  # 5 % of ten is not none
        if num_failed > allowed:
            where = "/".join(filter(None, [sample.split, self._dataset.class_of(sample)]))
            is_share = isinstance(self._max_failures, float)
            limit = f"{self._max_failures:.0%}" if is_share else self._max_failures
            raise DataError(
                "images", expected=f"at most {limit} of {planned} failed in {where}",
                found=f"{num_failed}, the last being {sample.path}: {reason}",
                hint="Mend them or allow more with --max-errors; the same command then goes on",
            )  # fmt: skip
