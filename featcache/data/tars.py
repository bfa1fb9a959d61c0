"""Images in tars: WebDataset's samples with their labels beside them, or packed class folders.

Files of one sample share their path up to the first dot: ``0001.jpg``, ``0001.cls``. Where images
have such labels, those are the classes; else folders in the tars are, as they are in a zip.

Reads: tars, in place. Writes: nothing.
"""

from __future__ import annotations

import hashlib
import struct
from array import array
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

from featcache.data.arrangement import arrange, top_folder
from featcache.data.blobs import ReadAt, read_at
from featcache.data.folders import (
    OTHER_ENDING,
    SPLIT_OF_FOLDER,
    Ignored,
    ImageFile,
    agree_on_classes,
    has_image_ending,
    is_hidden,
)
from featcache.data.listing import Listing
from featcache.data.samples import (
    MAX_IMAGE_BYTES,
    ImageDataset,
    make_sample,
    number_classes,
    sort_samples,
)
from featcache.data.shards import Shard, agree_on_splits, drop_used_globs
from featcache.data.tar import TarEntry, list_tar
from featcache.errors import ConfigError, DataError, printable
from featcache.untrusted import parse_json_object, reading_hint

_JSON_KEYS = ("cls", "label", "class")  # of a class, the first that any image has
_MAX_LABEL_BYTES = 1 << 20
_MAX_CAPTION = 64  # a longer text is no class
_BAD_JSON = "JSON that cannot be read"
_NOT_USED = {"link": "link", "sparse": "sparse file", "other": "not a regular file"}
_CAPTION = "\n"  # in place of a text that is no class


@dataclass
class TarStore:
    """Reads images of tars, each by one read at its offset. Picklable; keeps nothing open.

    17 bytes an image, and an entry of a dict whose keys are the samples' own paths.

    Args:
        shards: The tars.
        numbers: Path of an image -> its number in the arrays.
        shard_of: Number of the tar of each image.
        offsets: Where its bytes begin.
        sizes: How many they are.
    """

    shards: Sequence[Shard]
    numbers: dict[str, int] = field(default_factory=dict)
    shard_of: array[int] = field(default_factory=lambda: array("l"))
    offsets: array[int] = field(default_factory=lambda: array("q"))
    sizes: array[int] = field(default_factory=lambda: array("q"))

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


class _Image(NamedTuple):
    """An image of a tar, and what is beside it."""

    shard: int
    path: str
    offset: int
    num_bytes: int
    mtime_ns: int
    labels: dict[str, str]


class _Scan:
    """A scan of tars.

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
        self.columns = dict(listing.columns)
        self.beside: Counter[str] = Counter()
        self._labels: dict[tuple[tuple[str, str], ...], dict[str, str]] = {}
        self.folders: list[set[str]] = [set() for _ in shards]
        self.images: list[_Image] = []
        self.names: list[str] = []
        self.skip = 0

    def list_all(self, left_out: Sequence[str]) -> None:
        """List the images of all tars, and name them."""
        for number in range(len(self.shards)):
            self.images += self._list(number)
        every = set[str]().union(*self.folders)
        self.skip = len(top_folder(every, (image.path for image in self.images)))
        for image in self.images:
            shard = self.shards[image.shard]
            self.names.append(shard.prefix + image.path[self.skip * shard.is_alone :])
        self.listing = drop_used_globs(self.listing, left_out, self.names)

    def _list(self, number: int) -> list[_Image]:
        """Return the images of one tar with their labels; count what is not used."""
        shard = self.shards[number]
        where = shard.file.place
        try:
            with shard.file.open() as file:
                read = partial(read_at, file)
                entries = list(list_tar(read, shard.file.num_bytes, where))
                images = _sort_out(entries, where, self.folders[number], self.ignored)
                beside = _files_beside(entries, images)
                wanted = self._wanted_endings(beside)
                labels = [
                    self._read_labels(read, beside.get(_key(image.path), {}), wanted)
                    for image in images
                ]
        except (OSError, ValueError) as error:
            hint = reading_hint(error, "") if isinstance(error, OSError) else ""
            raise DataError(
                "tar", expected="a readable file", where=where, hint=hint,
                found=getattr(error, "strerror", None) or error,
            ) from error  # fmt: skip
        used = {_key(image.path) for image in images}
        for entry in entries:
            name = entry.path.rpartition("/")[2]
            is_other = entry.kind in {"file", "hard link"} and not has_image_ending(name)
            if is_other and not any(map(is_hidden, entry.path.split("/"))):
                key = _key(entry.path)
                ending = entry.path[len(key) + 1 :].lower()
                if ending in wanted and key in used:
                    self.beside[ending] += 1  # whether it is used is not known yet
                else:
                    self.ignored.add(OTHER_ENDING, entry.path)
        stamp = struct.pack("<qQ", shard.file.num_bytes, shard.file.mtime_ns % 2**64)
        return [
            _Image(number, e.path, e.offset, e.num_bytes, _stamp(e, stamp), of_image)
            for e, of_image in zip(images, labels, strict=True)
        ]

    def _wanted_endings(self, beside: Mapping[str, Mapping[str, TarEntry]]) -> set[str]:
        """Return the endings of files beside images that have to be read."""
        endings = {ending for files in beside.values() for ending in files}
        given = {value.removeprefix(".").lower() for value in self.columns.values()}
        wanted = given & endings
        if len(wanted) < len(self.columns):  # keys of the JSON
            wanted |= {"json"} & endings
        if "target" in self.columns or self.listing.no_classes:
            return wanted
        if "cls" in endings:
            return wanted | {"cls"}
        return wanted | ({"json", "txt"} & endings)

    def _read_labels(
        self, read: ReadAt, files: Mapping[str, TarEntry], wanted: set[str]
    ) -> dict[str, str]:
        """Return what the files beside an image say: ending, or ``json KEY`` -> text."""
        found: dict[str, str] = {}
        given = self.columns.values()
        for ending in sorted(wanted & files.keys()):
            data = read(files[ending].offset, files[ending].num_bytes)
            if ending == "json":
                try:
                    facts = parse_json_object(data)
                except ValueError:
                    self.ignored[_BAD_JSON] += 1
                    continue
                keys = given if "target" in self.columns else (*_JSON_KEYS, *given)
                for key in keys:
                    if (text := _label_text(facts.get(key), files[ending].path)) is not None:
                        found[f"json {key}"] = text
            else:
                text = data.decode("utf-8", "surrogateescape").removeprefix("\ufeff").strip()
                is_caption = ending == "txt" and (len(text) > _MAX_CAPTION or "\n" in text)
                found[ending] = _CAPTION if is_caption and "txt" not in given else text
        # One for all images of a class: a million dicts take a quarter of a gigabyte.
        return self._labels.setdefault(tuple(found.items()), found)

    def choose_labels(self) -> str:
        """Return what has the classes: an ending, ``json KEY``, or "" for nothing.

        Raises:
            DataError: If ``--columns`` names what no image has.
        """
        present = {source for image in self.images for source in image.labels}
        for key, name in self.columns.items():
            if _source(name, present) not in present:
                raise DataError(
                    f"--columns {key}", found=f"{name!r} beside none", where=self.root,
                    expected="an ending, or a key of the JSON, of files beside images",
                )  # fmt: skip
        source = self._find_classes(present)
        used = {source, *(_source(name, present) for name in self.columns.values())}
        for ending in sorted(self.beside.keys() - {name.partition(" ")[0] for name in used}):
            for _ in range(self.beside[ending]):
                self.ignored.add(OTHER_ENDING, f".{ending}" if "." in ending else f"_.{ending}")
        return source

    def _find_classes(self, present: Collection[str]) -> str:
        if self.listing.no_classes:
            return ""
        if "target" in self.columns:
            return _source(self.columns["target"], present)
        for source in ("cls", *(f"json {key}" for key in _JSON_KEYS)):
            if source in present:
                return source
        texts = [image.labels["txt"] for image in self.images if "txt" in image.labels]
        is_classes = texts and _CAPTION not in texts and 2 * len(set(texts)) <= len(texts)
        return "txt" if is_classes else ""

    def label(self, source: str) -> ImageDataset:
        """Return the images with the classes, splits and groups of the files beside them."""
        present = {key for image in self.images for key in image.labels}
        by_key = {key: _source(name, present) for key, name in self.columns.items()}
        reasons = self.listing.choose(self.names, self.root)
        self.ignored.update(reason for reason in reasons if reason)
        every = zip(self.images, self.names, reasons, strict=True)
        kept = [(image, name) for image, name, reason in every if not reason]
        splits = agree_on_splits(
            [self._split_of(image, by_key.get("split")) for image, _ in kept],
            [name for _, name in kept], self.root,
        )  # fmt: skip
        labels = [image.labels.get(source, "") for image, _ in kept]
        classes_by_split: dict[str, set[str]] = {}
        for split, label in zip(splits, labels, strict=True):
            if label:
                classes_by_split.setdefault(split, set()).add(label)
        classes = agree_on_classes(classes_by_split, self.root)
        targets = number_classes(classes)
        groups = [image.labels.get(by_key.get("group", ""), "") for image, _ in kept]
        has_groups = any(groups)
        samples = [
            make_sample(
                ImageFile(name, image.num_bytes, image.mtime_ns), targets[label], split,
                (group or name) if has_groups else None,
            )
            for (image, name), split, label, group in zip(kept, splits, labels, groups, strict=True)
        ]  # fmt: skip
        described = f"key {source[5:]!r} of the JSON" if source[:5] == "json " else f".{source}"
        return ImageDataset(
            self.root, "tar", classes, sort_samples(samples), dict(self.ignored),
            ignored_endings=dict(self.ignored.endings),
            notes=(f"classes: {described} beside each image",) if source else (),
        )  # fmt: skip

    def _split_of(self, image: _Image, source: str | None) -> str:
        if source is not None:
            text = image.labels.get(source, "")
            return SPLIT_OF_FOLDER.get(text.casefold(), text)
        top = image.path[self.skip :].partition("/")[0] if "/" in image.path[self.skip :] else ""
        return SPLIT_OF_FOLDER.get(top.casefold(), "") or self.shards[image.shard].split

    def arrange(self) -> ImageDataset:
        """Return the images with the classes of the folders in the tars, and the tars' splits."""
        skip, shards = self.skip, self.shards
        inside = [{name[skip:] for name in of_tar if len(name) > skip} for of_tar in self.folders]
        starts = [""] * len(shards)
        if SPLIT_OF_FOLDER.keys().isdisjoint(n.casefold() for n in set[str]().union(*inside)):
            used = sorted({image.shard for image in self.images})
            found = agree_on_splits(
                [shards[n].split for n in used], [shards[n].name for n in used], self.root
            )
            for number, split in zip(used, found, strict=True):
                starts[number] = "" if split == "all" else split + "/"
        every = {
            (start + name).rstrip("/")
            for start, of_tar in zip(starts, inside, strict=True)
            for name in ({""} | of_tar if start else of_tar)
        }
        arranged: dict[str, str] = {}
        files = []
        for image, name in zip(self.images, self.names, strict=True):
            folder, slash, last = image.path[skip:].rpartition("/")
            # Images of two tars may have one name: the folder of a tar, below that of the class,
            # tells them apart. It is none of ``every``, so it is no class.
            path = f"{starts[image.shard]}{folder}{slash}{image.shard}:/{last}"
            files.append(ImageFile(path, image.num_bytes, image.mtime_ns))
            arranged[path] = name
        return arrange(self.root, files, every, self.ignored, self.listing, names=arranged)


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
    source = scan.choose_labels()
    dataset = scan.label(source) if source or scan.columns else scan.arrange()
    store = TarStore([shard.absolute() for shard in shards])
    kept = {sample.path: sample.path for sample in dataset.samples}
    for image, name in zip(scan.images, scan.names, strict=True):
        if (path := kept.get(name)) is None:
            continue
        if path in store.numbers:
            raise DataError(
                "tar member", expected="every name once", found="it twice",
                where=f"{root}: {printable(path)}",
            )  # fmt: skip
        store.numbers[path] = len(store.sizes)  # by the sample's own text: kept once
        store.shard_of.append(image.shard)
        store.offsets.append(image.offset)
        store.sizes.append(image.num_bytes)
    return replace(dataset, layout="tar", _store=store)


def _stamp(entry: TarEntry, stamp: bytes) -> int:
    """Return a member's time whose digits below the second change with its place and its tar's.

    A tar has no checksums of its members. So, as of a file in a folder, an equal size and time
    prove that nothing was written there since: the tar itself must be unchanged for that. One that
    was written anew has its images hashed, and none run that are known.
    """
    place = struct.pack("<qqq", entry.offset, entry.num_bytes, entry.mtime_ns % 2**63) + stamp
    digest = hashlib.blake2b(place, digest_size=8).digest()
    return entry.mtime_ns // 10**9 * 10**9 + int.from_bytes(digest, "little") % 10**9


def _sort_out(
    entries: Sequence[TarEntry], where: str, folders: set[str], ignored: Ignored
) -> list[TarEntry]:
    """Return the images among the members; add the folders, and count what is not used."""
    images: list[TarEntry] = []
    by_path: dict[str, TarEntry] | None = None
    for entry in entries:
        parts = entry.path.split("/")
        if any(map(is_hidden, parts)):
            ignored["hidden"] += 1
            continue
        is_folder = entry.kind == "folder"
        folders.update("/".join(parts[:n]) for n in range(1, len(parts) + is_folder))
        if entry.kind in _NOT_USED:
            ignored[_NOT_USED[entry.kind]] += 1
        if is_folder or entry.kind in _NOT_USED or not has_image_ending(parts[-1]):
            continue
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
        images.append(image._replace(path=entry.path))
    return images


# ------------------------------------------------------------------------------------------ labels


def _key(path: str) -> str:
    """Return the path of a file up to the first dot of its name: WebDataset's key."""
    folder, slash, name = path.rpartition("/")
    return folder + slash + name.partition(".")[0]


def _files_beside(
    entries: Sequence[TarEntry], images: Sequence[TarEntry]
) -> dict[str, dict[str, TarEntry]]:
    """Return key of an image -> ending -> small file of that key."""
    beside: dict[str, dict[str, TarEntry]] = {_key(image.path): {} for image in images}
    for entry in entries:
        if entry.kind != "file" or entry.num_bytes > _MAX_LABEL_BYTES:
            continue
        key = _key(entry.path)
        if key in beside and not has_image_ending(entry.path):
            beside[key][entry.path[len(key) + 1 :].lower()] = entry
    return beside


def _label_text(value: object, path: str) -> str | None:
    """Return a label of a JSON as text; None if there is none.

    Raises:
        DataError: If it is no text and no whole number.
    """
    if value is None:
        return None
    if isinstance(value, str):
        return value.strip()
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    raise DataError(
        "label in JSON", expected="a text or a whole number", found=f"{value!r:.60}",
        where=printable(path), hint="Say which key has the class: --columns target=KEY",
    )  # fmt: skip


def _source(name: str, present: Collection[str]) -> str:
    ending = name.removeprefix(".").lower()
    return ending if ending in present else f"json {name}"
