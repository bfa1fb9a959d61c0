"""The samples of a data set: what ``scan`` returns, and what reads their files.

Reads: image files; those in zips, tars and Parquet by their stores. Writes: nothing.
"""

from __future__ import annotations

import itertools
from array import array
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np

from featcache.data import dicom_files
from featcache.data.columns import Sample, Samples
from featcache.data.dicom_files import DicomFacts
from featcache.data.folders import IMAGE_SUFFIXES, OTHER_ENDING, SPLITS
from featcache.data.remote import RemoteFile, url_of
from featcache.data.stored_files import RemoteStore
from featcache.errors import DataError, printable
from featcache.files import read_regular
from featcache.formatting import brief_repr

UNLABELLED = -1
"""The target of a sample whose class is not known."""

UNKNOWN = -1
"""Stands among several targets of a sample where the answer is not known."""

MAX_IMAGE_BYTES = 2**31
"""Larger files are refused. The largest image allowed, 2**28 pixels of 4 bytes, is half of it."""

_NUM_LOOKED_AT = 8


class Store(Protocol):
    """Reads images that are no files of their own: in a zip, in tars, in Parquet. Picklable."""

    def read(self, path: str) -> bytes:
        """Return the bytes of an image.

        Raises:
            OSError: If they cannot be read.
            ValueError: If they are not what was scanned.
            KeyError: If there is no such image.
        """

    def place_of(self, path: str) -> tuple[int, int]:
        """Return what images are sorted by to be read one after another."""

    def path_inside(self, path: str) -> str:
        """Return the path in the folders that were packed, without the name of a tar."""


@dataclass(frozen=True)
class ImageDataset:
    """The samples of a data set, sorted by split and by the bytes of their path. Picklable.

    Args:
        root: What it was scanned from: a folder, CSV, zip, tar or Parquet file.
        layout: ``splits``, ``classes``, ``images``, ``csv``, ``zip``, ``tar`` or ``parquet``.
        classes: Class names, sorted as strings; empty when nothing is labelled.
        samples: All samples.
        num_ignored: Reason -> number of files and folders that were not used.
        grouped: Class or ``unlabelled`` -> samples that ``group_by`` matched; None without it.
        ignored_endings: Ending -> number of files that were not used for it.
        ignored_columns: Headers of a CSV that were not used.
        num_found_by_name: How many files a CSV gives by their name alone, from folders below it.
        task: ``multiclass``, or ``multilabel``: several labels per image.
        notes: Where the classes come from, and what was made of labels and splits, in lines for
            people.
        are_groups_joined: Whether the groups are images with their companions, and no more.
        files: Path of a sample -> that of its file, where they differ: hashed ones.
        dicom: What the headers of its DICOM files say, where they were read.
        copies: Paths of DICOM files that share their SOPInstanceUID with others.
    """

    __repr__ = brief_repr

    root: Path
    layout: str
    classes: tuple[str, ...]
    samples: Samples
    num_ignored: dict[str, int] = field(default_factory=dict)
    grouped: dict[str, int] | None = None
    ignored_endings: dict[str, int] = field(default_factory=dict)
    ignored_columns: tuple[str, ...] = ()
    num_found_by_name: int = 0
    task: str = "multiclass"
    notes: tuple[str, ...] = ()
    are_groups_joined: bool = False
    files: dict[str, str] = field(default_factory=dict, repr=False)
    dicom: DicomFacts | None = None
    copies: frozenset[str] = field(default=frozenset(), repr=False)
    _store: Store | None = field(default=None, repr=False)

    @property
    def num_grouped(self) -> int | None:
        """How many samples ``group_by`` matched; None without it."""
        return None if self.grouped is None else sum(self.grouped.values())

    @cached_property  # used once per image, to choose its views
    def splits(self) -> tuple[str, ...]:
        """The splits that have samples, in the order train, valid, test, all."""
        present = set(self.samples.splits)
        return tuple(name for name in SPLITS if name in present)

    @cached_property
    def has_dicom(self) -> bool:
        """Whether any sample is a DICOM file."""
        return any(map(self.is_dicom, self.samples))

    def is_dicom(self, sample: Sample) -> bool:
        """Return whether a sample is a DICOM file: by its ending, else by its first bytes."""
        name = sample.path.rpartition("/")[2]
        _, dot, ending = name.rpartition(".")
        if dot + ending.lower() in IMAGE_SUFFIXES:
            return False
        if dicom_files.has_dicom_ending(name):
            return True
        path = self.file_of(sample)
        if path is not None:
            return dicom_files.sniff(path)
        return not dot and self._may_unnamed_be_dicom and self.holds_dicom(sample)

    @cached_property
    def _may_unnamed_be_dicom(self) -> bool:
        """Whether, of images in files of many that have no ending, some of the first are DICOM.

        All of them are looked at only then: rows of Parquet files without paths have none.
        """
        unnamed = (s for s in self.samples if "." not in s.path.rpartition("/")[2])
        looked_at = itertools.islice(unnamed, _NUM_LOOKED_AT)
        return dicom_files.is_installed() and any(map(self.holds_dicom, looked_at))

    def holds_dicom(self, sample: Sample) -> bool:
        """Return whether a sample is DICOM by its first bytes, whatever its name."""
        path = self.file_of(sample)
        if path is not None:
            return dicom_files.sniff(path)
        try:
            return dicom_files.is_dicom(self.read(sample))
        except DataError:
            return False

    def file_of(self, sample: Sample) -> Path | None:
        """Return the file of a sample; None of one in an archive, a tar or a Parquet file."""
        if self._store is not None:
            return None
        folder = self.root.parent if self.layout == "csv" else self.root
        return folder / self._stored_path(sample)

    def object_of(self, sample: Sample) -> RemoteFile | None:
        """Return the object of a store that a sample is; None of one in a file of many or here."""
        if not isinstance(self._store, RemoteStore):
            return None
        return self._store.file_of(self._stored_path(sample))

    def _stored_path(self, sample: Sample) -> str:
        return self.files.get(sample.path, sample.path)

    def split(self, name: str) -> Samples:
        """Return the samples of one split.

        Raises:
            DataError: If there is no such split.
        """
        if name not in self.splits:
            expected = "one of " + ", ".join(self.splits)
            raise DataError("split", expected=expected, found=name, where=self.root)
        return self.samples.taken(self.samples.numbers_of(name))

    def class_of(self, sample: Sample) -> str:
        """Return the name of a sample's class; "" if it is unlabelled or has several labels."""
        return self.classes[sample.target] if sample.target != UNLABELLED else ""

    def kind_of(self, sample: Sample) -> str:
        """Return what a sample is counted among: its class, ``unlabelled`` or ``images``.

        ``images`` are all samples of several labels each.
        """
        return "images" if self.task == "multilabel" else self.class_of(sample) or "unlabelled"

    def label_of(self, sample: Sample) -> str:
        """Return what is known of a sample's class or labels, as text to compare and to print."""
        if sample.targets is None:
            return self.class_of(sample)
        return labels_text(self.classes, sample.targets)

    def count(self) -> dict[str, dict[str, int]]:
        """Return split -> class -> number of samples; "unlabelled" comes first, if any.

        Of several labels per image, how many samples have a yes for each class.
        """
        if self.task == "multilabel":
            return {split: self._count_yes(split) for split in self.splits}
        names = {UNLABELLED: "unlabelled"} | dict(enumerate(self.classes))
        counts: dict[str, dict[str, int]] = {split: {} for split in self.splits}
        cells = Counter(zip(self.samples.splits, self.samples.targets, strict=True))
        for (split, target), number in sorted(cells.items()):
            counts[split][names[target]] = counts[split].get(names[target], 0) + number
        return counts

    def _count_yes(self, split: str) -> dict[str, int]:
        alike = Counter(sample.targets or () for sample in self.split(split))
        counts = dict.fromkeys(self.classes, 0)
        for targets, number in alike.items():
            for name, target in zip(self.classes, targets, strict=True):
                counts[name] += number * (target == 1)
        return counts

    def reasons_ignored(self) -> list[tuple[str, int]]:
        """Return why files and folders were not used, with their endings, and how many."""
        endings = {OTHER_ENDING: f"{OTHER_ENDING}: {_listed(self.ignored_endings)}"}
        return [(endings.get(why, why), number) for why, number in sorted(self.num_ignored.items())]

    def reasons_text(self) -> str:
        """Return ``none``, and why files were ignored: for errors about missing images."""
        reasons = [f"{count:,} x {reason}" for reason, count in self.reasons_ignored()]
        return "none" + (f" (ignored: {', '.join(reasons)})" if reasons else "")

    def describe_ignored(self) -> list[str]:
        """Return a line for each reason why files and folders were not used."""
        lines = [f"ignored: {number:,} ({reason})" for reason, number in self.reasons_ignored()]
        if any(dicom_files.has_dicom_ending(ending) for ending in self.ignored_endings):
            lines.append(f"DICOM files are not read without pydicom: {dicom_files.INSTALL}")
        if self.ignored_columns:
            lines.append(f"ignored columns: {', '.join(map(printable, self.ignored_columns))}")
        return lines

    def read(self, sample: Sample) -> bytes:
        """Return the bytes of one image file. Keeps nothing open; safe in threads and processes.

        Raises:
            DataError: If it cannot be read (any more), or is not a regular file (any more).
        """
        try:
            if self._store is not None:
                return self._store.read(self._stored_path(sample))
            path = self.file_of(sample)
            assert path is not None  # without a store there are files
            return read_regular(path, max_bytes=MAX_IMAGE_BYTES)
        except (OSError, ValueError, KeyError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            root = url_of(self.root) or self.root
            if self.files:  # whose names must not be said
                reason = getattr(error, "strerror", None) or "another one"
            raise DataError(
                "image file", expected="the file that was scanned", found=reason,
                where=f"{root}: {sample.path}", hint="Scan again, the data has changed",
            ) from error  # fmt: skip

    def reading_order(self, positions: Iterable[int]) -> Sequence[int]:
        """Return positions of samples in the order in which they are read fastest.

        In tars and Parquet files that is the order in which they lie there: of a Parquet file
        whole pages are read and unpacked, each of them once.
        """
        ordered = array("q", positions)
        if self._store is None:
            return ordered
        paths = map(self.samples.paths.__getitem__, ordered)
        stored = (self.files.get(path, path) for path in paths)
        places = np.fromiter(map(self._store.place_of, stored), [("file", "i8"), ("place", "i8")])
        by_place = np.lexsort((places["place"], places["file"]))
        return array("q", np.frombuffer(ordered, "i8")[by_place].tobytes())

    def in_reading_order(self, samples: Iterable[Sample]) -> list[Sample]:
        """Return samples in that order."""
        store = self._store
        if store is None:
            return list(samples)
        return sorted(samples, key=lambda sample: store.place_of(self._stored_path(sample)))

    def path_inside(self, sample: Sample) -> str:
        """Return a sample's path in the folders that were packed, without the name of a tar."""
        path = self._stored_path(sample)
        return path if self._store is None else self._store.path_inside(path)


def labels_text(classes: Iterable[str], targets: Iterable[float]) -> str:
    """Return several labels as text: ``edema=1, mass=0``, those that are not known left out.

    Args:
        classes: C names.
        targets: C of 1 and 0; anything else, such as NaN, is not known.
    """
    known = zip(classes, targets, strict=True)
    return ", ".join(f"{name}={target:.0f}" for name, target in known if target in {0, 1})


def _listed(endings: Mapping[str, int], most: int = 6) -> str:
    """Return endings with their counts, the most frequent first."""
    ordered = sorted(endings.items(), key=lambda item: (-item[1], item[0]))
    listed = [f"{count:,} {printable(ending)}" for ending, count in ordered[:most]]
    rest = sum(count for _, count in ordered[most:])
    return ", ".join([*listed, f"{rest:,} others"] if rest else listed)


def number_classes(classes: tuple[str, ...]) -> dict[str, int]:
    """Return class -> target; "" -> ``UNLABELLED``."""
    return {name: target for target, name in enumerate(classes)} | {"": UNLABELLED}
