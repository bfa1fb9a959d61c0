"""Hash images, and find those that are byte-identical copies of each other.

Reads: image files. Writes: nothing.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future

from featcache.data.columns import Sample
from featcache.data.samples import ImageDataset
from featcache.errors import DataError, warn_user
from featcache.formatting import count, in_bytes
from featcache.runtime import Say
from featcache.threads import Threads

_AHEAD = 32  # images that are hashed before they are asked for
_READERS = 16  # of copies: an image of a store is mostly waited for


def hash_images(
    dataset: ImageDataset, samples: Sequence[Sample], num_threads: int
) -> Iterator[bytes | None]:
    """Yield the sha256 of every image, in order; None where it cannot be read."""

    def digest(sample: Sample) -> bytes | None:
        try:
            return hashlib.sha256(dataset.read(sample)).digest()
        except (DataError, OSError, MemoryError):
            return None  # whoever decodes it will say why

    under_way: deque[Future[bytes | None]] = deque()
    with Threads("hash", num_threads) as threads:
        for sample in samples:
            under_way.append(threads.submit(digest, sample))
            if len(under_way) > _AHEAD:
                yield under_way.popleft().result()
        while under_way:
            yield under_way.popleft().result()


def find_copies(dataset: ImageDataset, say: Say) -> dict[int, bytes]:
    """Return index -> sha256 of the images that have a byte-identical copy.

    Only files of equal size are read: of 1,000 X-rays that is a handful.

    Raises:
        DataError: If one of these cannot be read.
    """
    by_size: dict[int, list[int]] = defaultdict(list)
    for index, sample in enumerate(dataset.samples):
        by_size[sample.image_bytes].append(index)
    alike = [index for of_size in by_size.values() if len(of_size) > 1 for index in of_size]
    samples = [dataset.samples[index] for index in alike]
    if samples and dataset.object_of(samples[0]) is not None:
        size = in_bytes(sum(sample.image_bytes for sample in samples))
        say(f"reading {count(len(samples), 'image')}, {size}, of which others have the same size")
    hashes: dict[int, bytes] = {}
    for index, sha256 in zip(alike, hash_images(dataset, samples, _READERS), strict=True):
        sample = dataset.samples[index]  # reading it again says why it could not be read
        hashes[index] = sha256 or hashlib.sha256(dataset.read(sample)).digest()
    frequency = Counter(hashes.values())
    return {index: sha256 for index, sha256 in hashes.items() if frequency[sha256] > 1}


def warn_of_contradictions(dataset: ImageDataset, hashes: dict[int, bytes]) -> None:
    """Warn of byte-identical images that are of different classes or labels.

    Args:
        dataset: The images.
        hashes: As ``find_copies`` returned them.
    """
    by_hash: dict[bytes, list[Sample]] = defaultdict(list)
    for index, digest in hashes.items():
        by_hash[digest].append(dataset.samples[index])
    contradicting = [
        copies for copies in by_hash.values()
        if len({dataset.label_of(copy) for copy in copies} - {""}) > 1
    ]  # fmt: skip
    if contradicting:
        num_images, num_contents = sum(map(len, contradicting)), len(contradicting)
        warn_user(
            f"{num_images:,} images ({num_contents:,} different by content) have byte-identical "
            f"copies {'of other labels' if dataset.task == 'multilabel' else 'in another class'}, "
            "for example " + " = ".join(copy.path for copy in contradicting[0])
        )
