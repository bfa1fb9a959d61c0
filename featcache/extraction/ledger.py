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
from featcache.extraction.pipeline import Outcome
from featcache.extraction.shards import Vectors

ImageKey = tuple[str, int, int]
"""Path, size in bytes and modification time in ns: an image believed unchanged."""

WorkedRow = tuple[int, bytes, bool, int]
"""Of a row of a worker's shard: position, sha256, whether it was cut off, how many vectors."""

_UNKNOWN_SHA256 = bytes(32)
# Of an image, where no number of a content stands:
_WANTED, _NO_FEATURES = -1, -2
# Of a content, where no number of a source of vectors stands:
_CLAIMED, _IN_HAND, _FAILED = -1, -2, -3


def image_key(sample: Sample) -> ImageKey:
    """Return what an unchanged image is recognised by."""
    return (sample.path, sample.image_bytes, sample.mtime_ns)


class Ledger:
    """What is known of the images of a data set. Decoding threads may share one.

    It takes 17 MB for 100,000 images of different content (traced; a table by hand took 6).

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
        self.planned = Counter((s.split, s.target) for s in dataset.samples)
        self._num_failed = Counter[tuple[str, int]]()
        # Images, by position.
        self._content_of = array("i", [_WANTED]) * len(dataset.samples)
        self._failures: dict[int, str] = {}
        self._claims: dict[int, int] = {}
        self._repeated: list[tuple[int, bytes]] = []  # their content is claimed by another image
        # Contents, by number.
        self._sha256: list[bytes] = []
        self._num_views = array("H")
        self._source = array("i")
        self._start = array("q")
        self._truncated = bytearray()
        self._reasons: dict[int, str] = {}
        self._numbers: dict[bytes, int] = {}  # by sha256: the first of most views
        self._vectors: list[Vectors] = []  # the sources
        # Until ``match``: what unchanged images are recognised by, and the sizes of known contents.
        self._keys: dict[ImageKey, int] = {}
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
        there = [self._find(h, row["views"]) for h, row in zip(hashes, own, strict=True)]
        made = self._add_known(
            vectors, [row["views"] for row in own], hashes, [row["truncated"] for row in own]
        )
        numbers: list[int | None] = [
            mine if known is None else known for known, mine in zip(there, made, strict=True)
        ]
        others = [row for row in rows if not row["views"]]
        numbers += [self._find(bytes.fromhex(row["image_sha256"])) for row in others]
        known = [
            ((row["path"], row["image_bytes"], row["mtime_ns"]), number)
            for row, number in zip([*own, *others], numbers, strict=True)
            if number is not None
        ]
        self._note((key for key, _ in known), (number for _, number in known))
        return len(known)

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
        for position, sample in enumerate(self._samples):
            number = None if rehash else self._keys.get(image_key(sample))
            if number is not None and self._num_views[number] >= self._wanted_views(position):
                self._content_of[position] = number
            elif sample.image_bytes in self._sizes:
                suspects.append(position)
        self._keys, self._sizes = {}, set()
        return suspects

    def recognise(self, position: int, sha256: bytes) -> None:
        """Give an image its features if its content is known."""
        number = self._find(sha256, self._wanted_views(position))
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
            if position not in self._claims and self._find(sha256, views) is None:
                self._claims[position] = self._append(sha256, views, _CLAIMED)
            return position in self._claims

    def settle(self, outcome: Outcome) -> bool:
        """Note what became of a wanted image; return whether its own features are in hand now.

        Raises:
            DataError: If more images have failed than are allowed.
        """
        with self._lock:
            position, reason, is_transient = outcome.position, outcome.reason, outcome.is_transient
            number = self._claims.pop(position, None)
            if number is None:
                if reason is None:
                    self._repeated.append((position, outcome.sha256))
                else:  # it could not even be read
                    self._fail(position, reason)
                return False
            if self._sha256[number] != outcome.sha256:
                reason, is_transient = reason or "it changed while it was read", True
            if reason is None:
                self._source[number], self._truncated[number] = _IN_HAND, outcome.truncated
                self._content_of[position] = number
                return True
            if not is_transient:
                self._source[number], self._reasons[number] = _FAILED, reason
            elif self._numbers.get(self._sha256[number]) == number:
                del self._numbers[self._sha256[number]]  # the next image of it makes its features
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
                number = self._find(sha256, self._wanted_views(position))
                if number is None or self._source[number] == _CLAIMED:
                    self._repeated.append((position, sha256))
                elif self._source[number] == _FAILED:
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
            "image_sha256": self._sha256[number].hex(),
            "truncated": bool(self._truncated[number]), "views": num_vectors,
        }  # fmt: skip

    def store(self, vectors: Vectors, positions: Iterable[int]) -> None:
        """Note that features in hand are in a shard now: one image's after the other's, (M, D)."""
        with self._lock:
            self._vectors.append(vectors)
            start = 0
            for position in positions:
                number = self._content_of[position]
                self._source[number], self._start[number] = len(self._vectors) - 1, start
                start += self._num_views[number]
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
        with self._lock:
            self._vectors.append(vectors)
            start = 0
            for position, sha256, truncated, num_views in rows:
                number = self._find(sha256, self._wanted_views(position))
                if number is None and num_views and self.wants(position):
                    source = len(self._vectors) - 1
                    number = self._append(sha256, num_views, source, start, truncated=truncated)
                    self.num_new += 1
                if number is not None and self.wants(position):
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
        return sum(number >= 0 and self._source[number] >= 0 for number in self._content_of)

    def rows_of(self, split: str) -> tuple[list[Sample], npt.NDArray[np.int64]]:
        """Return the samples of a split that have features, and the numbers of their contents."""
        rows = [
            (sample, number)
            for sample, number in zip(self._samples, self._content_of, strict=True)
            if sample.split == split and number >= 0
        ]
        return [sample for sample, _ in rows], np.array([number for _, number in rows], np.int64)

    def is_truncated(self, number: int) -> bool:
        """Return whether an image of this content was cut off and has been filled in."""
        return bool(self._truncated[number])

    def sha256_of(self, numbers: npt.NDArray[np.int64]) -> npt.NDArray[np.uint8]:
        """Return the sha256, (n, 32) uint8, of some contents; zeros where it is not known."""
        digests = b"".join(self._sha256[number] for number in numbers)
        return np.frombuffer(digests, np.uint8).reshape(-1, 32)

    def feature_blocks(
        self, numbers: npt.NDArray[np.int64], num_views: int = 1, block_vectors: int = 4096
    ) -> Iterator[npt.NDArray[Any]]:
        """Gather the features of some contents in their order, a block at a time.

        Of a content of more views than ``num_views``, the first are taken.

        Yields:
            (n, D) if ``num_views`` is 1, else (n, num_views, D).
        """
        all_sources, all_starts = np.array(self._source), np.array(self._start)
        block_rows = max(1, block_vectors // num_views)
        for i in range(0, len(numbers), block_rows):
            part = numbers[i : i + block_rows]
            sources, starts = all_sources[part], all_starts[part]
            block: npt.NDArray[Any] | None = None
            for source in np.unique(sources):
                vectors = self._vectors[source]()
                if block is None:
                    block = np.empty((len(part), num_views, vectors.shape[1]), vectors.dtype)
                where = np.flatnonzero(sources == source)
                numbers_there = starts[where, None] + np.arange(num_views)
                block[where] = vectors.take(numbers_there.reshape(-1)).reshape(
                    -1, num_views, vectors.shape[1]
                )
                del vectors
            assert block is not None
            yield block[:, 0] if num_views == 1 else block

    # ------------------------------------------------------------------------------------ contents

    def _wanted_views(self, position: int) -> int:
        return self._views_of_split[self._samples[position].split]

    def _find(self, sha256: bytes, num_views: int = 1) -> int | None:
        """Return the number of a content of at least so many views, known or not known yet."""
        number = self._numbers.get(sha256)
        return number if number is not None and self._num_views[number] >= num_views else None

    def _add_known(
        self, vectors: Vectors, num_views: Sequence[int], sha256: Sequence[bytes],
        truncated: Sequence[bool],
    ) -> range:  # fmt: skip
        self._vectors.append(vectors)
        first, start = len(self._sha256), 0
        for views, digest, cut in zip(num_views, sha256, truncated, strict=True):
            self._append(digest, views, len(self._vectors) - 1, start, truncated=cut)
            start += views
        return range(first, len(self._sha256))

    def _append(
        self, sha256: bytes, num_views: int, source: int, start: int = 0, *, truncated: bool = False
    ) -> int:
        number = len(self._sha256)
        self._sha256.append(sha256)
        self._num_views.append(num_views)
        self._source.append(source)
        self._start.append(start)
        self._truncated.append(truncated)
        there = self._numbers.get(sha256)
        if sha256 != _UNKNOWN_SHA256 and (there is None or self._num_views[there] < num_views):
            self._numbers[sha256] = number
        return number

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
