"""Files that hold many images, tars or Parquet files, as one data set: their names and splits.

Reads: names, sizes and times. Writes: nothing.
"""

from __future__ import annotations

import hashlib
import re
import struct
from array import array
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

import numpy as np

from featcache.data.blobs import Blob, LocalFile
from featcache.data.folders import OTHER_ENDING, SHARD_ENDINGS, SPLIT_OF_FOLDER, SPLITS, Ignored
from featcache.data.listing import Listing, compile_glob
from featcache.errors import DataError, printable
from featcache.formatting import count
from featcache.untrusted import reading_hint

KIND_NAMES = {"tar": "tar", "parquet": "Parquet"}
_SPLIT_WORD = re.compile(
    rf"(?:^|[-_.])({'|'.join(sorted(SPLIT_OF_FOLDER, key=len, reverse=True))})\d*(?=[-_.]|$)",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Shard:
    """A file that holds images.

    Args:
        name: Its path below the data, ``/``-separated.
        file: The file.
        split: What its folder or its own name says; "" for nothing.
        is_alone: It is the data itself, no file in a folder: its name is not in the rows' names.
    """

    name: str
    file: Blob
    split: str
    is_alone: bool = False

    def absolute(self) -> Shard:
        """Return it for processes that have another current folder."""
        return replace(self, file=self.file.absolute())

    @property
    def prefix(self) -> str:
        """What the names of its rows begin with."""
        return "" if self.is_alone else self.name + "/"


def kind_of(path: str | Path) -> str:
    """Return ``tar`` or ``parquet`` by the ending of a name; "" for another."""
    return SHARD_ENDINGS.get(PurePosixPath(path).suffix.lower(), "")


def split_of_folders(name: str) -> str:
    """Return the split that a folder above a shard speaks of; "" for none."""
    found = (SPLIT_OF_FOLDER.get(part.casefold()) for part in PurePosixPath(name).parts[:-1])
    return next(filter(None, found), "")


def split_of_name(name: str) -> str:
    """Return the split that a shard's path speaks of: ``train/0.tar``, ``val-00001-of-00002.tar``.

    A folder goes before the name, and of several words in a name the first is taken if the name
    begins with it; else they must agree. Returns "" for none.
    """
    if split := split_of_folders(name):
        return split
    stem = PurePosixPath(name).stem
    words = [(m.start(), SPLIT_OF_FOLDER[m[1].casefold()]) for m in _SPLIT_WORD.finditer(stem)]
    if words and words[0][0] == 0:
        return words[0][1]
    splits = {split for _, split in words}
    return splits.pop() if len(splits) == 1 else ""


def describe_kinds(names: Iterable[str]) -> str:
    """Return how many tars and Parquet files there are: ``2 tar files and 1 Parquet file``."""
    kinds = Counter(kind_of(name) for name in names)
    return " and ".join(count(kinds[kind], f"{KIND_NAMES[kind]} file") for kind in sorted(kinds))


def list_shards(
    root: Path, names: Iterable[str], listing: Listing, ignored: Ignored,
    files: Mapping[str, Blob] | None = None,
) -> tuple[list[Shard], list[str]]:  # fmt: skip
    """Return shards, sorted by name, and those that are left out unread.

    Parquet files beside tars of the same name, as img2dataset writes them, are no shards.

    Args:
        root: A folder.
        names: Paths of the shards below it.
        listing: Whose globs leave out shards too.
        ignored: What is not used; updated.
        files: Of each name the file, where it is none of the folder.

    Raises:
        DataError: If one cannot be read, or there are tars and other Parquet files.
    """
    patterns = [compile_glob(glob) for glob in listing.exclude]
    left_out: list[str] = []
    taken: list[str] = []
    for name in sorted(names):
        is_left_out = any(pattern.fullmatch(name) for pattern in patterns)
        (left_out if is_left_out else taken).append(name)
    tars = [name for name in taken if kind_of(name) == "tar"]
    if tars:
        stems = {name.rpartition(".")[0] for name in tars}
        if any(name.rpartition(".")[0] not in stems for name in taken):
            raise DataError(
                "data", expected="tar files or Parquet files", found=describe_kinds(taken),
                where=root, hint="Name a folder of one kind, or leave some out with --exclude",
            )  # fmt: skip
        for name in {*taken} - {*tars}:
            ignored.add(OTHER_ENDING, name)
        taken = tars
    ignored.update("--exclude" for _ in left_out)
    blobs = files or {name: open_shard(root / name) for name in taken}
    return [Shard(name, blobs[name], split_of_name(name)) for name in taken], left_out


def drop_used_globs(listing: Listing, left_out: Sequence[str], names: Sequence[str]) -> Listing:
    """Return a listing without the globs that left out shards and match no image besides.

    Those would be said to match nothing.
    """

    def is_used_up(glob: str) -> bool:
        pattern = compile_glob(glob)
        return any(map(pattern.fullmatch, left_out)) and not any(map(pattern.fullmatch, names))

    if not left_out:
        return listing
    return replace(listing, exclude=tuple(g for g in listing.exclude if not is_used_up(g)))


def open_shard(path: Path) -> LocalFile:
    """Return a file that holds images.

    Raises:
        DataError: If it cannot be read.
    """
    try:
        return LocalFile.of(path)
    except OSError as error:
        raise DataError(
            "data", expected="a readable file", found=error.strerror or error, where=path,
            hint=reading_hint(error, ""),
        ) from error  # fmt: skip


class PathIndex:
    """Path of an image -> its number. 20 bytes an image; a dict takes 110 and the path.

    Instead of paths it has hashes of them, of 16 bytes: as with sha256, no two are ever equal.

    Args:
        paths: Of each image.
    """

    def __init__(self, paths: Iterable[str] = ()) -> None:
        hashes = np.fromiter(map(_hash, paths), "S16").view(np.uint64).reshape(-1, 2)
        order = np.lexsort((hashes[:, 1], hashes[:, 0]))
        self._first = array("Q", hashes[order, 0].tobytes())
        self._second = array("Q", hashes[order, 1].tobytes())
        self._numbers = array("i", order.astype(np.int32).tobytes())

    def __getitem__(self, path: str) -> int:
        first, second = struct.unpack("=QQ", _hash(path))
        place = bisect_left(self._first, first)
        while place < len(self._first) and self._first[place] == first:
            if self._second[place] == second:
                return self._numbers[place]
            place += 1
        raise KeyError(path)

    def repeated(self, paths: Sequence[str]) -> set[str]:
        """Return which of the paths several images have."""
        first, second = np.frombuffer(self._first, "Q"), np.frombuffer(self._second, "Q")
        again = np.flatnonzero((first[1:] == first[:-1]) & (second[1:] == second[:-1]))
        return {paths[self._numbers[place]] for place in again.tolist()}


def _hash(path: str) -> bytes:
    return hashlib.blake2b(path.encode("utf-8", "surrogateescape"), digest_size=16).digest()


def stamped(mtime_ns: int, place: bytes, file: Blob) -> int:
    """Return a time whose digits below the second change with a place in a file and with the file.

    Args:
        mtime_ns: The time.
        place: Says where in the file something is.
        file: Its size and time are what it changes with.
    """
    facts = place + struct.pack("<qQ", file.num_bytes, file.mtime_ns % 2**64)
    digest = hashlib.blake2b(facts, digest_size=8).digest()
    return mtime_ns // 10**9 * 10**9 + int.from_bytes(digest, "little") % 10**9


def agree_on_splits(splits: Sequence[str], names: Sequence[str], where: Path) -> list[str]:
    """Return the split of each of some images, ``all`` where nothing speaks of one.

    Args:
        splits: Of each image, "" where none is known.
        names: Of each image, for messages.
        where: Only for messages.

    Raises:
        DataError: If some have a split and others have none, or a split has another name.
    """
    present = set(splits)
    if unknown := sorted(present - {*SPLITS, ""}):
        found = ", ".join(map(repr, unknown[:3]))
        raise DataError("splits", expected="train, valid or test", found=found, where=where)
    if present <= {""}:
        return ["all"] * len(splits)
    if "" in present:
        named = next(name for name, split in zip(names, splits, strict=True) if split)
        bare = next(name for name, split in zip(names, splits, strict=True) if not split)
        raise DataError(
            "splits", expected="a split for every image, or for none",
            found=f"one for {printable(named)}, none for {printable(bare)}", where=where,
            hint="Put the files into folders train, valid and test, or leave some out with "
            "--exclude",
        )  # fmt: skip
    return list(splits)
