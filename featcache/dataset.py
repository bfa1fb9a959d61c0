"""What lies on the disk -> samples, classes, splits and groups. Decides targets, reads no pixels.

Reads: split folders, class folders, folders of images, CSV manifests, zip files of folders (in
place: names never become paths). Writes: nothing.

Taken are regular files of image endings, also through links (``split --mode symlink`` makes
such). Hidden names, system folders, linked folders, other endings, pipes and devices are counted
in ``num_ignored``; so are images lying loose beside class folders, with a warning.
"""

from __future__ import annotations

import calendar
import csv
import io
import os
import re
import stat
import struct
import warnings
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

from featcache.errors import ConfigError, DataError, FeatcacheWarning

UNLABELLED = -1
"""The target of a sample whose class is not known."""

SPLITS = ("train", "valid", "test", "all")
IMAGE_SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".ppm", ".pgm"}
)
MAX_IMAGE_BYTES = 2**31
"""Larger files are no images: 2**28 pixels of four bytes are half of it."""

_SPLIT_OF_FOLDER = {
    "train": "train", "valid": "valid", "val": "valid", "validation": "valid", "test": "test",
}  # fmt: skip
_SPLIT_LOOKALIKES = {"training", "testing", "dev", "eval", "evaluation", "holdout"}
_SYSTEM_FOLDERS = {"__macosx", "__pycache__", "@eadir", "$recycle.bin", "lost+found"}

# Zip members are read in place; these bounds only stop files made to exhaust a machine.
_MAX_ZIP_MEMBERS = 2_000_000
_MAX_ZIP_RATIO = 200  # deflate cannot exceed 1032; a 16-bit TIFF of a black image reaches ~100
_RATIO_FREE_BYTES = 2**24  # members this small may have any ratio
_ZIP_METHODS = {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED}


@dataclass(frozen=True, slots=True)
class Sample:
    """One image: where it is, what it is, which split and group it belongs to.

    Args:
        path: ``/``-separated, relative to the root; of a CSV as written there. Bytes that are not
            UTF-8 are surrogate-escaped.
        target: Index into the classes, or ``UNLABELLED``.
        split: ``train``, ``valid``, ``test`` or ``all``.
        group: What must not be torn apart by a split; None when no groups are known.
        image_bytes: Size of the file.
        mtime_ns: Time of its last change, in ns. (Zip: the member's time, and its CRC in the
            digits below the second, so that a changed member never looks unchanged.)
    """

    path: str
    target: int
    split: str
    group: str | None
    image_bytes: int
    mtime_ns: int


class _Member(NamedTuple):
    """Where the bytes of a zip member lie: enough to read it without the zip's directory."""

    offset: int
    method: int
    packed_bytes: int
    crc: int


class _Image(NamedTuple):
    """A regular file of image ending, not yet a sample."""

    path: str
    image_bytes: int
    mtime_ns: int


@dataclass(frozen=True)
class ImageDataset:
    """The samples of a data set, sorted by split and by the bytes of their path. Picklable.

    Args:
        root: Folder, CSV or zip it was scanned from.
        layout: ``splits``, ``classes``, ``images``, ``csv`` or ``zip``.
        classes: Class names, sorted as strings; empty when nothing is labelled.
        samples: All samples.
        num_ignored: Reason -> number of things seen and not taken.
        num_grouped: How many samples ``group_by`` matched; None without it.
    """

    root: Path
    layout: str
    classes: tuple[str, ...]
    samples: tuple[Sample, ...]
    num_ignored: dict[str, int] = field(default_factory=dict)
    num_grouped: int | None = None
    _members: dict[str, _Member] = field(default_factory=dict, repr=False)

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits there are, in the order train, valid, test, all."""
        present = {sample.split for sample in self.samples}
        return tuple(name for name in SPLITS if name in present)

    def split(self, name: str) -> tuple[Sample, ...]:
        """Return the samples of one split.

        Raises:
            DataError: If there is no such split.
        """
        if name not in self.splits:
            expected = "one of " + ", ".join(self.splits)
            raise DataError("split", expected=expected, found=name, where=self.root)
        return tuple(sample for sample in self.samples if sample.split == name)

    def read(self, sample: Sample) -> bytes:
        """Return the bytes of one image file. Keeps nothing open; safe in threads and processes.

        Raises:
            DataError: If it cannot be read (any more), or is not a regular file (any more).
        """
        try:
            if self.layout == "zip":
                return _read_member(self.root, sample, self._members[sample.path])
            folder = self.root.parent if self.layout == "csv" else self.root
            return _read_file(folder / sample.path)
        except (OSError, ValueError, KeyError, zlib.error, struct.error) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise DataError(
                "image file", expected="the file that was scanned", found=reason,
                where=f"{self.root}: {sample.path}", hint="Scan again, the data has changed",
            ) from error  # fmt: skip


def scan(
    data: str | Path, *, group_by: str | None = None, limit: int | None = None
) -> ImageDataset:
    """Find the images of a data set, their targets, splits and groups.

    Args:
        data: A folder of split folders of class folders; a folder of class folders (split
            ``all``); a folder of images; a ``.csv`` with the columns path and optionally target,
            split, group; a ``.zip`` of such folders (one top folder is skipped).
        group_by: Regular expression searched in every file name; its first group is the sample's
            group. What does not match is its own group. Goes before the group column of a CSV.
        limit: Take at most so many images, spread evenly over splits and classes.

    Raises:
        DataError: If the data is not there, is empty, or its classes and splits contradict.
        ConfigError: If ``group_by`` is no regular expression with a group, or ``limit`` < 1.
    """
    pattern = _compile_group(group_by)
    if limit is not None and limit < 1:
        raise ConfigError("--limit", expected="at least 1", found=limit)
    root = Path(data)
    if root.is_dir():
        dataset = _scan_folder(root)
    elif root.is_file() and root.suffix.lower() == ".csv":
        dataset = _scan_csv(root)
    elif root.is_file() and root.suffix.lower() == ".zip":
        dataset = _scan_zip(root)
    else:
        found = "another kind of file" if root.exists() else "nothing there"
        raise DataError("data", expected="a folder, .csv or .zip", found=found, where=root)
    if not dataset.samples:
        raise DataError(
            "data", expected="at least one image", found=_counts(dataset.num_ignored), where=root,
            hint="Images end in " + ", ".join(sorted(IMAGE_SUFFIXES)),
        )  # fmt: skip
    samples, num_grouped = _spread(dataset.samples, limit), None
    if pattern is not None:
        matches = [_find_group(pattern, sample.path) for sample in samples]
        num_grouped = sum(group is not None for group in matches)
        samples = tuple(
            replace(sample, group=group or sample.path)
            for sample, group in zip(samples, matches, strict=True)
        )
    return replace(dataset, samples=samples, num_grouped=num_grouped)


def list_images(paths: Iterable[str | Path]) -> ImageDataset:
    """Find the images of files and folders (with all folders in them), unlabelled, once each.

    A file named outright is taken whatever its ending. Paths are relative to where we are.

    Raises:
        DataError: If a path leads nowhere, or a folder holds no image.
    """
    ignored: Counter[str] = Counter()
    samples: dict[str, Sample] = {}
    for path in map(Path, paths):
        if path.is_dir():
            prefix = "" if path == Path() else path.as_posix().rstrip("/") + "/"
            images = [i._replace(path=prefix + i.path) for i in _walk(path, ignored, set())]
        elif path.is_file():
            status = path.stat()
            images = [_Image(path.as_posix(), status.st_size, status.st_mtime_ns)]
        else:
            found = "no regular file" if path.exists() else "nothing there"
            raise DataError("image", expected="a file or folder", found=found, where=path)
        if not images:
            raise DataError("folder", expected="images", found=_counts(ignored), where=path)
        samples.update((i.path, _sample(i, UNLABELLED, "all")) for i in images)
    return ImageDataset(Path(), "images", (), _sorted(samples.values()), dict(ignored))


def _scan_folder(root: Path) -> ImageDataset:
    ignored: Counter[str] = Counter()
    folders: set[str] = set()
    images = list(_walk(root, ignored, folders))
    return _arrange(root, images, folders, ignored)


def _walk(root: Path, ignored: Counter[str], folders: set[str]) -> Iterator[_Image]:
    """Yield the images under ``root``, count the rest, add the visible folders."""
    waiting = [""]
    while waiting:
        prefix = waiting.pop()
        try:
            with os.scandir(root / prefix) as entries:
                for entry in entries:
                    reason = _why_not(entry)
                    path = prefix + entry.name
                    if reason == "folder":
                        folders.add(path)
                        waiting.append(path + "/")
                    elif reason:
                        ignored[reason] += 1
                    else:
                        status = entry.stat()
                        yield _Image(path, status.st_size, status.st_mtime_ns)
        except OSError as error:
            raise DataError(
                "folder", expected="a readable one", found=error.strerror, where=root / prefix
            ) from error


def _why_not(entry: os.DirEntry[str]) -> str:
    """Return why this is no image, ``folder`` for a folder to look into, "" for an image."""
    if _is_hidden(entry.name):
        return "hidden"
    if entry.is_dir(follow_symlinks=False):
        return "folder" if _is_utf8(entry.name) else "folder name not UTF-8"
    try:
        if entry.is_symlink() and not stat.S_ISREG(entry.stat().st_mode):
            return "link to a folder" if entry.is_dir() else "link to no regular file"
        if not _has_image_ending(entry.name):
            return "not an image ending"
        if not stat.S_ISREG(entry.stat().st_mode):
            return "not a regular file"
        entry.name.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:  # half a surrogate pair, only on Windows
        return "name not UTF-8"
    except OSError:
        return "link to nothing"
    return ""


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name.casefold() in _SYSTEM_FOLDERS


def _is_utf8(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _has_image_ending(name: str) -> bool:
    _, dot, ending = name.rpartition(".")
    return dot + ending.lower() in IMAGE_SUFFIXES


def _sample(image: _Image, target: int, split: str, group: str | None = None) -> Sample:
    return Sample(image.path, target, split, group, image.image_bytes, image.mtime_ns)


def _sorted(samples: Iterable[Sample]) -> tuple[Sample, ...]:
    def key(sample: Sample) -> tuple[int, bytes]:
        return SPLITS.index(sample.split), sample.path.encode("utf-8", "surrogateescape")

    return tuple(sorted(samples, key=key))


def _spread(samples: tuple[Sample, ...], limit: int | None) -> tuple[Sample, ...]:
    """Return at most ``limit`` samples: the first of every split and class, the second, ..."""
    if limit is None:
        return samples
    seen: Counter[tuple[str, int]] = Counter()
    ranks = []
    for position, sample in enumerate(samples):
        cell = (sample.split, sample.target)
        ranks.append((seen[cell], position))
        seen[cell] += 1
    return tuple(samples[position] for position in sorted(p for _, p in sorted(ranks)[:limit]))


def _counts(num_ignored: dict[str, int]) -> str:
    ignored = ", ".join(f"{count} x {reason}" for reason, count in sorted(num_ignored.items()))
    return "none" + (f" (ignored: {ignored})" if ignored else "")


def _compile_group(group_by: str | None) -> re.Pattern[str] | None:
    if group_by is None:
        return None
    try:
        pattern = re.compile(group_by)
    except re.error as error:
        found = f"{group_by!r}: {error}"
        raise ConfigError("--group-by", expected="a regular expression", found=found) from error
    if pattern.groups < 1:
        raise ConfigError(
            "--group-by", expected="a regular expression with a group in parentheses",
            found=repr(group_by), hint=r"For example '^(\d{8})_'",
        )  # fmt: skip
    return pattern


def _find_group(pattern: re.Pattern[str], path: str) -> str | None:
    """Return the group in the file name; None if nothing, or nothing between the parentheses."""
    match = pattern.search(path.rpartition("/")[2])
    return (match[1] or None) if match else None


def _arrange(
    root: Path, images: list[_Image], folders: set[str], ignored: Counter[str]
) -> ImageDataset:
    """Tell splits and classes from the names of the folders.

    Args:
        root: Only for messages.
        images: All images, their paths relative to the root.
        folders: All visible folders, so that empty ones are noticed too.
        ignored: Counts of what was not taken; loose images are added.
    """
    tops = _split_folders(root, {folder for folder in folders if "/" not in folder})
    classes_of = {
        split: {
            folder[len(prefix) :]
            for folder in folders
            if folder.startswith(prefix) and "/" not in folder[len(prefix) :]
        }
        for prefix, split in tops.items()
    }
    classes = _agreed_classes({s: names for s, names in classes_of.items() if names}, root)
    index = {name: target for target, name in enumerate(classes)}
    samples, num_loose = [], 0
    for image in images:
        top, slash, _ = image.path.partition("/")
        prefix = top + slash if "" not in tops else ""
        name, slash, _ = image.path[len(prefix) :].partition("/")
        split = tops.get(prefix)
        if split is None or (classes_of[split] and not slash):
            num_loose += 1
        else:
            samples.append(_sample(image, index[name] if slash else UNLABELLED, split))
    if num_loose:
        ignored["loose beside folders"] += num_loose
        warnings.warn(
            f"{num_loose} images of {root} lie loose beside folders and are not taken",
            FeatcacheWarning, stacklevel=4,
        )  # fmt: skip
    filled = Counter((sample.split, sample.target) for sample in samples)
    for prefix, split in tops.items():
        empty = [name for name in sorted(classes_of[split]) if not filled[split, index[name]]]
        if empty or (prefix and not classes_of[split] and not filled[split, UNLABELLED]):
            raise DataError(
                "folder", expected="at least one image", found=_counts(ignored),
                where=root / prefix / (empty[0] if empty else ""),
                hint="Remove it, or put its images in",
            )  # fmt: skip
    layout = "splits" if "" not in tops else "classes" if classes else "images"
    return ImageDataset(root, layout, classes, _sorted(samples), dict(ignored))


def _split_folders(root: Path, tops: set[str]) -> dict[str, str]:
    """Return the prefix of every split's paths -> split; {"": "all"} where nothing is split."""
    found: dict[str, str] = {}
    for name in sorted(tops):
        split = _SPLIT_OF_FOLDER.get(name.casefold())
        if split in found.values():
            both = " and ".join([*(f[:-1] for f in found if found[f] == split), name])
            raise DataError("split folders", expected=f"one {split}", found=both, where=root)
        if split:
            found[name + "/"] = split
    others = sorted(name for name in tops if name + "/" not in found)
    lookalikes = [name for name in others if name.casefold() in _SPLIT_LOOKALIKES]
    if (found and others) or (lookalikes and lookalikes == others):
        raise DataError(
            "split folders", expected="train, valid (or val, validation), test and no others",
            found=", ".join(map(repr, others)), where=root,
            hint="Rename or move it; class folders belong into each split",
        )  # fmt: skip
    return found or {"": "all"}


def _agreed_classes(classes_of: dict[str, set[str]], where: Path) -> tuple[str, ...]:
    """Return the classes of all splits, as all splits must have them."""
    classes = tuple(sorted(set().union(*classes_of.values())))
    for name in classes:
        have = [split for split in SPLITS if name in classes_of.get(split, ())]
        lack = [split for split in classes_of if split not in have]
        if lack:
            raise DataError(
                "classes", expected="the same in every split",
                found=f"{name!r} in {' and '.join(have)} but not in {' and '.join(lack)}",
                where=where, hint="Rename or remove the class, or add its images",
            )  # fmt: skip
    plain: dict[str, str] = {}
    for name in classes:
        twin = plain.setdefault(" ".join(name.casefold().split()), name)
        if twin != name:
            raise DataError(
                "classes", expected="names that differ by more than case and blanks",
                found=f"{twin!r} and {name!r}", where=where, hint="Rename or merge them",
            )  # fmt: skip
    return classes


def _scan_csv(root: Path) -> ImageDataset:
    rows = _read_csv(root)
    labels = [row["target"] for row in rows]
    splits = [_SPLIT_OF_FOLDER.get(row["split"].casefold(), row["split"] or "all") for row in rows]
    unknown = sorted(set(splits) - set(SPLITS))
    if unknown:
        found = ", ".join(map(repr, unknown[:3]))
        raise DataError("split column", expected="train, valid or test", found=found, where=root)
    classes_of: dict[str, set[str]] = {}
    for label, split in zip(labels, splits, strict=True):
        if label:
            classes_of.setdefault(split, set()).add(label)
    classes = _agreed_classes(classes_of, root)
    index = {name: target for target, name in enumerate(classes)} | {"": UNLABELLED}
    has_groups = any(row["group"] for row in rows)
    samples, missing, seen = [], [], {}
    for row, label, split in zip(rows, labels, splits, strict=True):
        path = row["path"]
        place = os.path.normpath(root.parent / path)
        if place in seen:
            raise DataError("CSV", expected="every path once", found=f"{path} twice", where=root)
        seen[place] = path
        try:
            status = (root.parent / path).stat()  # not of the key: the folder may be a link
        except (OSError, ValueError):
            missing.append(path)
            continue
        if not stat.S_ISREG(status.st_mode):
            missing.append(path)
            continue
        group = (row["group"] or path) if has_groups else None
        image = _Image(path, status.st_size, status.st_mtime_ns)
        samples.append(_sample(image, index[label], split, group))
    if missing:
        raise DataError(
            "CSV", expected="files that are there", where=root,
            found=f"{len(missing)} of {len(rows)} missing: {', '.join(missing[:3])}",
            hint="Paths are absolute or relative to the CSV's folder",
        )  # fmt: skip
    return ImageDataset(root, "csv", classes, _sorted(samples))


def _read_csv(root: Path) -> list[dict[str, str]]:
    """Return the rows with the keys path, target, split, group; "" for what is not there."""
    try:
        reader = csv.reader(io.StringIO(root.read_bytes().decode("utf-8-sig"), newline=""))
        header, *lines = [(reader.line_num, cells) for cells in reader if cells] or [(0, [])]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        found = str(error)
        raise DataError("CSV", expected="UTF-8 text", found=found, where=root) from error
    names = [name.strip() for name in header[1]]
    if names.count("path") != 1 or len(set(names)) < len(names):
        raise DataError(
            "CSV header", expected="path and, if known, target, split, group, once each",
            found=", ".join(names) or "nothing", where=root,
        )  # fmt: skip
    rows = []
    for line, cells in lines:
        row = {"target": "", "split": "", "group": ""} | dict(zip(names, cells, strict=False))
        if len(cells) != len(names) or not row["path"]:
            raise DataError(
                f"CSV line {line}", expected=f"{len(names)} cells, the path not empty",
                found=",".join(cells), where=root,
            )  # fmt: skip
        rows.append(row | {key: _plain_cell(row[key]) for key in ("target", "group")})
    return rows


def _plain_cell(cell: str) -> str:
    """Undo the apostrophe that ``files.csv_text`` sets before what looks like a formula."""
    formula = cell[1:].lstrip(" \u00a0").startswith(("=", "+", "-", "@", "\t", "\r"))
    return cell[1:] if cell.startswith("'") and formula else cell


def _scan_zip(root: Path) -> ImageDataset:
    ignored: Counter[str] = Counter()
    folders: set[str] = set()
    images: list[_Image] = []
    members: dict[str, _Member] = {}
    for info in _zip_directory(root):
        parts, is_folder = _safe_parts(info.filename, root)
        kind = stat.S_IFMT(info.external_attr >> 16)
        if any(map(_is_hidden, parts)):
            ignored["hidden"] += 1
            continue
        folders.update("/".join(parts[:n]) for n in range(1, len(parts) + is_folder))
        if is_folder:
            continue
        if kind not in {0, stat.S_IFREG}:
            ignored["link" if kind == stat.S_IFLNK else "not a regular file"] += 1
        elif not _has_image_ending(parts[-1]):
            ignored["not an image ending"] += 1
        else:
            path = "/".join(parts)
            _check_member(info, root, known=path in members)
            images.append(_Image(path, info.file_size, _member_time(info)))
            members[path] = _Member(
                info.header_offset, info.compress_type, info.compress_size, info.CRC
            )
    _check_ratio(sum(i.image_bytes for i in images), root.stat().st_size, root, "all images")
    tops = {folder for folder in folders if "/" not in folder}
    if (
        len(tops) == 1
        and not tops & _SPLIT_OF_FOLDER.keys()
        and all("/" in path for path in members)
    ):
        skip = len(tops.pop()) + 1
        images = [image._replace(path=image.path[skip:]) for image in images]
        members = {path[skip:]: member for path, member in members.items()}
        folders = {folder[skip:] for folder in folders if len(folder) > skip}
    return replace(_arrange(root, images, folders, ignored), layout="zip", _members=members)


def _zip_directory(root: Path) -> list[zipfile.ZipInfo]:
    try:
        with zipfile.ZipFile(root) as archive:
            infos = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, struct.error) as error:
        raise DataError("zip", expected="a whole zip file", found=error, where=root) from error
    if len(infos) > _MAX_ZIP_MEMBERS:
        expected = f"at most {_MAX_ZIP_MEMBERS:,} members"
        raise DataError("zip", expected=expected, found=f"{len(infos):,}", where=root)
    return infos


def _safe_parts(name: str, root: Path) -> tuple[list[str], bool]:
    """Return the folders and name of a member, and whether it is a folder."""
    name = name.replace("\\", "/")  # some Windows packers write these
    parts = [part for part in name.split("/") if part not in {"", "."}]
    if name.startswith("/") or ".." in parts or re.match("[A-Za-z]:", name) or not parts:
        raise DataError(
            "zip member", expected="a name inside the zip", found=repr(name), where=root,
            hint="Do not trust this zip",
        )  # fmt: skip
    return parts, name.endswith("/")


def _check_member(info: zipfile.ZipInfo, root: Path, *, known: bool) -> None:
    where = f"{root}: {info.filename}"
    if info.flag_bits & 0x41:
        hint = "Unpack it and scan the folder"
        raise DataError(
            "zip member", expected="no encryption", found="some", where=where, hint=hint
        )
    if info.compress_type not in _ZIP_METHODS:
        found = f"method {info.compress_type}"
        raise DataError("zip member", expected="stored or deflated", found=found, where=where)
    if known:
        raise DataError("zip member", expected="every name once", found="it twice", where=where)
    if max(info.file_size, info.compress_size) > MAX_IMAGE_BYTES:
        found = f"{info.file_size:,}"
        expected = f"at most {MAX_IMAGE_BYTES:,} bytes"
        raise DataError("zip member", expected=expected, found=found, where=where)
    _check_ratio(info.file_size, info.compress_size, root, info.filename)


def _check_ratio(num_bytes: int, packed_bytes: int, root: Path, what: str) -> None:
    if num_bytes > _RATIO_FREE_BYTES and num_bytes > _MAX_ZIP_RATIO * packed_bytes:
        raise DataError(
            "zip", expected=f"at most {_MAX_ZIP_RATIO} times its packed size",
            found=f"{num_bytes:,} bytes in {packed_bytes:,}", where=f"{root}: {what}",
            hint="This looks like a decompression bomb",
        )  # fmt: skip


def _member_time(info: zipfile.ZipInfo) -> int:
    try:
        seconds = calendar.timegm((*info.date_time, 0, 0, 0))
    except ValueError:  # month 0 and the like
        seconds = 0
    return seconds * 10**9 + info.CRC % 10**9


def _read_file(path: Path) -> bytes:
    # Without O_NONBLOCK a pipe that took the file's place would block for ever.
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    with os.fdopen(os.open(path, flags), "rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("not a regular file")
        if status.st_size > MAX_IMAGE_BYTES:
            raise ValueError(f"{status.st_size:,} bytes, more than {MAX_IMAGE_BYTES:,}")
        return file.read()


def _read_member(root: Path, sample: Sample, member: _Member) -> bytes:
    """Return a zip member, never more than its declared size in memory.

    Goes by the place noted in the scan, which costs as much as opening a file; ``ZipFile`` would
    parse the directory again in every thread and process.
    """
    with root.open("rb") as file:
        file.seek(member.offset)
        signature, name_bytes, extra_bytes = struct.unpack("<4s22xHH", file.read(30))
        if signature != b"PK\x03\x04":
            raise ValueError("no zip member where one was")
        file.seek(name_bytes + extra_bytes, os.SEEK_CUR)
        data = file.read(member.packed_bytes)
    if member.method == zipfile.ZIP_DEFLATED:
        data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, sample.image_bytes + 1)
    if len(data) != sample.image_bytes or zlib.crc32(data) != member.crc:
        raise ValueError("a member that is not what the zip's directory says")
    return data
