"""Samples in columns: 40 bytes each beside their paths. As objects they take 250.

Reads and writes: nothing.
"""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple, TypeVar, overload

import numpy as np
import numpy.typing as npt

from featcache.data.folders import SPLITS, ImageFile

_T = TypeVar("_T")


class Sample(NamedTuple):
    """One image: where it is, what it is, which split and group it belongs to.

    Args:
        path: ``/``-separated, relative to the root; in a CSV as written there. Bytes that are not
            UTF-8 are surrogate-escaped.
        target: Index into the classes, or ``UNLABELLED``.
        split: ``train``, ``valid``, ``test`` or ``all``.
        group: Images of one group (a patient) stay in one split; None if groups are not known.
        image_bytes: Size of the file.
        mtime_ns: Time of its last change, in ns, modulo 2**64 as an int64. (Zip: see
            ``archive.Member``.)
        targets: Of several labels, 1 (yes), 0 (no) or ``UNKNOWN`` for each class, and ``target`` is
            ``UNLABELLED``. None of a data set of one class per image.
    """

    path: str
    target: int
    split: str
    group: str | None
    image_bytes: int
    mtime_ns: int
    targets: tuple[int, ...] | None = None


class Texts(Sequence[str]):
    """Texts in one piece: 8 bytes each beside their own. A list of them takes 66.

    Args:
        texts: Bytes in them that are not UTF-8 are surrogate-escaped.
    """

    def __init__(self, texts: Iterable[str] = ()) -> None:
        self._data, self._ends = bytearray(), array("q", [0])
        for text in texts:
            self.append(text)

    def append(self, text: str) -> None:
        """Add a text."""
        self._data += text.encode("utf-8", "surrogateescape")
        self._ends.append(len(self._data))

    def bytes_of(self, number: int) -> bytes:
        """Return the bytes of one of the texts, from 0."""
        return bytes(self._data[self._ends[number] : self._ends[number + 1]])

    def longest(self, numbers: npt.NDArray[np.int64]) -> int:
        """Return how many bytes the longest of some texts (n,) has; 0 of none."""
        ends = np.frombuffer(self._ends, np.int64)
        return int((ends[numbers + 1] - ends[numbers]).max(initial=0))

    def taken(self, numbers: Iterable[int]) -> Texts:
        """Return some of the texts."""
        found = Texts()
        for number in numbers:
            found._data += self._data[self._ends[number] : self._ends[number + 1]]
            found._ends.append(len(found._data))
        return found

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __iter__(self) -> Iterator[str]:
        for start, end in itertools.pairwise(self._ends):
            yield self._data[start:end].decode("utf-8", "surrogateescape")

    @overload
    def __getitem__(self, number: int) -> str: ...

    @overload
    def __getitem__(self, number: slice) -> Texts: ...

    def __getitem__(self, number: int | slice) -> str | Texts:
        if isinstance(number, slice):
            return self.taken(range(*number.indices(len(self))))
        if number < 0:
            number = range(len(self))[number]
        data = self._data[self._ends[number] : self._ends[number + 1]]
        return data.decode("utf-8", "surrogateescape")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Texts) and self.__dict__ == other.__dict__

    __hash__ = None  # type: ignore[assignment]  # as of a list


class Samples(Sequence[Sample]):
    """Samples, each made when it is asked for, and their columns. Not to be changed. Picklable.

    An image costs 0.7 us as a sample; reading and decoding the smallest takes 300.

    Args:
        samples: The samples.

    Attributes:
        paths: Of each.
        targets: Of each the index of its class; int32.
        image_bytes: Of each; int64.
        mtime_ns: Of each; int64.
    """

    def __init__(self, samples: Iterable[Sample] = ()) -> None:
        self.paths = Texts()
        self.targets, self.image_bytes, self.mtime_ns = array("i"), array("q"), array("q")
        # Of each the number of a value, of which there are few.
        self._split_of, self._group_of, self._labels_of = array("i"), array("i"), array("i")
        splits: dict[str, int] = {}
        groups: dict[str | None, int] = {}
        labels: dict[tuple[int, ...] | None, int] = {}
        for path, target, split, group, num_bytes, mtime_ns, several in samples:
            self.paths.append(path)
            self.targets.append(target)
            self.image_bytes.append(num_bytes)
            self.mtime_ns.append(mtime_ns)
            self._split_of.append(splits.setdefault(split, len(splits)))
            self._group_of.append(groups.setdefault(group, len(groups)))
            self._labels_of.append(labels.setdefault(several, len(labels)))
        self._splits, self._groups, self._labels = tuple(splits), tuple(groups), tuple(labels)

    @property
    def splits(self) -> Iterator[str]:
        """The split of each."""
        return map(self._splits.__getitem__, self._split_of)

    @property
    def groups(self) -> Iterator[str | None]:
        """The group of each."""
        return map(self._groups.__getitem__, self._group_of)

    def split_of(self, number: int) -> str:
        """Return the split of one."""
        return self._splits[self._split_of[number]]

    def group_of(self, number: int) -> str | None:
        """Return the group of one."""
        return self._groups[self._group_of[number]]

    def numbers_of(self, split: str) -> npt.NDArray[np.int64]:
        """Return which samples are in a split, (n,)."""
        if split not in self._splits:
            return np.empty(0, np.int64)
        return np.flatnonzero(np.frombuffer(self._split_of, "i") == self._splits.index(split))

    def taken(self, numbers: npt.NDArray[np.int64]) -> Samples:
        """Return some of the samples, (n,), in this order."""
        found = Samples()
        if not len(numbers):
            return found
        found.paths = self.paths.taken(numbers.tolist())
        found.targets = _taken(self.targets, numbers)
        found.image_bytes = _taken(self.image_bytes, numbers)
        found.mtime_ns = _taken(self.mtime_ns, numbers)
        found._split_of, found._splits = _taken_values(self._split_of, self._splits, numbers)
        found._group_of, found._groups = _taken_values(self._group_of, self._groups, numbers)
        found._labels_of, found._labels = _taken_values(self._labels_of, self._labels, numbers)
        return found

    def __len__(self) -> int:
        return len(self.paths)

    def __iter__(self) -> Iterator[Sample]:
        labels = map(self._labels.__getitem__, self._labels_of)
        columns = (self.targets, self.splits, self.groups, self.image_bytes, self.mtime_ns, labels)
        return itertools.starmap(Sample, zip(self.paths, *columns, strict=True))

    @overload
    def __getitem__(self, number: int) -> Sample: ...

    @overload
    def __getitem__(self, number: slice) -> Samples: ...

    def __getitem__(self, number: int | slice) -> Sample | Samples:
        if isinstance(number, slice):
            return self.taken(np.arange(len(self))[number])
        return Sample(
            self.paths[number], self.targets[number], self._splits[self._split_of[number]],
            self._groups[self._group_of[number]], self.image_bytes[number], self.mtime_ns[number],
            self._labels[self._labels_of[number]],
        )  # fmt: skip

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Samples) and [*self] == [*other]

    __hash__ = None  # type: ignore[assignment]  # as of a list


def _taken(column: array[int], numbers: npt.NDArray[np.int64]) -> array[int]:
    part = np.frombuffer(column, column.typecode)[numbers]
    return array(column.typecode, part.tobytes())


def _taken_values(
    column: array[int], values: tuple[_T, ...], numbers: npt.NDArray[np.int64]
) -> tuple[array[int], tuple[_T, ...]]:
    """Return numbers of values, and of the values those that are left: a task has few groups."""
    part = np.frombuffer(column, column.typecode)[numbers]
    present, part = np.unique(part, return_inverse=True)
    return array("i", part.astype(np.int32).tobytes()), tuple(values[n] for n in present)


class ImageFiles:
    """Image files, gone through as often as need be: 24 bytes each beside their paths.

    Args:
        files: The files.
    """

    def __init__(self, files: Iterable[ImageFile]) -> None:
        self._paths, self._sizes, self._times = Texts(), array("q"), array("q")
        for path, num_bytes, mtime_ns in files:
            self._paths.append(path)
            self._sizes.append(num_bytes)
            self._times.append(as_int64(mtime_ns))

    def __len__(self) -> int:
        return len(self._paths)

    def __iter__(self) -> Iterator[ImageFile]:
        return map(ImageFile, self._paths, self._sizes, self._times)


def as_int64(mtime_ns: int) -> int:
    """Return a time modulo 2**64 as an int64.

    An int64 of nanoseconds ends in 2262: so later times are still others than the earlier ones.
    """
    return (mtime_ns + 2**63) % 2**64 - 2**63


def make_sample(
    image: ImageFile, target: int, split: str, group: str | None = None,
    targets: tuple[int, ...] | None = None,
) -> Sample:  # fmt: skip
    """Return the sample of an image file."""
    mtime_ns = as_int64(image.mtime_ns)
    return Sample(image.path, target, split, group, image.image_bytes, mtime_ns, targets)


def sort_samples(samples: Iterable[Sample]) -> Samples:
    """Return samples by split, and by the bytes of their path."""
    found = Samples(samples)
    number = len(found)
    paths = np.fromiter(map(found.paths.bytes_of, range(number)), object, number)
    by_path = np.argsort(paths, kind="stable")
    del paths  # 70 bytes each
    splits = np.array([SPLITS.index(split) for split in found.splits], np.int8)
    return found.taken(by_path[np.argsort(splits[by_path], kind="stable")])
