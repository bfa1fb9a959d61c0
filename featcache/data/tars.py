"""Images in tars: WebDataset's samples with their labels beside them, or packed class folders.

Where images have labels beside them (see ``tar_labels``), those are the classes; else folders in
the tars are, as they are in a zip; and where there are none either, the names of the tars may be.

Reads: tars, in place. Writes: nothing.
"""

from __future__ import annotations

import functools
import struct
import sys
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path, PurePosixPath

from featcache.data.arrangement import arrange, top_folder
from featcache.data.blobs import read_at
from featcache.data.columns import Texts, as_int64, make_sample, sort_samples
from featcache.data.folders import (
    SPLIT_OF_FOLDER,
    Ignored,
    ImageFile,
    agree_on_classes,
    has_image_ending,
    is_hidden,
)
from featcache.data.listing import Listing
from featcache.data.samples import MAX_IMAGE_BYTES, ImageDataset, number_classes
from featcache.data.shards import (
    PathIndex,
    Shard,
    agree_on_splits,
    drop_used_globs,
    split_of_folders,
    stamped,
)
from featcache.data.tar import TarEntry, list_tar
from featcache.data.tar_labels import TarLabels
from featcache.errors import ConfigError, DataError, printable
from featcache.untrusted import reading_hint

_NOT_USED = {"link": "link", "sparse": "sparse file", "other": "not a regular file"}


@dataclass
class TarStore:
    """Reads images of tars, each by one read at its offset. Picklable; keeps nothing open.

    40 bytes an image.

    Args:
        shards: The tars.
        shard_of: Number of the tar of each image.
        offsets: Where its bytes begin.
        sizes: How many they are.
        numbers: Path of an image -> its number in the arrays.
    """

    shards: Sequence[Shard]
    shard_of: array[int] = field(default_factory=lambda: array("i"))
    offsets: array[int] = field(default_factory=lambda: array("q"))
    sizes: array[int] = field(default_factory=lambda: array("q"))
    numbers: PathIndex = field(default_factory=PathIndex)

    def read(self, path: str) -> bytes:
        """Return the bytes of an image: see ``samples.Store``."""
        number = self.numbers[path]
        file = self.shards[self.shard_of[number]].file
        return file.read(self.offsets[number], self.sizes[number])

    def place_of(self, path: str) -> tuple[int, int]:
        """Return the number of its tar, and its offset there."""
        number = self.numbers[path]
        return self.shard_of[number], self.offsets[number]

    def path_inside(self, path: str) -> str:
        """Return the path of the member."""
        return path[len(self.shards[self.shard_of[self.numbers[path]]].prefix) :]


class _Scan:
    """A scan of tars, and its images: columns, as a million tuples take 0.3 GB more.

    Args:
        root: The tar, or the folder of tars.
        shards: The tars.
        listing: Which images are taken, and what has their labels.
        ignored: What is not used; updated.
    """

    def __init__(
        self, root: Path, shards: Sequence[Shard], listing: Listing, ignored: Ignored
    ) -> None:
        self.root, self.shards, self.listing, self.ignored = root, shards, listing, ignored
        self.labels = TarLabels(root, listing, ignored)
        self.folders: list[set[str]] = [set() for _ in shards]
        self.store = TarStore([shard.absolute() for shard in shards])
        self.names = Texts()  # of each image
        self.times = array("q")  # of each image
        self.skip = 0

    def list_all(self, left_out: Sequence[str]) -> None:
        """List the images of all tars, and name them."""
        for number in range(len(self.shards)):
            self._list(number)
        every = set[str]().union(*self.folders)
        prefixes = [len(shard.prefix) for shard in self.shards]
        inside = zip(self.names, self.store.shard_of, strict=True)
        self.skip = len(top_folder(every, (name[prefixes[n] :] for name, n in inside)))
        if self.skip and self.shards[0].is_alone:  # then there is one
            self.names = Texts(name[self.skip :] for name in self.names)
        self.listing = drop_used_globs(self.listing, left_out, self.names)

    def _list(self, number: int) -> None:
        """List the images of one tar with their labels; count what is not used."""
        shard, store = self.shards[number], self.store
        where = shard.file.place
        try:
            with shard.file.open() as file:
                read = partial(read_at, file)
                entries = list(list_tar(read, shard.file.num_bytes, where))
                images, others = _sort_out(entries, where, self.folders[number], self.ignored)
                self.labels.read_tar(read, [path for path, _ in images], others, where)
        except (OSError, ValueError) as error:
            hint = reading_hint(error, "") if isinstance(error, OSError) else ""
            raise DataError(
                "tar", expected="a readable file", where=where, hint=hint,
                found=getattr(error, "strerror", None) or error,
            ) from error  # fmt: skip
        for path, entry in images:
            self.names.append(shard.prefix + path)
            self.times.append(as_int64(_stamp(entry, shard)))
            store.shard_of.append(number)
            store.offsets.append(entry.offset)
            store.sizes.append(entry.num_bytes)

    def _inside(self, number: int) -> str:
        """Return the path of an image in its tar, without the top folder."""
        shard = self.shards[self.store.shard_of[number]]
        return self.names[number][0 if shard.is_alone else len(shard.prefix) + self.skip :]

    def _image_file(self, number: int) -> ImageFile:
        return ImageFile(self.names[number], self.store.sizes[number], self.times[number])

    def __iter__(self) -> Iterator[ImageFile]:
        return map(ImageFile, self.names, self.store.sizes, self.times)

    def label(self, sources: Mapping[str, str]) -> ImageDataset:
        """Return the images with the classes, splits and groups of the files beside them."""
        reasons = self.listing.choose(self.names, self.root)
        self.ignored.update(reason for reason in reasons if reason)
        kept = [number for number, reason in enumerate(reasons) if not reason]
        of_images = self.labels.of_images
        splits = agree_on_splits(
            [self._split_of(number, sources.get("split")) for number in kept],
            [self.names[number] for number in kept], self.root,
        )  # fmt: skip
        labels = [of_images[number].get(sources.get("target", ""), "") for number in kept]
        classes_by_split: dict[str, set[str]] = {}
        for split, label in zip(splits, labels, strict=True):
            if label:
                classes_by_split.setdefault(split, set()).add(label)
        classes = agree_on_classes(classes_by_split, self.root)
        targets = number_classes(classes)
        groups = [of_images[number].get(sources.get("group", ""), "") for number in kept]
        has_groups = any(groups)
        samples = (
            make_sample(
                self._image_file(number), targets[label], split,
                (group or self.names[number]) if has_groups else None,
            )
            for number, split, label, group in zip(kept, splits, labels, groups, strict=True)
        )  # fmt: skip
        source = sources.get("target", "")
        described = f"key {source[5:]!r} of the JSON" if source[:5] == "json " else f".{source}"
        return ImageDataset(
            self.root, "tar", classes, sort_samples(samples), dict(self.ignored),
            ignored_endings=dict(self.ignored.endings),
            notes=(f"classes: {described} beside each image",) if source else (),
        )  # fmt: skip

    def _split_of(self, number: int, source: str | None) -> str:
        if source is not None:
            text = self.labels.of_images[number].get(source, "")
            return SPLIT_OF_FOLDER.get(text.casefold(), text)
        top, slash, _ = self._inside(number).partition("/")
        own = SPLIT_OF_FOLDER.get(top.casefold(), "") if slash else ""
        return own or self.shards[self.store.shard_of[number]].split

    def arrange(self) -> ImageDataset:
        """Return the images with the classes of the folders in the tars, and the tars' splits."""
        skip, shards = self.skip, self.shards
        inside = [{name[skip:] for name in of_tar if len(name) > skip} for of_tar in self.folders]
        tops = {name.casefold() for name in set[str]().union(*inside)}
        starts, notes = [""] * len(shards), tuple[str, ...]()
        if SPLIT_OF_FOLDER.keys().isdisjoint(tops):
            used = sorted(set(self.store.shard_of))
            found = agree_on_splits(
                [shards[n].split for n in used], [shards[n].name for n in used], self.root
            )
            for number, split in zip(used, found, strict=True):
                starts[number] = "" if split == "all" else split + "/"
            if not (tops or self.labels.are_beside or self.listing.no_classes):
                classes, notes = _classes_of_names([shards[n] for n in used])
                for number, name in zip(used, classes, strict=False):
                    starts[number] += name + "/"
        every = {
            (start + name).rstrip("/")
            for start, of_tar in zip(starts, inside, strict=True)
            for name in ({""} | of_tar if start else of_tar)
        }
        every |= {start.partition("/")[0] for start in starts if start}
        folders = []
        for number, shard in enumerate(self.store.shard_of):
            folder = self._inside(number).rpartition("/")[0]
            folders.append(sys.intern((starts[shard] + folder).rstrip("/")))  # there are few
        dataset = arrange(
            self.root, self, every, self.ignored, self.listing, folders_of=folders
        )  # fmt: skip
        return replace(dataset, notes=notes)


def _classes_of_names(shards: Sequence[Shard]) -> tuple[list[str], tuple[str, ...]]:
    """Return the class of each of some tars by its name, if names are classes; and what to say.

    ``covid.tar`` and ``normal.tar`` are classes, where nothing in them is one. ``00000.tar`` and
    ``00001.tar`` are not: shards of one collection differ by their numbers alone.
    """
    stems = [PurePosixPath(shard.name).stem for shard in shards]
    if len(set(stems)) < 2:
        return [], ()
    named = zip(shards, stems, strict=True)
    words = {(shard.split, _without_digits(stem)) for shard, stem in named}
    is_of_folders = all(shard.split == split_of_folders(shard.name) for shard in shards)
    if len(words) < len(shards) or not is_of_folders:
        note = (
            "unlabelled: there are no folders and no labels in the tars. If each tar is a class, "
            "pack its folder: tar -cf CLASS.tar CLASS"
        )
        return [], (note,)
    note = "classes: the names of the tars, as nothing in them is one (--no-classes: they are none)"
    return stems, (note,)


def _without_digits(text: str) -> str:
    return "".join(letter for letter in text.casefold() if letter.isalpha())


def scan_tars(
    root: Path, shards: Sequence[Shard], listing: Listing, ignored: Ignored,
    left_out: Sequence[str] = (),
) -> ImageDataset:  # fmt: skip
    """Return the images of tars. See ``dataset.scan``.

    Args:
        root: The tar, or the folder of tars.
        shards: The tars.
        listing: Which images are taken, and what has their labels: ``columns`` of target, split
            and group name an ending (``txt``) or a key of the JSON beside an image.
        ignored: What is not used; updated.
        left_out: Tars that a glob left out.

    Raises:
        DataError: If a tar is damaged or cut off, or classes or splits are inconsistent.
    """
    if others := sorted(dict(listing.columns).keys() - {"target", "split", "group"}):
        raise ConfigError(
            "--columns", expected="target, split or group, for a tar", found=", ".join(others)
        )
    scan = _Scan(root, shards, listing, ignored)
    scan.list_all(left_out)
    sources = scan.labels.find_sources()
    dataset = scan.label(sources) if sources else scan.arrange()
    scan.store.numbers = PathIndex(scan.names)
    repeated = scan.store.numbers.repeated(scan.names)
    if path := next((p for p in dataset.samples.paths if p in repeated), None):
        raise DataError(
            "tar member", expected="every name once", found="it twice",
            where=f"{printable(root)}: {printable(path)}",
        )  # fmt: skip
    return replace(dataset, layout="tar", _store=scan.store)


def _stamp(entry: TarEntry, shard: Shard) -> int:
    """Return a member's time whose digits below the second change with its place and its tar's.

    A tar has no checksums of its members. So, as of a file in a folder, an equal size and time
    prove that nothing was written there since: the tar itself must be unchanged for that. One that
    was written anew has its images hashed, and none run that are known.
    """
    place = struct.pack("<qqq", entry.offset, entry.num_bytes, entry.mtime_ns % 2**63)
    return stamped(entry.mtime_ns, place, shard.file)


def _sort_out(
    entries: Iterable[TarEntry], where: str, folders: set[str], ignored: Ignored
) -> tuple[list[tuple[str, TarEntry]], list[TarEntry]]:
    """Return the images among the members, by path, and other files.

    Adds the folders, and counts what is not used.
    """
    images: list[tuple[str, TarEntry]] = []
    others: list[TarEntry] = []
    by_path: dict[str, TarEntry] | None = None

    @functools.cache
    def is_in_hidden(folder: str) -> bool:
        """Whether a folder is not used; adds it otherwise, and those above it."""
        parts = folder.split("/")
        if any(map(is_hidden, parts)):
            return True
        folders.update("/".join(parts[:n]) for n in range(1, len(parts) + 1) if folder)
        return False

    for entry in entries:
        folder, _, name = entry.path.rpartition("/")
        if is_hidden(name) or is_in_hidden(folder):
            ignored["hidden"] += 1
            continue
        if entry.kind == "folder":
            is_in_hidden(entry.path)  # adds it
        elif entry.kind in _NOT_USED:
            ignored[_NOT_USED[entry.kind]] += 1
        elif not has_image_ending(name):
            others.append(entry)
        else:
            image: TarEntry | None = entry
            if entry.kind == "hard link":  # to a member before it, whose bytes it has
                if by_path is None:
                    by_path = {e.path: e for e in entries if e.kind == "file"}
                image = by_path.get(entry.target)
            if image is None:
                ignored["link to nothing"] += 1
                continue
            if image.num_bytes > MAX_IMAGE_BYTES:
                raise DataError(
                    "tar member", expected=f"at most {MAX_IMAGE_BYTES:,} bytes",
                    found=f"{image.num_bytes:,}", where=f"{where}: {printable(entry.path)}",
                )  # fmt: skip
            images.append((entry.path, image))
    return images, others
