"""Images in tars: WebDataset's samples with their labels beside them, or packed class folders.

Files of one sample share their path up to the first dot: ``0001.jpg``, ``0001.cls``. Where images
have such labels, those are the classes; else folders in the tars are, as they are in a zip.

Reads: tars, in place. Writes: nothing.
"""

from __future__ import annotations

import hashlib
import struct
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
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
from featcache.untrusted import open_regular, parse_json_object, reading_hint

_JSON_KEYS = ("cls", "label", "class")  # of a class, the first that any image has
_MAX_LABEL_BYTES = 1 << 20
_MAX_CAPTION = 64  # a longer text is no class
_TEXT_ENDINGS = {"cls", "txt", "json"}
_BAD_JSON = "JSON that cannot be read"


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
        skip: Characters of the folder that was packed as a whole, of a tar that is alone.
    """

    shards: Sequence[Shard]
    skip: int = 0
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
    columns = dict(listing.columns)
    if others := sorted(columns.keys() - {"target", "split", "group"}):
        raise ConfigError(
            "--columns", expected="target, split or group, for a tar", found=", ".join(others)
        )
    folders: list[set[str]] = []
    images: list[_Image] = []
    for number, shard in enumerate(shards):
        folders.append(set())
        images += _list_images(number, shard, columns, listing, folders[-1], ignored)
    skip = len(top_folder(set().union(*folders), (image.path for image in images)))
    names = [shards[i.shard].prefix + (i.path[skip:] if shards[i.shard].is_alone else i.path)
             for i in images]  # fmt: skip
    listing = drop_used_globs(listing, left_out, names)
    source = "" if listing.no_classes else _choose_labels(images, columns)
    store = TarStore(shards, skip)
    if source or columns:
        dataset = _label(root, shards, images, names, skip, source, listing, ignored)
    else:
        dataset = _arrange(root, shards, images, names, skip, folders, listing, ignored)
    kept = {sample.path: sample.path for sample in dataset.samples}
    for image, name in zip(images, names, strict=True):
        if path := kept.get(name):  # the sample's own text, kept once
            if path in store.numbers:
                raise DataError(
                    "tar member", expected="every name once", found="it twice",
                    where=f"{root}: {printable(path)}",
                )  # fmt: skip
            store.numbers[path] = len(store.sizes)
            store.shard_of.append(image.shard)
            store.offsets.append(image.offset)
            store.sizes.append(image.num_bytes)
    return replace(dataset, layout="tar", _store=store)


def _list_images(
    number: int, shard: Shard, columns: Mapping[str, str], listing: Listing, folders: set[str],
    ignored: Ignored,
) -> list[_Image]:  # fmt: skip
    """Return the images of one tar with their labels; count what is not used."""
    where = str(shard.file.path)
    try:
        with open_regular(shard.file.path) as file:

            def read(offset: int, num_bytes: int) -> bytes:
                return read_at(file, offset, num_bytes)

            entries = list(list_tar(read, shard.file.num_bytes, where))
            images = _sort_out(entries, where, folders, ignored)
            beside = _files_beside(entries, images)
            wanted = _wanted_endings(beside, images, columns, listing)
            labels = [
                _read_labels(read, beside.get(_key(image.path), {}), wanted, columns, ignored)
                for image in images
            ]
    except OSError as error:
        raise DataError(
            "tar", expected="a readable file", found=error.strerror or error, where=where,
            hint=reading_hint(error, ""),
        ) from error  # fmt: skip
    used = {(key, ending) for key in map(_key, (i.path for i in images)) for ending in wanted}
    for entry in entries:
        name = entry.path.rpartition("/")[2]
        is_other = entry.kind in {"file", "hard link"} and not has_image_ending(name)
        if is_other and not any(map(is_hidden, entry.path.split("/"))):
            key = _key(entry.path)
            if (key, entry.path[len(key) + 1 :].lower()) not in used:
                ignored.add(OTHER_ENDING, entry.path)
    stamp = struct.pack("<qq", shard.file.num_bytes, shard.file.mtime_ns)
    return [
        _Image(number, e.path, e.offset, e.num_bytes, _stamp(e, stamp), of_image)
        for e, of_image in zip(images, labels, strict=True)
    ]


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
    """Return the images among the members; a hard link has the bytes of the member it names."""
    images: list[TarEntry] = []
    by_path: dict[str, TarEntry] | None = None
    for entry in entries:
        parts = entry.path.split("/")
        if any(map(is_hidden, parts)):
            ignored["hidden"] += 1
            continue
        is_folder = entry.kind == "folder"
        folders.update("/".join(parts[:n]) for n in range(1, len(parts) + is_folder))
        if is_folder:
            continue
        if entry.kind == "hard link":
            if by_path is None:
                by_path = {e.path: e for e in entries if e.kind == "file"}
            linked = by_path.get(entry.target)
            if linked is None:
                ignored["link to nothing"] += 1
                continue
            entry = linked._replace(path=entry.path)
        if entry.kind != "file":
            reasons = {"link": "link", "sparse": "sparse file in a tar"}
            ignored[reasons.get(entry.kind, "not a regular file")] += 1
        elif has_image_ending(parts[-1]):
            if entry.num_bytes > MAX_IMAGE_BYTES:
                raise DataError(
                    "tar member", expected=f"at most {MAX_IMAGE_BYTES:,} bytes",
                    found=f"{entry.num_bytes:,}", where=f"{where}: {printable(entry.path)}",
                )  # fmt: skip
            images.append(entry)
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


def _wanted_endings(
    beside: Mapping[str, Mapping[str, TarEntry]], images: Sequence[TarEntry],
    columns: Mapping[str, str], listing: Listing,
) -> set[str]:  # fmt: skip
    """Return the endings of files beside images that have to be read."""
    endings = {ending for files in beside.values() for ending in files}
    wanted = {value.removeprefix(".").lower() for value in columns.values()} & endings
    if len(wanted) < len(columns):  # keys of the JSON
        wanted |= {"json"} & endings
    if "target" in columns or listing.no_classes:
        return wanted
    if "cls" in endings:
        return wanted | {"cls"}
    return wanted | ({"json", "txt"} & endings)


def _read_labels(
    read: ReadAt, files: Mapping[str, TarEntry], wanted: set[str], columns: Mapping[str, str],
    ignored: Ignored,
) -> dict[str, str]:  # fmt: skip
    """Return what the files beside an image say: ending, or ``json KEY`` -> text."""
    found: dict[str, str] = {}
    for ending in wanted & files.keys():
        data = read(files[ending].offset, files[ending].num_bytes)
        if ending == "json":
            try:
                facts = parse_json_object(data)
            except ValueError:
                ignored[_BAD_JSON] += 1
                continue
            for key in (*_JSON_KEYS, *columns.values()):
                if (text := _label_text(facts.get(key), files[ending].path)) is not None:
                    found[f"json {key}"] = text
        else:
            text = data.decode("utf-8", "surrogateescape").strip().removeprefix("\ufeff")
            if ending == "txt" and "txt" not in columns.values() and not _is_short(text):
                text = "\n"  # a caption
            found[ending] = text
    return found


def _is_short(text: str) -> bool:
    return len(text) <= _MAX_CAPTION and "\n" not in text


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


def _choose_labels(images: Sequence[_Image], columns: Mapping[str, str]) -> str:
    """Return what has the classes: an ending, ``json KEY``, or "" for nothing.

    Raises:
        DataError: If ``--columns`` names what no image has.
    """
    present = {source for image in images for source in image.labels}
    for key, name in columns.items():
        if not {name.removeprefix(".").lower(), f"json {name}"} & present:
            raise DataError(
                "--columns", expected=f"an ending, or a key of the JSON, beside an image: {key}",
                found=f"{name!r} beside none",
            )  # fmt: skip
    if "target" in columns:
        return _source(columns["target"], present)
    for source in ("cls", *(f"json {key}" for key in _JSON_KEYS)):
        if source in present:
            return source
    texts = [image.labels["txt"] for image in images if "txt" in image.labels]
    is_classes = texts and "\n" not in texts and 2 * len(set(texts)) <= len(texts)
    return "txt" if is_classes else ""


def _source(name: str, present: set[str]) -> str:
    ending = name.removeprefix(".").lower()
    return ending if ending in present else f"json {name}"


def _label(
    root: Path, shards: Sequence[Shard], images: Sequence[_Image], names: Sequence[str], skip: int,
    source: str, listing: Listing, ignored: Ignored,
) -> ImageDataset:  # fmt: skip
    """Return the images with the classes, splits and groups of the files beside them."""
    columns = dict(listing.columns)
    present = {key for image in images for key in image.labels}
    by_key = {key: _source(name, present) for key, name in columns.items()}
    reasons = listing.choose(names, root)
    ignored.update(reason for reason in reasons if reason)
    kept = [
        (image, name)
        for image, name, reason in zip(images, names, reasons, strict=True)
        if not reason
    ]
    splits = agree_on_splits(
        [
            _named_split(image.labels.get(by_key["split"], "")) if "split" in by_key
            else SPLIT_OF_FOLDER.get(image.path[skip:].partition("/")[0].casefold(), "")
            or shards[image.shard].split
            for image, _ in kept
        ],
        [name for _, name in kept], root,
    )  # fmt: skip
    labels = [image.labels.get(source, "") for image, _ in kept]
    classes_by_split: dict[str, set[str]] = {}
    for split, label in zip(splits, labels, strict=True):
        if label:
            classes_by_split.setdefault(split, set()).add(label)
    classes = agree_on_classes(classes_by_split, root)
    targets = number_classes(classes)
    groups = [image.labels.get(by_key.get("group", ""), "") for image, _ in kept]
    samples = [
        make_sample(
            ImageFile(name, image.num_bytes, image.mtime_ns), targets[label], split,
            (group or name) if any(groups) else None,
        )
        for (image, name), split, label, group in zip(kept, splits, labels, groups, strict=True)
    ]  # fmt: skip
    described = f"key {source[5:]!r} of the JSON" if source.startswith("json ") else f".{source}"
    return ImageDataset(
        root, "tar", classes, sort_samples(samples), dict(ignored),
        ignored_endings=dict(ignored.endings),
        labelled_by=f"{described} beside each image" if source else "",
    )  # fmt: skip


def _named_split(text: str) -> str:
    return SPLIT_OF_FOLDER.get(text.casefold(), text)


def _arrange(
    root: Path, shards: Sequence[Shard], images: Sequence[_Image], names: Sequence[str], skip: int,
    folders: Sequence[set[str]], listing: Listing, ignored: Ignored,
) -> ImageDataset:  # fmt: skip
    """Return the images with the classes of the folders in the tars, and the tars' splits."""
    inside = [{name[skip:] for name in of_tar if len(name) > skip} for of_tar in folders]
    starts = [""] * len(shards)
    if SPLIT_OF_FOLDER.keys().isdisjoint(name.casefold() for name in set().union(*inside)):
        used = sorted({image.shard for image in images})
        found = agree_on_splits(
            [shards[n].split for n in used], [shards[n].name for n in used], root
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
    for image, name in zip(images, names, strict=True):
        folder, slash, last = image.path[skip:].rpartition("/")
        # Images of two tars may have one name: the folder of a tar, below that of the class, tells
        # them apart. It is none of ``every``, so it is no class.
        path = f"{starts[image.shard]}{folder}{slash}{image.shard}:/{last}"
        files.append(ImageFile(path, image.num_bytes, image.mtime_ns))
        arranged[path] = name
    return arrange(root, files, every, ignored, listing, arranged)
