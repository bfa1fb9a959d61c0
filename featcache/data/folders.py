"""Walk folders for images; read splits and classes from names.

Reads: names, kinds, sizes and times, and the first bytes of files without an ending. Writes:
nothing.

Images are regular files with an image ending, also through links (as ``split --mode symlink``
makes). Where pydicom is installed, DICOM files are images too: by their ending, and files without
an ending by their first bytes. Hidden names, system folders, linked folders, other endings, pipes
and devices are ignored and counted by reason. Names of files and folders need not be UTF-8, but for
those of classes.
"""

from __future__ import annotations

import os
import stat
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from featcache.data import dicom_files
from featcache.data.listing import escape_glob
from featcache.errors import DataError, escaped, printable, warn_user
from featcache.untrusted import find_fault

SPLITS = ("train", "valid", "test", "all")
SPLIT_OF_FOLDER = {
    "train": "train", "valid": "valid", "val": "valid", "validation": "valid", "test": "test",
}  # fmt: skip
IMAGE_SUFFIXES = frozenset({
    ".jpg", ".jpeg", ".jfif", ".jpe", ".pjpeg", ".png", ".bmp", ".tif", ".tiff", ".webp",
    ".ppm", ".pgm", ".pbm", ".pnm",
})  # fmt: skip
SHARD_ENDINGS = {".tar": "tar", ".parquet": "parquet", ".pq": "parquet"}
"""Ending of a file that holds many images -> its kind."""
OTHER_ENDING = "not an image ending"
LINKED_FOLDER = "link to a folder"
NO_ENDING = "without an ending"
DICOM_WITHOUT_ENDING = "DICOM without an ending"

_DICOM = f"DICOM files are not read without pydicom: {dicom_files.INSTALL}"
_HEIC = "HEIC and AVIF photos are not read: convert them to JPEG or PNG first"
_VOLUME = "Volumes (NIfTI, MetaImage, NRRD) are not read: save their slices as PNG first"
_ARCHIVE = "Of archives, .zip and plain .tar are read: unpack others first (a .tar.gz by gunzip)"
_ADVICE_ON_ENDING = {
    **dict.fromkeys((".dcm", ".dicom", ".ima", DICOM_WITHOUT_ENDING), _DICOM),
    **dict.fromkeys((".heic", ".heif", ".hif", ".avif"), _HEIC),
    **dict.fromkeys((".nii", ".nii.gz", ".mha", ".mhd", ".nrrd"), _VOLUME),
    **dict.fromkeys((".tgz", ".gz", ".bz2", ".xz", ".zst", ".7z", ".rar"), _ARCHIVE),
    ".tar": "Name the tar, or the folder of tars, as DATA",
    ".parquet": "Name the Parquet file, or the folder of such files, as DATA",
    ".zip": "Zips inside a folder are not read: unpack them, or name one as DATA",
}  # fmt: skip

_SPLIT_LOOKALIKES = {"training", "testing", "dev", "eval", "evaluation", "holdout"}
_SYSTEM_FOLDERS = {"__macosx", "__pycache__", "@eadir", "$recycle.bin", "lost+found"}


class ImageFile(NamedTuple):
    """A regular file with an image ending, and its ``/``-separated path relative to a root."""

    path: str
    image_bytes: int
    mtime_ns: int


class Ignored(Counter[str]):
    """Reason -> number of entries that are not used; and what is said about some of them.

    Attributes:
        endings: Ending -> number of files that are ignored for it.
        examples: Ending -> the first of them.
        links: Paths of linked folders.
        shards: Paths of tars and Parquet files.
    """

    def __init__(self) -> None:
        super().__init__()
        self.endings: Counter[str] = Counter()
        self.examples: dict[str, str] = {}
        self.links: list[str] = []
        self.shards: list[str] = []

    def add(self, reason: str, path: str) -> None:
        """Count an entry."""
        self[reason] += 1
        if reason == OTHER_ENDING:
            ending = ending_of(path.rpartition("/")[2])
            self.endings[ending] += 1
            self.examples.setdefault(ending, path)
            if ending in SHARD_ENDINGS:
                self.shards.append(path)
        elif reason == LINKED_FOLDER:
            self.links.append(path)

    def take_back(self, shards: Iterable[str]) -> None:
        """Count tars or Parquet files no longer: they are the data."""
        for path in shards:
            ending = ending_of(path.rpartition("/")[2])
            self[OTHER_ENDING] -= 1
            self.endings[ending] -= 1
            if not self.endings[ending]:
                del self.endings[ending]
        if not self[OTHER_ENDING]:
            del self[OTHER_ENDING]

    def recognise_dicom(self, root: Path) -> None:
        """Look at the first file without an ending under ``root``: DICOM files often have none."""
        if dicom_files.sniff(root / self.examples.get(NO_ENDING, "")):
            self.endings[DICOM_WITHOUT_ENDING] = self.endings.pop(NO_ENDING)


def advise_on_endings(endings: Mapping[str, int], other: str) -> str:
    """Return what to do about files of the most frequent ending; ``other`` if nothing is known."""
    most = sorted(endings, key=lambda ending: (-endings[ending], ending))
    advice = (_ADVICE_ON_ENDING[e] for e in most[:3] if e in _ADVICE_ON_ENDING)
    known = next(advice, other)
    return other if known == _DICOM and dicom_files.is_installed() else known


def walk_folder(root: Path, ignored: Ignored, folders: set[str]) -> Iterator[ImageFile]:
    """Yield the images under ``root``.

    Args:
        root: The folder to walk.
        ignored: What is not used; updated.
        folders: Paths of all folders that are not ignored; updated.

    Raises:
        DataError: If a folder cannot be read.
    """
    waiting = [""]
    while waiting:
        prefix = waiting.pop()
        try:
            with os.scandir(root / prefix) as entries:
                for entry in entries:
                    reason = _ignore_reason(entry)
                    path = prefix + entry.name
                    if reason == "folder":
                        folders.add(path)
                        waiting.append(path + "/")
                    elif reason:
                        ignored.add(reason, path)
                    else:
                        status = entry.stat()
                        yield ImageFile(path, status.st_size, status.st_mtime_ns)
        except OSError as error:
            raise DataError(
                "folder", expected="a readable one", found=error.strerror, where=root / prefix
            ) from error


def _ignore_reason(entry: os.DirEntry[str]) -> str:
    """Return why an entry is ignored; ``folder`` for a folder to walk, "" for an image."""
    if is_hidden(entry.name):
        return "hidden"
    if entry.is_dir(follow_symlinks=False):
        return "folder"
    try:
        if entry.is_symlink() and not stat.S_ISREG(entry.stat().st_mode):
            return LINKED_FOLDER if entry.is_dir() else "link to no regular file"
        if not has_image_ending(entry.name) and not _is_unnamed_dicom(entry):
            return OTHER_ENDING
        if not stat.S_ISREG(entry.stat().st_mode):
            return "not a regular file"
        entry.name.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:  # half a surrogate pair, only on Windows
        return "name not UTF-8"
    except OSError:
        return "link to nothing"
    return ""


def is_hidden(name: str) -> bool:
    """Return whether a file or folder of this name is hidden or belongs to the system."""
    return name.startswith(".") or name.casefold() in _SYSTEM_FOLDERS


def has_image_ending(name: str) -> bool:
    """Return whether a file name ends like an image's that can be read here."""
    _, dot, ending = name.rpartition(".")
    if dot + ending.lower() in IMAGE_SUFFIXES:
        return True
    return dicom_files.has_dicom_ending(name) and dicom_files.is_installed()


def _is_unnamed_dicom(entry: os.DirEntry[str]) -> bool:
    """Return whether a file without an ending is DICOM, where DICOM can be read."""
    return (
        dicom_files.may_be_unnamed(entry.name)
        and dicom_files.is_installed()
        and dicom_files.sniff(entry.path)
    )


def ending_of(name: str) -> str:
    """Return the ending of a file name, as ``.dcm``, or ``NO_ENDING``."""
    stem, dot, ending = name.lower().rpartition(".")
    if not dot or not stem or not ending.isalnum() or len(ending) > 10:
        return NO_ENDING
    return f".nii.{ending}" if stem.endswith(".nii") else f".{ending}"


@dataclass(frozen=True)
class Layout:
    """Which folders of a data set are splits and which are classes.

    Args:
        kind: ``splits``, ``classes`` or ``images``.
        classes: Class names, sorted as strings.
        places: Start of a path (``train/covid/``) -> split and class; the class is "" if nothing
            is labelled. No place is inside another.
    """

    kind: str
    classes: tuple[str, ...]
    places: dict[str, tuple[str, str]]

    def place_of(self, folder: str) -> str | None:
        """Return the place of the images of a folder; None if it is outside all places."""
        folders = folder.split("/") if folder else []
        prefixes = ("".join(f"{name}/" for name in folders[:depth]) for depth in range(3))
        return next((prefix for prefix in prefixes if prefix in self.places), None)


def find_layout(root: Path, folders: set[str], *, no_classes: bool = False) -> Layout:
    """Find out from the folders' names which are splits and which are classes.

    Args:
        root: Only for messages.
        folders: All folders that are not ignored, empty ones too.
        no_classes: Folders that are no splits are no classes either.

    Raises:
        DataError: If the names are inconsistent.
    """
    tops = _split_folders(root, {folder for folder in folders if "/" not in folder})
    if no_classes:
        return Layout(
            "images" if "" in tops else "splits", (), {top: (tops[top], "") for top in tops}
        )
    classes_by_split = {
        split: {
            folder[len(prefix) :]
            for folder in folders
            if folder.startswith(prefix) and "/" not in folder[len(prefix) :]
        }
        for prefix, split in tops.items()
    }
    _check_depth(root, tops, folders, set().union(*classes_by_split.values()))
    classes = agree_on_classes({s: names for s, names in classes_by_split.items() if names}, root)
    places = {
        f"{prefix}{name}/" if name else prefix: (split, name)
        for prefix, split in tops.items()
        for name in sorted(classes_by_split[split]) or [""]
    }
    kind = "splits" if "" not in tops else "classes" if classes else "images"
    return Layout(kind, classes, places)


def _check_depth(root: Path, tops: dict[str, str], folders: set[str], classes: set[str]) -> None:
    """Refuse split folders where images should be; warn where classes may lie a level deeper.

    Raises:
        DataError: If a class folder holds folders train, valid, test.
    """
    level = 1 if "" in tops else 2  # of the class folders
    below: dict[str, set[str]] = {}
    for folder in folders:
        *above, name = folder.split("/")
        if len(above) == level:
            below.setdefault("/".join(above), set()).add(name)
    is_sole, place = len(classes) == 1, root
    for folder, names in sorted(below.items()):
        place, splits = root / folder, {n for n in names if n.casefold() in SPLIT_OF_FOLDER}
        of_train = [n for n in splits if SPLIT_OF_FOLDER[n.casefold()] == "train"]
        # One of them alone may be a kind of images, or a train in a class "vehicles".
        holds_classes = any(f.startswith(f"{folder}/{n}/") for f in folders for n in of_train)
        if len(splits) > 1 or (of_train and (is_sole or holds_classes)):
            deeper = f"Name the folder that holds them: {place}"
            raise DataError(
                "class folder", expected="images of one class, or folders of them",
                found=f"the split folders {', '.join(sorted(splits))}", where=place,
                hint=deeper if is_sole and level == 1 else "Set splits above classes: train/CLASS",
            )  # fmt: skip
    inner = set().union(*below.values())
    if is_sole and len(inner) > 1:
        examples = " and ".join(map(repr, sorted(inner)[:2]))
        message = (
            f"{next(iter(classes))!r} is the only class folder of {printable(root)}, and its "
            f"folders, such as {examples}, are no classes: if they should be, name the folder they "
            "lie in"
        )
        warn_user(escaped(message))


def _split_folders(root: Path, tops: set[str]) -> dict[str, str]:
    """Return start of a split's paths -> split; {"": "all"} if there are no split folders."""
    found: dict[str, str] = {}
    for name in sorted(tops):
        split = SPLIT_OF_FOLDER.get(name.casefold())
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
            hint=(f"Rename or move it, or leave it out with --exclude '{escape_glob(others[0])}'"
                  if found else "Rename or move it") + "; class folders belong into each split",
        )  # fmt: skip
    return found or {"": "all"}


def agree_on_classes(classes_by_split: dict[str, set[str]], where: Path) -> tuple[str, ...]:
    """Return the sorted class names, after checking that every split has all of them.

    Args:
        classes_by_split: Split -> its classes; unlabelled splits left out.
        where: Only for messages.

    Raises:
        DataError: If a split lacks a class, two names differ only by case or blanks, or one is not
            UTF-8.
    """
    for name in sorted(set().union(*classes_by_split.values())):
        if fault := find_fault(name, is_class=True):
            raise DataError(
                "classes", expected="names in UTF-8, without NUL", found=fault, where=where,
                hint="Rename it",
            )  # fmt: skip
    classes = tuple(sorted(set().union(*classes_by_split.values())))
    _refuse_twins(classes, where)
    for name in classes:
        have = [split for split in SPLITS if name in classes_by_split.get(split, ())]
        lack = [split for split in classes_by_split if split not in have]
        if lack:
            raise DataError(
                "classes", expected="the same in every split",
                found=f"{name!r} in {' and '.join(have)} but not in {' and '.join(lack)}",
                where=where, hint="Rename or remove the class, or add its images",
            )  # fmt: skip
    return classes


def _refuse_twins(classes: Iterable[str], where: Path) -> None:
    """Refuse names that differ by case, by blanks, or by how an accent is encoded alone."""
    plain: dict[str, str] = {}
    for name in classes:
        composed = unicodedata.normalize("NFC", name)
        twin = plain.setdefault(" ".join(composed.casefold().split()), name)
        if twin == name:
            continue
        if unicodedata.normalize("NFC", twin) == composed:  # they print alike
            raise DataError(
                "classes", expected="names in one Unicode form",
                found=f"{twin!a} and {name!a}, which are both {composed!r}", where=where,
                hint="Rename or merge them: macOS writes accents as characters of their own",
            )  # fmt: skip
        raise DataError(
            "classes", expected="names that differ by more than case and blanks",
            found=f"{twin!r} and {name!r}", where=where, hint="Rename or merge them",
        )  # fmt: skip


def training_split(splits: Iterable[str]) -> str | None:
    """Return the split to train on: ``train``, else ``all``, else None."""
    present = set(splits)
    return next((name for name in ("train", "all") if name in present), None)
